"""``migrate`` as a person runs it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf.cli.migrate import main
from openrlhf.config.arguments import parse, to_flat_dict
from openrlhf.config.commands import config_class
from openrlhf.config.trl import command_of
from openrlhf.config.trl_keys import COMMANDS
from openrlhf.errors import InfraError
from tests.cli.supervised import ROOT, environment


@pytest.fixture
def migrate(monkeypatch, capsys):
    """Return a function that runs the command with some words and returns exit status, output and errors."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["migrate", *words])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def test_a_script_goes_to_a_file_and_back_to_the_screen(tmp_path):
    script = ROOT / "examples/scripts/train_dpo_llama.sh"
    for words in ([str(script), "--output_path", str(tmp_path / "dots.sh")], [str(tmp_path / "dots.sh")]):
        command = [sys.executable, "-m", "openrlhf.cli.migrate", *words]
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        to_dots = len(words) > 1
        assert done.returncode == 0 and len(done.stderr.splitlines()) == to_dots
        assert ("OpenRLHF 0.10 may spell these otherwise: --data.chosen_key" in done.stderr) == to_dots
    assert "--model.beta 0.1" in (tmp_path / "dots.sh").read_text(encoding="utf-8")
    assert done.stdout == script.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("empty.sh", "echo\n", 3, "holds no command of this project with flags"),
        ("list.yaml", "- 1\n", 3, "must hold the settings of TRL"),
        ("broken.yaml", "a: [\n", 3, "cannot be read"),
        (None, "", 2, "--file is missing"),
        ("missing", "", 2, "there is no such file"),
    ],
)
def test_a_mistake_is_one_line(migrate, tmp_path, name, text, code, said):
    words = [] if name is None else [str(tmp_path / name)]
    if text:
        Path(words[0]).write_text(text, encoding="utf-8")
    found, output, errors = migrate(*words)
    assert found == code and output == "" and said in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize("place", ["missing/out.sh", "."])
def test_a_place_that_cannot_be_written_is_one_line(migrate, tmp_path, place):
    script = tmp_path / "a.sh"
    script.write_text("python -m openrlhf.cli.train_sft --seed 1\n", encoding="utf-8")
    code, output, errors = migrate(str(script), "--output_path", str(tmp_path / place))
    assert code == InfraError.exit_code and output == "" and len(errors.splitlines()) == 1
    assert errors.startswith(f"error: --output_path {tmp_path / place} cannot be written (")


def test_a_dry_run_says_what_would_be_done(migrate, tmp_path):
    (tmp_path / "a.sh").write_text("python -m openrlhf.cli.train_sft --seed 1\n", encoding="utf-8")
    code, output, _ = migrate(str(tmp_path / "a.sh"), "--dry_run", "--output_path", str(tmp_path / "b.sh"))
    assert code == 0 and "b.sh" in output and not (tmp_path / "b.sh").exists()


@pytest.fixture
def of_trl(migrate, tmp_path):
    """Return a function that gives command, its resolved flags, and what was told, of a TRL configuration."""

    def turned(settings: dict, *words: str) -> tuple[str, dict, str]:
        path = tmp_path / "trl.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        code, output, told = migrate(str(path), *words)
        assert code == 0, told
        line = shlex.split(output.replace("\\\n", " "))
        place = next(index for index, word in enumerate(line) if word.startswith("openrlhf.cli."))
        name = line[place].removeprefix("openrlhf.cli.")
        return name, to_flat_dict(parse(config_class(name), [*line[place + 1 :], "--dry_run"], name)[0]), told

    return turned


SHARED = {
    "model_name_or_path": "model",
    "dataset_name": "rows.jsonl",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-5,
    "bf16": True,
    "gradient_checkpointing": False,
    "report_to": "none",
    "output_dir": "out dir",
}


def test_supervised_training_of_trl_becomes_a_command(of_trl):
    asked = SHARED | {"max_length": 512, "lora_r": 8, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}
    asked |= {"eval_strategy": "no", "eval_steps": 10, "adam_beta2": 0.95, "ddp_timeout": 5}
    name, flags, told = of_trl(asked, "--ranks", "8")
    assert name == "train_sft" and flags["input_key"] == "messages" and flags["apply_chat_template"]
    assert flags["train_batch_size"] == 64 and flags["micro_train_batch_size"] == 4
    assert flags["bf16"] and not flags["gradient_checkpointing"] and flags["save_path"] == "out dir"
    assert flags["lora_rank"] == 8 and flags["target_modules"] == ["q_proj", "v_proj"]
    assert flags["eval_steps"] == -1 and flags["adam_betas"] == [0.9, 0.95]
    assert "note: ddp_timeout: 5 has no counterpart and is left out" in told


