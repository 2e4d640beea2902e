"""Reading flags: what a command line and a YAML file become."""

from __future__ import annotations

import dataclasses
import pickle
import re

import pytest

from openrlhf.config.arguments import parse, to_flat_dict
from openrlhf.config.flags import flag, flag_table
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.supervised import RewardModelConfig, SFTConfig
from openrlhf.errors import UsageError

SFT = ["--pretrain", "model", "--dataset", "rows.jsonl", "--output_key", "answer"]
RM = ["--pretrain", "model", "--dataset", "rows.jsonl"]
PPO = ["--pretrain", "model", "--prompt_data", "rows.jsonl", "--reward_pretrain", "rm"]


def sft(*words):
    return parse(SFTConfig, [*SFT, *words], "train_sft")[0]


def ppo(*words):
    return parse(RayPPOConfig, [*PPO, *words], "train_ppo_ray")[0]


def test_flags_reach_their_groups():
    config = sft("--bf16", "--zero_stage", "3", "--learning_rate", "1e-4", "--adam_betas", "0.8", "0.99")
    assert config.model.bf16 and config.deepspeed.zero_stage == 3
    assert config.optim.learning_rate == 1e-4 and config.optim.adam_betas == (0.8, 0.99)


def test_without_flags_a_command_has_its_own_defaults():
    assert sft().batch.max_epochs == 2
    assert parse(RewardModelConfig, RM, "train_rm")[0].data.max_len == 512
    assert ppo().batch.micro_train_batch_size == 4


def test_negative_numbers_are_values():
    assert ppo("--reward_clip_range", "-5", "-1.5").reward.reward_clip_range == (-5.0, -1.5)
    assert sft("--save_steps", "-1", "--local_rank=-1").checkpoint.save_steps == -1


def test_a_list_takes_one_value_or_more():
    assert sft("--target_modules", "q_proj", "v_proj").lora.target_modules == ("q_proj", "v_proj")
    assert ppo("--eval_temperature", "0", "1").evaluation.eval_temperature == (0.0, 1.0)


def test_the_launchers_local_rank_is_accepted_anywhere():
    assert parse(SFTConfig, ["--local_rank=1", *SFT], "train_sft")[0].deepspeed.local_rank == 1


def test_the_last_of_two_equal_flags_wins():
    assert sft("--seed", "1", "--seed", "2").batch.seed == 2


def test_whole_numbers_may_be_written_with_an_exponent():
    assert sft("--max_samples", "1e4").data.max_samples == 10_000


def test_the_old_spelling_of_the_value_head_is_read():
    assert ppo("--value_prefix_head", "v_head").model.value_head_prefix == "v_head"


@pytest.mark.parametrize("written", ["", "no place for the prompt"])
def test_a_template_without_a_place_for_the_prompt_is_none(written):
    assert sft("--input_template", written).data.input_template is None


def test_a_template_without_a_place_for_the_prompt_is_told(capsys):
    sft("--input_template", "Human:")
    assert "note: --input_template 'Human:' has no {}" in capsys.readouterr().err


def test_an_empty_template_needs_no_words(capsys):
    sft("--input_template", "")
    assert capsys.readouterr().err == ""


def test_a_backslash_n_in_a_template_is_kept_and_told(capsys):
    assert sft("--input_template", r"User: {}\nAssistant: ").data.input_template == r"User: {}\nAssistant: "
    assert "$'...\\n...'" in capsys.readouterr().err


def test_a_real_line_break_in_a_template_is_not_told(capsys):
    assert sft("--input_template", "Q: {}\nA: ").data.input_template == "Q: {}\nA: "
    assert capsys.readouterr().err == ""


def test_the_run_is_named_after_command_and_time():
    assert re.fullmatch(r"sft_\d{4}T\d\d:\d\d", sft().logging.wandb_run_name)
    assert re.fullmatch(r"ppo_\d{4}T\d\d:\d\d", ppo().logging.wandb_run_name)
    assert sft("--wandb_run_name", "mine").logging.wandb_run_name == "mine"


def test_the_run_folder_stands_beside_the_model():
    assert sft("--save_path", "out/model/").logging.run_path == "out/model_run"
    assert sft("--run_path", "there").logging.run_path == "there"


def test_a_notice_is_printed_by_the_first_rank_only(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    ppo("--perf")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rollout_batch_size", "8"], "--train_batch_size 128 is more than the 8 answers of a rollout"),
        (["--advantage_estimator", "reinforce", "--save_value_network"], "reinforce has no critic to save"),
    ],
)
def test_what_is_odd_but_works_is_told(words, expected, capsys):
    ppo(*words)
    assert expected in capsys.readouterr().err


