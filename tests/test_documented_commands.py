"""Every command in the README and in the example scripts is one that a user could run."""

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

import pytest

from openrlhf.cli.train_ppo_ray import placement_problems
from openrlhf.config.arguments import parse

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples/scripts").glob("*.sh"))
CONFIGS = {
    "train_sft": "SFTConfig",
    "train_rm": "RewardModelConfig",
    "train_dpo": "DPOConfig",
    "train_kto": "KTOConfig",
    "train_kd": "KDConfig",
    "train_prm": "PRMConfig",
    "train_ppo": "PPOConfig",
    "train_ppo_ray": "RayPPOConfig",
    "serve_rm": "ServeConfig",
    "batch_inference": "BatchInferenceConfig",
}
MODULES = {"train_ppo": "ppo", "train_ppo_ray": "ppo_ray", "serve_rm": "serve", "batch_inference": "inference"}
MODULE = re.compile(r"openrlhf\.cli\.(\w+)")
OPTIONAL = {"${placement[@]}", "${flags[$name]}"}
PLACEHOLDERS = {"$engines": "1", "$seed": "0", "$round": "0", "$slice": "2048", "$sampler": "generate_vllm"}


def shell_blocks(text):
    """Return the commands of the bash blocks of a Markdown text."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.S)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def commands_of(text):
    """Return (command name, arguments) of every training command in a script or README."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        match = MODULE.search(line)
        if match and not line.lstrip().startswith("#"):
            rest = line[match.end() :].split(" #")[0]
            found.append((match.group(1), [expand(word) for word in split(rest) if word not in OPTIONAL]))
    return found


def split(line):
    """Split like bash, as far as the documents need it: $'...' quotes hold escapes."""
    line = re.sub(r"\$'([^']*)'", lambda m: shlex.quote(m.group(1).replace("\\n", "\n")), line)
    return shlex.split(line)


def expand(word):
    """Return a word with its shell variables replaced by something of the right kind."""
    word = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word)
    for name, value in PLACEHOLDERS.items():
        word = word.replace(name, value)
    return re.sub(r"\$here", str(ROOT / "examples/scripts"), word)


def check(name, arguments):
    module = import_module(f"openrlhf.config.{MODULES.get(name, 'supervised')}")
    also = placement_problems if name == "train_ppo_ray" else None
    parse(getattr(module, CONFIGS[name]), [*arguments, "--dry_run"], name, also)


README_COMMANDS = commands_of((ROOT / "README.md").read_text())
SCRIPT_COMMANDS = [(path.name, *command) for path in SCRIPTS for command in commands_of(path.read_text())]


@pytest.mark.parametrize(("name", "arguments"), README_COMMANDS, ids=[name for name, _ in README_COMMANDS])
def test_every_training_command_of_the_readme_parses(name, arguments):
    check(name, arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [command[1:] for command in SCRIPT_COMMANDS],
    ids=[f"{script}-{name}" for script, name, _ in SCRIPT_COMMANDS],
)
def test_every_training_command_of_the_example_scripts_parses(name, arguments):
    check(name, arguments)


def test_the_documents_hold_the_commands_that_these_tests_look_for():
    expected = {"train_sft", "train_rm", "train_dpo", "train_ppo_ray", "serve_rm"}
    assert expected == {name for name, _ in README_COMMANDS}
    assert {name for _, name, _ in SCRIPT_COMMANDS} == set(CONFIGS)
    assert len(SCRIPT_COMMANDS) >= 40


@pytest.mark.parametrize("line", shell_blocks((ROOT / "README.md").read_text()))
def test_every_other_command_of_the_readme_names_something_that_exists(line):
    words = split(line)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] in ("deepspeed", "python3", "ray") and MODULE.search(line)


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "tests/run.sh", ROOT / ".ci/run"], ids=lambda path: path.name)
def test_every_script_is_valid_bash_and_can_be_executed(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.stat().st_mode & 0o100


def test_the_readme_holds_no_placeholder():
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.S)
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b", re.sub(r"`[^`]*`", "", text))
