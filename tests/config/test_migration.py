"""A script goes from one dialect into the other and back, and nothing but its flags changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf.config.arguments import parse, to_flat_dict
from openrlhf.config.commands import COMMANDS, CONFIGS, config_class
from openrlhf.config.dialect import EVERYWHERE, PPO, SUPERVISED
from openrlhf.config.migration import IN_DOTS, migrated
from openrlhf.config.shell import commands
from tests.test_documented_commands import commands_of

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [path for path in sorted((ROOT / "examples/scripts").glob("*.sh")) if migrated(path.read_text()).found]
DOTTED = {*EVERYWHERE, *SUPERVISED, *PPO}
SCRIPT = r"""#!/bin/bash
# deepspeed --module openrlhf.cli.train_sft --max_len 1    a comment stays
set -e
name="it's a --max_len of 3"
read -r -d '' training_commands <<EOF
openrlhf.cli.train_sft \
   --max_len 2048 \
   --input_template $'User: {}\n--max_len: ' \
   --learning_rate $(echo "5e-6)" | tr -d ')') \
   --save_path "./out --max_len/$name" --bf16 \
   --adam_betas 0.9 \
      0.95 --seed=3
EOF
torchrun -m $training_commands --max_epochs 1 2>&1 | tee --max_len log.txt   # and --max_len here
bash -c "cd /; deepspeed --module openrlhf.cli.train_sft --pretrain 'a b' --flash_attn && echo --max_len"
"""
SCRIPT_IN_DOTS = r"""#!/bin/bash
# deepspeed --module openrlhf.cli.train_sft --max_len 1    a comment stays
set -e
name="it's a --max_len of 3"
read -r -d '' training_commands <<EOF
openrlhf.cli.train_sft \
   --data.max_len 2048 \
   --data.input_template $'User: {}\n--max_len: ' \
   --adam.lr $(echo "5e-6)" | tr -d ')') \
   --ckpt.output_dir "./out --max_len/$name" --ds.param_dtype bf16 \
   --adam.betas 0.9 \
      0.95 --train.seed=3
