"""Metrics reach their files, and a logger that fails costs a line, not the run."""

import json
import logging
import math
import sys

import pytest

from openrlhf.config.groups import LoggingConfig
from openrlhf.trainer.loggers import JsonlLogger, TensorboardLogger, WandbLogger, build_loggers, rewind


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_step_is_one_line_with_step_epoch_and_phase(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0)
    logger.log("train", 1, 1, {"gpt_loss": 2.5, "lr": 1e-4})
    logger.log("eval", 1, 1, {"eval gpt_loss": 2.0})
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "epoch": 1, "phase": "train", "gpt_loss": 2.5, "lr": 1e-4},
        {"step": 1, "epoch": 1, "phase": "eval", "eval gpt_loss": 2.0},
    ]
    assert logger.failures == 0


def test_a_value_that_is_not_finite_is_null(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0)
    logger.log("train", 1, 1, {"a": math.nan, "b": math.inf})
    logger.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "epoch": 1, "phase": "train", "a": None, "b": None}]


def test_going_on_after_a_step_drops_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "phase": "train"}) + "\n" for step in (1, 2, 3))
    path.write_text(whole + '{"step": 2, "ph')
    logger = JsonlLogger(path)
    logger.start(2)
    logger.log("train", 3, 1, {"x": 1.0})
    logger.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert lines(path)[-1]["x"] == 1.0


def test_a_run_that_begins_again_holds_one_first_evaluation(tmp_path):
    for _ in range(2):
        logger = JsonlLogger(tmp_path / "metrics.jsonl")
        logger.start(0)
        logger.log("eval", 0, 1, {"reward": 1.0})
        logger.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [0]


def test_a_journal_that_cannot_be_written_is_said_once_and_counted(tmp_path, caplog):
    logger = JsonlLogger(tmp_path / "missing folder" / "metrics.jsonl")
    with caplog.at_level(logging.WARNING, logger="openrlhf"):
        logger.start(0)
        logger.log("train", 1, 1, {"x": 1.0})
        logger.log("train", 2, 1, {"x": 1.0})
        logger.close()
    assert logger.failures == 3
    assert [record.getMessage().split()[1] for record in caplog.records] == ["failed", "3"]


def test_tensorboard_gets_train_and_eval_scalars_under_the_run_name(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    [logger] = build_loggers(LoggingConfig(use_tensorboard=str(tmp_path), wandb_run_name="sft_x"), {}, tmp_path)
    assert isinstance(logger, TensorboardLogger)
    logger.start(0)
    logger.log("train", 1, 1, {"gpt_loss": 2.5})
    logger.log("eval", 1, 1, {"eval gpt_loss": 2.0})
    logger.close()
    events = EventAccumulator(str(tmp_path / "sft_x")).Reload()
    assert set(events.Tags()["scalars"]) == {"train/gpt_loss", "eval/eval gpt_loss"}
    assert events.Scalars("train/gpt_loss")[0].step == 1


def test_wandb_works_offline_and_goes_before_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setattr(sys, "argv", ["train_sft", "--use_wandb", "k" * 40, "--seed", "1"])
    config = LoggingConfig(use_wandb="k" * 40, use_tensorboard=str(tmp_path), wandb_project="p", wandb_run_name="r")
    [logger] = build_loggers(config, {"use_wandb": "***", "seed": 1}, tmp_path)
    assert isinstance(logger, WandbLogger)
    logger.start(0)
    logger.log("train", 1, 1, {"gpt_loss": 2.5})
    logger.close()
    assert logger.failures == 0
    # wandb's own process may write the file a little after the run was finished.
    sys.modules["wandb"].teardown()
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"gpt_loss" in written
    assert b"k" * 40 not in written


@pytest.mark.parametrize("key", ["not-a-key", pytest.param("k" * 40, marks=pytest.mark.full)])
def test_a_wrong_key_or_no_network_means_logging_offline_said_once_without_the_key(key, tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    [logger] = build_loggers(LoggingConfig(use_wandb=key, wandb_run_name="r"), {}, tmp_path)
    with caplog.at_level(logging.WARNING, logger="openrlhf"):
        logger.start(0)
        logger.log("train", 1, 1, {"gpt_loss": 2.5})
        logger.close()
    assert logger.failures == 0
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("openrlhf")]
    assert "logging offline" in said and key not in said
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.fixture(autouse=True)
def no_wandb_session():
    """Keep what wandb remembers of one test out of the next."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


@pytest.mark.parametrize("flags", [{}, {"use_wandb": None, "use_tensorboard": None}])
def test_without_flags_there_are_no_other_loggers(flags, tmp_path):
    assert build_loggers(LoggingConfig(**flags), {}, tmp_path) == []


def test_a_rewound_journal_keeps_lines_whose_text_holds_other_line_separators(tmp_path):
    path = tmp_path / "samples.jsonl"
    rows = [{"step": step, "text": f"a{separator}b"} for step, separator in enumerate("\u2028\u2029\x85\u000b", 1)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    rewind(path, 3)
    kept = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in kept if line] == rows[:3]
