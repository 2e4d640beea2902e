"""Where a key comes from, and what is kept out of files and child processes."""

from __future__ import annotations

import sys

import pytest

from openrlhf.config.arguments import parse, to_flat_dict
from openrlhf.config.secrets import hide_in_argv, is_secret, masked, named_key, wandb_key
from openrlhf.config.supervised import SFTConfig
from openrlhf.errors import UsageError

KEY = "0123456789abcdef"
SFT = ["--pretrain", "m", "--dataset", "d", "--output_key", "a"]
COUNTS = ["VLLM_MAX_TOKENS", "VLLM_MAX_NUM_BATCHED_TOKENS", "VLLM_MAX_TOKENS_PER_EXPERT_FP4_MOE", "MAX_NEW_TOKENS"]


def sft(*words: str) -> SFTConfig:
    return parse(SFTConfig, [*SFT, *words], "train_sft")[0]


def test_a_key_is_given_itself_in_a_file_or_not_at_all(tmp_path):
    (tmp_path / "key").write_text(f"  {KEY}\n")
    assert wandb_key(KEY) == wandb_key(str(tmp_path / "key")) == KEY
    assert wandb_key("True") == wandb_key("true") == wandb_key(None) == ""


@pytest.mark.parametrize("word", ["1", "yes", "YES", "on", "On", "TRUE", "online"])
def test_a_word_that_says_yes_is_no_key(word, capsys):
    assert wandb_key(word) == "" and masked("use_wandb", word) == word
    sft("--use_wandb", word)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("word", ["False", "0", "no", "none", "OFF", "null"])
def test_a_word_that_says_no_is_refused_as_a_key(word):
    with pytest.raises(UsageError) as caught:
        sft("--use_wandb", word)
    assert caught.value.problems == [
        f"--use_wandb {word} is no API key: leave the flag out to log without Weights & Biases"
    ]


@pytest.mark.parametrize(("written", "refused"), [("false", False), ('"False"', True)])
def test_a_configuration_file_may_say_no_but_not_as_text(written, refused, tmp_path):
    (tmp_path / "run.yaml").write_text(f"use_wandb: {written}\n")
    words = "--config", str(tmp_path / "run.yaml")
    if refused:
        with pytest.raises(UsageError, match="leave the flag out to log without Weights & Biases"):
            sft(*words)
    else:
        assert sft(*words).logging.use_wandb is None


def test_only_the_key_itself_is_masked_in_the_saved_configuration(tmp_path):
    (tmp_path / "key").write_text(KEY)
    assert to_flat_dict(sft("--use_wandb", KEY))["use_wandb"] == "***"
    assert to_flat_dict(sft("--use_wandb", "True"))["use_wandb"] == "True"
    assert to_flat_dict(sft("--use_wandb", str(tmp_path / "key")))["use_wandb"] == str(tmp_path / "key")
    assert to_flat_dict(sft())["use_wandb"] is None


def test_a_key_is_named_by_a_file_or_a_variable_and_never_repeated(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(f" {KEY}\n")
    (tmp_path / "empty").write_text("\n")
    monkeypatch.setenv("RM_KEY", KEY)
    assert named_key(str(tmp_path / "key")) == named_key("RM_KEY") == KEY and named_key(None) == ""
    monkeypatch.setenv("TWO_LINES", "a\nb")
    for where in (KEY, str(tmp_path / "empty"), "TWO_LINES", ""):
        with pytest.raises(ValueError) as caught:
            named_key(where)
        assert KEY not in str(caught.value)
    assert masked("remote_rm_key", KEY) == masked("api_key", KEY) == "***"
    assert masked("remote_rm_key", "RM_KEY") == "RM_KEY" and masked("api_key", str(tmp_path)) == "***"
    assert masked("remote_rm_key", None) is None


def test_a_name_and_password_in_an_address_are_masked():
    url = "https://me:password@host:80/reward,http://token@other"
    assert masked("remote_rm_url", url) == "https://***@host:80/reward,http://***@other"
    assert masked("dataset", "me@host") == "me@host"
    assert masked("seed", 7) == 7


def test_a_key_on_the_command_line_is_noted_once_without_the_key(tmp_path, capsys):
    sft("--use_wandb", KEY)
    text = capsys.readouterr().err
    assert text.count("note:") == 1 and "WANDB_API_KEY" in text and KEY not in text
    (tmp_path / "key").write_text(KEY)
    sft("--use_wandb", "True")
    sft("--use_wandb", str(tmp_path / "key"))
    assert capsys.readouterr().err == ""


def test_the_copy_of_the_command_line_in_the_process_is_masked(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft", "--use_wandb", KEY, f"--use_wandb={KEY}", "--seed", "1"])
    hide_in_argv(KEY)
    assert sys.argv == ["train_sft", "--use_wandb", "***", "--use_wandb=***", "--seed", "1"]
    hide_in_argv("")
    assert sys.argv[-1] == "1"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "PASSWORD",
        "my_token",
        "MAX_TOKENS_API_KEY",
        "ADMIN_TOKENS",
    ],
)
def test_names_of_secrets_are_known(name):
    assert is_secret(name)


@pytest.mark.parametrize("name", ["PATH", "TOKENIZERS_PARALLELISM", "VLLM_HOST_IP", "KEYBOARD", "MONKEY", *COUNTS])
def test_other_names_are_no_secrets(name):
    assert not is_secret(name)