def test_ppo_says_who_can_convert_checkpoints():
    with pytest.raises(UsageError, match="converts checkpoints of the supervised commands only"):
        ppo("--use_ds_universal_ckpt")


def test_another_loss_name_means_log_exp_and_is_told(capsys):
    assert parse(RewardModelConfig, [*RM, "--loss", "other"], "train_rm")[0].loss == "other"
    assert "means the log-exp loss" in capsys.readouterr().err


def test_a_switch_that_is_off_is_not_told_to_have_no_effect(capsys):
    ppo("--perf=false")
    assert capsys.readouterr().err == ""


def test_dry_run_is_told_to_the_caller():
    assert parse(SFTConfig, [*SFT, "--dry_run"], "train_sft")[1] is True
    assert parse(SFTConfig, SFT, "train_sft")[1] is False


def test_help_ends_with_status_zero(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(SFTConfig, ["--bogus", "--help"], "train_sft")
    assert stop.value.code == 0
    assert "--learning_rate FLOAT" in capsys.readouterr().out


def test_a_configuration_survives_pickling():
    config = ppo("--n_samples_per_prompt", "4")
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_flat_dictionary_masks_the_key_and_reads_back():
    config = ppo("--use_wandb", "0123456789abcdef", "--n_samples_per_prompt", "4")
    flat = to_flat_dict(config)
    assert flat["use_wandb"] == "***" and flat["n_samples_per_prompt"] == 4 and flat["adam_betas"] == [0.9, 0.95]
    assert set(flat) == set(flag_table(RayPPOConfig))


def test_a_flag_declared_twice_is_a_mistake_of_ours():
    @dataclasses.dataclass(frozen=True)
    class Twice:
        batch: object = dataclasses.field(default_factory=type(sft().batch))
        seed: int = flag(1, "Again.")

    with pytest.raises(TypeError, match="--seed twice"):
        flag_table(Twice)


class TestYaml:
    def write(self, tmp_path, text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    def test_a_file_holds_the_same_names(self, tmp_path):
        text = "pretrain: model\ndataset: rows.jsonl\noutput_key: answer\nbf16: true\n"
        text += "learning_rate: 1e-5\nadam_betas: [0.9, 0.98]\n"
        config = parse(SFTConfig, ["--config", self.write(tmp_path, text)], "train_sft")[0]
        assert config.model.bf16 and config.optim.learning_rate == 1e-5 and config.optim.adam_betas == (0.9, 0.98)

    def test_the_command_line_wins(self, tmp_path):
        path = self.write(tmp_path, "seed: 1\nmax_epochs: 5\nbf16: true\n")
        config = sft("--config", path, "--seed", "2", "--bf16=false")
        assert (config.batch.seed, config.batch.max_epochs, config.model.bf16) == (2, 5, False)

    def test_null_means_none_where_none_is_a_value(self, tmp_path):
        assert sft("--config", self.write(tmp_path, "input_template: null\n")).data.input_template is None

    def test_an_empty_file_is_no_problem(self, tmp_path):
        assert sft("--config", self.write(tmp_path, "")).batch.seed == 42

    def test_false_leaves_wandb_off(self, tmp_path):
        assert sft("--config", self.write(tmp_path, "use_wandb: false\n")).logging.use_wandb is None
        assert sft("--config", self.write(tmp_path, "use_wandb: true\n")).logging.use_wandb == "True"

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("learning_rat: 1\n", "unknown flag --learning_rat in .*run.yaml: did you mean --learning_rate?"),
            ("seed: ten\n", "--seed in .*run.yaml takes a whole number, got 'ten'"),
            ("seed: null\n", "--seed in .*run.yaml needs a value"),
            ("adam_betas: 0.9\n", "--adam_betas in .*run.yaml takes 2 values, got 1: 0.9"),
            ("bf16: 3\n", "--bf16 in .*run.yaml is a switch"),
            ("- seed\n", "must hold lines of the form flag: value"),
            ("seed: [1\n", "cannot be read: while parsing"),
            ("dataset:\n  train: x\n", "--dataset in .*run.yaml holds further names: the file is flat"),
        ],
    )
    def test_a_wrong_line_is_an_error(self, tmp_path, text, expected):
        with pytest.raises(UsageError, match=expected):
            sft("--config", self.write(tmp_path, text))

    def test_a_missing_file_is_an_error(self):
        with pytest.raises(UsageError, match="--config nowhere.yaml cannot be read"):
            sft("--config", "nowhere.yaml")
