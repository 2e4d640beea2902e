"""The ledger says which samples each step learned from, also over a resume."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from openrlhf.rollout.types import Prompt, Rollout
from openrlhf.trainer.ppo.ledger import Ledger
from tests.trainer.ppo.harness import rollout_of


def samples(version: int, *uids: str) -> list[Rollout]:
    return [replace(rollout_of(Prompt(uid, "", (1, 2)), [3]), policy_version=version) for uid in uids]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at(number: int, learned: list[Rollout] = ()) -> SimpleNamespace:
    """A loop that has taken ten prompts in each of ``number`` steps."""
    return SimpleNamespace(
        global_step=number, stream=SimpleNamespace(position=10 * number), learned=learned, dropped=[]
    )


def step(ledger: Ledger, number: int, learned: list[Rollout]) -> None:
    ledger.on_step_end(at(number, learned), {})


def test_every_sample_of_a_step_stands_there_with_the_version_of_the_weights_that_drew_it(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.on_start(at(0))
    step(ledger, 1, samples(0, "7", "7", "12", "12"))
    step(ledger, 2, [*samples(0, "3"), *samples(1, "3", "5", "5")])
    assert lines(ledger.path) == [
        {"step": 1, "taken": 10, "samples": {"7": [0, 0], "12": [0, 0]}},
        {"step": 2, "taken": 20, "samples": {"3": [0, 1], "5": [1, 1]}},
    ]


def test_a_run_that_goes_on_after_a_step_writes_the_later_ones_anew(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for number in (1, 2, 3):
        step(ledger, number, samples(number - 1, str(number)))
    again = Ledger(ledger.path)
    again.on_start(at(1))
    step(again, 2, samples(1, "2"))
    assert [line["step"] for line in lines(ledger.path)] == [1, 2]
    Ledger(ledger.path).on_start(at(0))
    assert lines(ledger.path) == []


def test_a_disk_that_refuses_is_said_once(tmp_path, caplog):
    ledger = Ledger(tmp_path / "missing" / "ledger.jsonl")
    with caplog.at_level(logging.WARNING, logger="openrlhf"):
        step(ledger, 1, samples(0, "1"))
        step(ledger, 2, samples(1, "1"))
    (said,) = caplog.messages
    assert "ledger.jsonl cannot be written" in said and "training goes on" in said
