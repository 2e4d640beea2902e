"""Dotted flags of later OpenRLHF: they mean what the flat ones mean, and messages speak as the user does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf.cli.common import run
from openrlhf.config.arguments import parse
from openrlhf.config.dialect import EVERYWHERE, GUESSED, PPO, SUPERVISED, SWITCHES, TWINS, Dialect
from openrlhf.config.flags import flag_table
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.serve import ServeConfig
from openrlhf.config.supervised import (
    DPOConfig,
    KDConfig,
    KTOConfig,
    PRMConfig,
    RewardModelConfig,
    SFTConfig,
)
from openrlhf.errors import DataError, UsageError

COMMANDS = (
    SFTConfig, RewardModelConfig, DPOConfig, KTOConfig, KDConfig, PRMConfig, PPOConfig, RayPPOConfig, ServeConfig,
)  # fmt: skip
DPO = ["--model.model_name_or_path", "model", "--data.dataset", "rows.jsonl", "--data.prompt_key", "prompt"]
RAY = ["--actor.model_name_or_path", "model", "--data.prompt_dataset", "rows.jsonl"]
RAY += ["--reward.model_name_or_path", "rm"]
ROWS = json.loads((Path(__file__).parents[1] / "data/dotted.json").read_text(encoding="utf-8"))
"""The renames of OpenRLHF 0.10.2: flat flag -> dotted ones; ``data.*`` is a section where it keeps its name."""
LATER = {
    "max_new_tokens": "generate_max_len",
    "param_dtype": "bf16",
    "attn_implementation": "flash_attn",
    "dataset_split": "train_split",
}
"""Flat flags that had other names before 0.10 than in 0.5, which are those of here."""


def dpo(*words):
    return parse(DPOConfig, [*DPO, *words], "train_dpo")[0]


def ppo(*words):
    return parse(RayPPOConfig, [*RAY, *words], "train_ppo_ray")[0]


def problems(config, *words):
    with pytest.raises(UsageError) as error:
        config(*words)
    return error.value.problems


def renames(command):
    """Return flag of here -> its dotted names, for flags that are in OpenRLHF."""
    rows = ROWS["everywhere"] | ROWS["train_ppo_ray" if command is RayPPOConfig else "supervised"]
    return {LATER.get(flat, flat): [in_section(name, flat) for name in names] for flat, names in rows.items()}


def in_section(name, flat):
    section = name.removesuffix(".*")
    return name if section == name else f"{section}.{flat.removeprefix(section.rpartition('.')[2] + '_')}"


@pytest.mark.parametrize("command", [SFTConfig, RewardModelConfig, DPOConfig, RayPPOConfig])
def test_the_dotted_names_are_those_of_the_renames(command):
    table, expected = flag_table(command), renames(command)
    found = Dialect(table).flat
    there = {name: flat for flat, names in expected.items() for name in names if flat in table and "." in name}
    assert {name: found.get(name) for name in there} == there
    elsewhere = {name for names in renames(RayPPOConfig).values() for name in names}
    assert {*found} - {*there} <= GUESSED | elsewhere, "a name of our own is a guess, and said to be one"
    if command is RayPPOConfig:
        assert {flat for flat, names in expected.items() if len(names) == 2 and flat in table} == {*TWINS}


def test_what_is_not_here_is_not_taken_for_something_else():
    known = {name for command in COMMANDS for name in flag_table(command)}
    for command in (SFTConfig, RayPPOConfig):
        missing = [name for flat, names in renames(command).items() if flat not in known for name in names]
        assert missing and {*missing}.isdisjoint(Dialect(flag_table(command)).flat)


def test_the_page_on_migration_lists_what_is_not_here():
    page = (Path(__file__).parents[2] / "docs/migration/openrlhf.md").read_text(encoding="utf-8")
    known = {name for command in COMMANDS for name in flag_table(command)}
    missing = [row for rows in ROWS.values() for row in rows.items() if LATER.get(row[0], row[0]) not in known]
    for flat, names in missing:
        assert f"`{flat}`" in page, flat
        assert all(f"`{name if flat == 'muon' else in_section(name, flat)}`" in page for name in names), flat
    assert len(missing) > 10


def test_guesses_are_names_that_the_renames_do_not_give():
    given = {name for command in (SFTConfig, RayPPOConfig) for names in renames(command).values() for name in names}
    assert {*EVERYWHERE, *SUPERVISED, *PPO} >= GUESSED and GUESSED.isdisjoint(given)


def test_the_split_of_batch_inference_has_its_own_name():
    words = ["--data.dataset", "d", "--data.dataset_split", "dev", "--model.model_name_or_path", "m"]
    words += ["--eval_task", "generate", "--output_path", "o", "--bf16"]
    assert parse(BatchInferenceConfig, words, "batch_inference")[0].data.dataset_split == "dev"


def test_dots_without_a_data_type_are_told_that_it_is_another_one(capsys):
    told = "note: weights are fp32: OpenRLHF 0.10 and later take bf16; --ds.param_dtype bf16 (or fp32) says which"
    dpo()
    assert told in capsys.readouterr().err
    for words in (["--ds.param_dtype", "bf16"], ["--ds.param_dtype", "fp32"], ["--bf16"]):
        dpo(*words)
        assert "weights are fp32" not in capsys.readouterr().err
    parse(DPOConfig, ["--pretrain", "m", "--dataset", "d"], "train_dpo")
    assert "weights are fp32" not in capsys.readouterr().err


def test_every_dotted_flag_is_a_flag_of_some_command():
    known = {name for command in COMMANDS for name in flag_table(command)}
    assert {*EVERYWHERE.values(), *SUPERVISED.values(), *PPO.values()} <= known
    assert {*TWINS} <= {*PPO.values()} and {*SWITCHES} <= {*EVERYWHERE}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_dotted_flag_takes_the_place_of_its_flat_one(command):
    table = flag_table(command)
    dialect = Dialect(table)
    assert dialect.flat
    for dotted, flat in dialect.flat.items():
        word = next(iter(SWITCHES.get(dotted, {"word": ""})))
        assert dialect.read(dotted, [word]) == (flat, ["true" if dotted in SWITCHES else "word"])
        assert "." in dotted and dotted in dialect.dotted[flat]


def test_both_spellings_of_a_command_give_one_configuration():
    flat = "--pretrain model --prompt_data rows.jsonl --reward_pretrain rm --bf16 --flash_attn --zero_stage 3"
    flat += " --init_kl_coef 0.1 --actor_num_gpus_per_node 2 --vllm_num_engines 1 --colocate_actor_ref --gamma 0.9"
    flat += " --reward_clip_range -5 5 --adam_betas 0.8 0.9 --ref_reward_offload --run_path r --wandb_run_name w"
    dotted = "--ds.param_dtype bf16 --ds.attn_implementation flash_attention_2 --ds.zero_stage 3"
    dotted += " --algo.kl.init_coef 0.1 --actor.num_gpus_per_node=2 --vllm.num_engines 1 --train.colocate_actor_ref"
    dotted += " --algo.advantage.gamma 0.9 --reward.clip_range -5 5 --actor.adam.betas 0.8 0.9"
    dotted += " --critic.adam.betas 0.8 0.9 --ref.offload --reward.offload --run_path r --logger.wandb.run_name w"
    assert parse(RayPPOConfig, flat.split(), "train_ppo_ray")[0] == ppo(*dotted.split())


def test_a_data_type_of_32_bits_and_plain_attention_switch_nothing_on(capsys):
    config = dpo("--ds.param_dtype", "fp32", "--ds.attn_implementation", "sdpa")
    assert not config.model.bf16 and not config.attention.flash_attn
    assert capsys.readouterr().err == ""


def test_a_yaml_file_may_have_the_sections_of_the_dots(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("actor:\n  num_nodes: 2\n  adam: {lr: 1.0e-6}\nds.zero_stage: 3\nref: {offload: true}\nseed: 3\n")
    config = ppo("--config", str(path), "--train.seed", "5")
    assert config.placement.actor_num_nodes == 2 and config.deepspeed.zero_stage == 3
    assert config.optim.actor_learning_rate == 1e-6 and config.reward.ref_reward_offload
    assert config.batch.seed == 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--train.batch_size", "many"], "--train.batch_size takes a whole number, got 'many'"),
        (["--train.batch_siz", "4"], "unknown flag --train.batch_siz: did you mean --train.batch_size?"),
        (["--train.async_enable"], "unknown flag --train.async_enable: "),
        (["--ds.param_dtype", "fp16"], "--ds.param_dtype takes bf16 or fp32, got fp16"),
        (["--ckpt.save_steps", "0"], "--ckpt.save_steps 0 is not a cadence"),
        (["--ds.load_in_4bit"], "--ds.load_in_4bit needs --ds.lora.rank: "),
        (["--load_in_4bit", "--run_path", "r"], "--load_in_4bit needs --ds.lora.rank: "),
    ],
)
def test_a_mistake_is_told_as_it_was_written(words, expected):
    [problem] = problems(dpo, *words)
    assert problem.startswith(expected)


def test_flat_commands_are_told_flat_names():
    flat = ["--pretrain", "m", "--dataset", "d", "--save_steps", "0"]
    [problem] = problems(lambda *words: parse(DPOConfig, [*words], "train_dpo"), *flat)
    assert problem.startswith("--save_steps 0")


def test_a_notice_is_told_as_it_was_written(capsys):
    dpo("--ds.lora.alpha", "8", "--ds.attn_implementation", "flash_attention_2")
    told = capsys.readouterr().err
    assert "note: --ds.lora.alpha has no effect here: it needs --ds.lora.rank" in told
    assert "note: --ds.attn_implementation flash_attention_2 has no effect here" in told


@pytest.mark.parametrize(
    "words",
    [["--actor.max_norm", "1", "--critic.max_norm", "2"], ["--max_norm", "1", "--critic.max_norm", "2"]],
)
def test_two_values_for_what_is_one_flag_here_are_a_mistake(words):
    [problem] = problems(ppo, *words)
    assert problem.startswith(f"{words[0]} and {words[2]} are one flag here, and have two values")
    assert ppo("--actor.max_norm", "2", "--critic.max_norm", "2").optim.max_norm == 2


def test_an_error_behind_the_flags_is_told_as_it_was_written(capsys):
    def train(config):
        raise DataError("rows.jsonl holds no column 'q': --prompt_key names it; see --run_path.")

    with pytest.raises(SystemExit) as stop:
        run(DPOConfig, train, "train_dpo", argv=DPO)
    assert stop.value.code == DataError.exit_code
    assert "--data.prompt_key names it; see --run_path." in capsys.readouterr().err