@pytest.mark.parametrize(
    ("extra", "name", "expected"),
    [
        ({"dataset_text_field": "text"}, "train_sft", {"pretrain_mode": True, "input_key": "text"}),
        ({"beta": 0.2, "loss_type": "ipo"}, "train_dpo", {"beta": 0.2, "loss": "ipo", "prompt_key": "prompt"}),
        ({"desirable_weight": 1.5}, "train_kto", {"desirable_loss_weight": 1.5, "label_key": "label"}),
        ({"center_rewards_coefficient": 0.01}, "train_rm", {"max_len": 512}),
        (
            {"num_generations": 4, "max_completion_length": 99, "beta": 0.04, "reward_funcs": ["a/rm", "b/rm"]},
            "train_ppo_ray",
            {"advantage_estimator": "group_norm", "use_kl_loss": True, "init_kl_coef": 0.04, "rollout_batch_size": 2},
        ),
        (
            {"num_generations": 8, "loss_type": "dr_grpo", "reward_funcs": "rm", "epsilon": 0.1, "epsilon_high": 0.3},
            "train_ppo_ray",
            {"advantage_estimator": "dr_grpo", "init_kl_coef": 0.0, "eps_clip_low_high": [0.1, 0.3]},
        ),
    ],
)
def test_the_keys_tell_the_command(of_trl, extra, name, expected):
    found, flags, _ = of_trl(SHARED | extra)
    assert found == name
    assert {flag: flags[flag] for flag in expected} == expected


def test_epochs_are_passes_over_the_prompts_and_iterations_those_over_a_rollout(of_trl):
    grpo = SHARED | {"num_generations": 4, "reward_funcs": "rm", "num_train_epochs": 3}
    _, flags, _ = of_trl(grpo)
    assert (flags["num_episodes"], flags["max_epochs"]) == (3, 1)
    _, flags, _ = of_trl(grpo | {"num_iterations": 2})
    assert (flags["num_episodes"], flags["max_epochs"]) == (3, 2)
    assert of_trl(SHARED | {"num_train_epochs": 3})[1]["max_epochs"] == 3


@pytest.mark.parametrize("command", COMMANDS)
def test_no_flag_is_written_twice(command):
    grpo = {"num_generations": 8, "beta": 0.1, "epsilon_high": 0.3, "dtype": "bfloat16", "lora_r": 8, "use_vllm": True}
    keys = {**dict.fromkeys(COMMANDS[command], 1), **grpo, "adam_beta1": 0.9, "attn_implementation": "flash"}
    text, notes = command_of(keys, command, 2)
    flags = [word for word in text.split() if word.startswith("--") and word != "--module"]
    assert len(flags) == len({*flags})
    assert any("max_seq_length: 1 is left out: max_length is --max_len too" in note for note in notes) or (
        "max_length" not in COMMANDS[command]
    )


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_weights_of_16_bits_are_asked_for_by_their_type_too(of_trl, key):
    plain = {name: value for name, value in SHARED.items() if name != "bf16"}
    _, flags, told = of_trl(plain | {key: "bfloat16"})
    assert flags["bf16"] and "--bf16" not in told
    _, flags, told = of_trl(plain | {key: "float32"})
    assert not flags["bf16"] and "--bf16 off (on)" in told and key not in told
    _, flags, told = of_trl(plain | {key: "float16"})
    assert not flags["bf16"] and f"{key}: float16 has no counterpart" in told


def test_defaults_that_are_others_in_trl_are_told(of_trl):
    told = of_trl({"model_name_or_path": "m", "dataset_name": "rows.jsonl"})[2]
    for words in (
        "--max_len 2048 (1024)",
        "--bf16 off (on)",
        "--gradient_checkpointing off (on)",
        "--max_epochs 2 (3)",
    ):
        assert words in told
    told = of_trl(SHARED | {"max_length": 512})[2]
    assert all(name not in told for name in ("--max_len", "--bf16", "--gradient_checkpointing", "--learning_rate"))
    told = of_trl({"model_name_or_path": "m", "dataset_name": "rows.jsonl", "reward_funcs": "rm"})[2]
    assert "--num_episodes 1 (3)" in told and "--generate_max_len 1024 (256)" in told


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gradient_accumulation_steps", "auto"),
        ("gradient_accumulation_steps", "4"),
        ("per_device_train_batch_size", "auto"),
        ("num_generations", 2.5),
        ("gradient_accumulation_steps", 0),
    ],
)
def test_a_size_that_is_no_number_is_named(migrate, tmp_path, key, value):
    path = tmp_path / "trl.json"
    path.write_text(json.dumps({"model_name_or_path": "m", "reward_funcs": "rm", key: value}), encoding="utf-8")
    code, output, errors = migrate(str(path))
    assert code == 3 and output == "" and len(errors.splitlines()) == 1
    assert f"{key}: {value!r} is no whole number above 0" in errors