EOF
torchrun -m $training_commands --max_epochs 1 2>&1 | tee --max_len log.txt   # and --max_len here
bash -c "cd /; deepspeed --module openrlhf.cli.train_sft --model.model_name_or_path 'a b' --ds.attn_implementation flash_attention_2 && echo --max_len"
"""  # noqa: E501
OF_LATER_VERSIONS = (
    "names no data type",
    "no dotted form",
    "its dotted flags are read here",
    "may spell these otherwise",
)
"""What a note can say of a script that runs here in both dialects."""


def test_only_flags_change_and_they_change_back():
    there = migrated(SCRIPT)
    assert there.text == SCRIPT_IN_DOTS and there.to == "dotted"
    back = migrated(SCRIPT_IN_DOTS)
    assert back.text == SCRIPT and back.to == "flat"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_an_example_script_means_the_same_in_dots_and_comes_back_as_it_was(path):
    text = path.read_text(encoding="utf-8")
    there = migrated(text, "dotted")
    assert there.text != text and all(any(part in note for part in OF_LATER_VERSIONS) for note in there.notes)
    assert migrated(there.text, "flat").text == text
    assert migrated(there.text, "dotted").text == there.text, "a script in dots already stays"
    for (name, flat), (also, dotted) in zip(commands_of(text), commands_of(there.text), strict=True):
        if name in CONFIGS:
            assert name == also and any(word[2:] in DOTTED for word in dotted)
            assert resolved(name, flat) == resolved(name, dotted)


def resolved(name, arguments):
    flags = to_flat_dict(parse(config_class(name), [*arguments, "--dry_run"], name)[0])
    return {flag: value for flag, value in flags.items() if flag != "wandb_run_name"}


def flat(words):
    return migrated(f"python -m openrlhf.cli.train_ppo_ray {words}\n", "flat")


def dotted(words):
    return migrated(f"python -m openrlhf.cli.train_ppo_ray {words}\n", "dotted").text.split(None, 3)[3].rstrip()


def test_what_is_two_flags_with_dots_is_written_twice_and_read_once():
    assert dotted("--max_norm 1 --bf16") == "--actor.max_norm 1 --critic.max_norm 1 --ds.param_dtype bf16"
    assert dotted("--ref_reward_offload") == "--ref.offload --reward.offload"
    there = (
        "--actor.max_norm 1 \\\n  --critic.max_norm 1 --reward.offload --ref.offload --ds.param_dtype bf16 --seed 1"
    )
    assert flat(there).text.split(None, 3)[3].rstrip() == "--max_norm 1 --ref_reward_offload --bf16 --seed 1"


@pytest.mark.parametrize(
    ("words", "left", "note"),
    [
        ("--ds.param_dtype fp16", "--ds.param_dtype fp16", "--ds.param_dtype fp16 has no flat form and stays"),
        ("--train.async_enable --bf16", "--train.async_enable --bf16", "no flag of train_ppo_ray here and stays"),
        ("--train.seed 1", "--seed 1", "names no data type"),
        (
            "--bf16 --actor.max_norm 1 --critic.max_norm 2",
            "--bf16 --max_norm 1 --max_norm 2",
            "--max_norm is given with other values before",
        ),
    ],
)
def test_what_cannot_be_said_otherwise_is_told(words, left, note):
    result = flat(words)
    assert result.text.split(None, 3)[3].rstrip() == left
    assert any(note in told for told in result.notes)


@pytest.mark.parametrize(
    ("command", "words", "notes"),
    [
        ("train_ppo_ray", "--bf16 --seed 1 --vllm_num_engines 1", []),
        ("train_sft", "--bf16 --lr_scheduler cosine --lr_warmup_ratio 0.1 --max_norm 1 --ds.zero_stage 2", []),
        (
            "train_ppo_ray",
            "--bf16 --prompt_max_len 9 --remote_rm_timeout 3 --prompt_max_len 9 --dry_run",
            ["train_ppo_ray: no dotted form, so these stay as they are, and OpenRLHF 0.10 does not know them: "
             "--prompt_max_len, --remote_rm_timeout, --dry_run"],
        ),
        ("train_sft", "--bf16=false", ["train_sft: no dotted form, so these stay as they are, and OpenRLHF 0.10 does "
                                       "not know them: --bf16"]),
        ("train_sft", "--seed 1", ["train_sft names no data type: the default is fp32 here, and bf16 in OpenRLHF 0.10 "
                                   "and later; name it with --ds.param_dtype"]),
        ("train_dpo", "--bf16 --chosen_key a --rejected_key b", [
            "train_dpo: OpenRLHF 0.10 may spell these otherwise: --data.chosen_key, --data.rejected_key"
        ]),
        ("train_kto", "--seed 1", [f"train_kto: its dotted flags are read here; OpenRLHF 0.10 has them for "
                                   f"{', '.join(IN_DOTS)}"]),
    ],
)  # fmt: skip
def test_what_later_versions_would_not_take_is_told(command, words, notes):
    assert migrated(f"python -m openrlhf.cli.{command} {words}\n", "dotted").notes == notes


def test_a_note_of_two_commands_alike_is_told_once():
    line = "python -m openrlhf.cli.train_sft --seed 1\n"
    assert len(migrated(line + line, "dotted").notes) == 1


def test_batch_inference_has_a_split_of_its_own_name():
    text = "python -m openrlhf.cli.batch_inference --dataset_split dev --bf16\n"
    there = migrated(text)
    assert "--data.dataset_split dev" in there.text and migrated(there.text).text == text


@pytest.mark.parametrize(
    "start",
    [
        "openrlhf {0}",
        "/env/bin/openrlhf {0}",
        "sudo -E openrlhf {0}",
        "python3 -m openrlhf.cli.main {0}",
        "python3 openrlhf/cli/main.py {0}",
        "deepspeed --module openrlhf.cli.main {0}",
        "ray job submit --address x -- openrlhf {0}",
        "bash -c 'cd /; openrlhf {0}",
    ],
)
@pytest.mark.parametrize("short", ["sft", "ppo-ray", "chat", "merge"])
def test_the_console_script_is_known_however_it_is_started(start, short):
    end = "'" * start.count("'") + "\n"
    text = f"{start.format(short)} --bf16{end}"
    there = migrated(text)
    assert there.text == f"{start.format(short)} --ds.param_dtype bf16{end}"
    assert migrated(there.text).text == text


def test_every_command_that_takes_flags_of_a_training_is_known():
    assert {module for module, _ in COMMANDS.values()} - {*CONFIGS} == {"report", "migrate"}
    for command in CONFIGS:
        assert migrated(f"python -m openrlhf.cli.{command} --bf16\n").text.split()[3:] == ["--ds.param_dtype", "bf16"]


def test_what_is_off_by_default_in_flat_flags_is_left_out():
    assert flat("--ds.param_dtype fp32 --train.seed 1").text == "python -m openrlhf.cli.train_ppo_ray --seed 1\n"


def test_a_list_of_flags_belongs_to_the_only_command():
    text = 'flags=(--seed 1 --zero_stage 2)\ndeepspeed openrlhf/cli/train_sft.py "${flags[@]}" --bf16\n'
    assert migrated(text).text == (
        'flags=(--train.seed 1 --ds.zero_stage 2)\n'
        'deepspeed openrlhf/cli/train_sft.py "${flags[@]}" --ds.param_dtype bf16\n'
    )  # fmt: skip


def test_other_commands_stay():
    text = "python train.py --seed 1\ndocker run --name openrlhf --seed 2\n"
    text += "docker run --name openrlhf sft --seed 2\nopenrlhf report --bf16\nopenrlhf --seed 2\n"
    assert migrated(text).text == text and migrated(text).found == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b;c", [["a", "b"], ["c"]]),
        ('a \'b c\' "d \\" e" f\\ g', [["a", "'b c'", '"d \\" e"', "f\\ g"]]),
        ("a \\\n  b # c 'd\ne", [["a", "b"], ["e"]]),
        ("a $(b (c) ')') ${d} `e f`", [["a", "$(b (c) ')')", "${d}", "`e f`"]]),
        ("a 2>&1 | b", [["a"], ["1"], ["b"]]),
        ("cat <<'X' > f\nit's\nX\nb", [["cat"], ["f"], ["it's"], ["b"]]),
        ("x=#1 a#b", [["x=#1", "a#b"]]),
        ("it's", [["it's"]]),
    ],
)
def test_words_are_split_as_a_shell_splits_them(text, expected):
    found = list(commands(text))
    assert [[word.text for word in words] for words in found] == expected
    assert all(text[word.start : word.end] == word.text for words in found for word in words)
