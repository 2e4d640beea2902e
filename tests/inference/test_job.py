"""A job that was interrupted goes on: what its rows depend on, and what they do not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from openrlhf.config.arguments import parse
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.inference.job import SPEED, Voice, job_key, run_job


@dataclass(frozen=True)
class Row:
    uid: str
    text: str


ROWS = [Row(str(number), f"row {number}") for number in range(7)]


class Shouting:
    """A task that answers in capitals and has no memory for more than ``most`` rows."""

    def __init__(self, most: int):
        self.rows, self.most = ROWS, most
        self.worked: list[str] = []

    def work(self, rows):
        if len(self.worked) + len(rows) > self.most:
            raise MemoryError
        self.worked += [row.uid for row in rows]
        return [row.text.upper() for row in rows]

    def lines(self, results):
        return [{"input": row.text, "output": result} for row, result in zip(ROWS, results, strict=True)]

    def summary(self, results):
        return f"{len(results)} rows"


def configured(output: Path, **flags) -> BatchInferenceConfig:
    words = {"eval_task": "generate", "pretrain": output.parent, "dataset": "d", "output_path": output, **flags}
    given = [word for name, value in words.items() for word in (f"--{name}", str(value)) if value is not None]
    return parse(BatchInferenceConfig, given, "batch_inference")[0]


def do(config: BatchInferenceConfig, task: Shouting) -> list[str]:
    said: list[str] = []
    run_job(config, task, Voice(said.append, lambda line: None), lambda: None)
    return said


def test_after_running_out_of_memory_a_smaller_batch_goes_on_behind_the_finished_rows(tmp_path):
    with pytest.raises(MemoryError):
        do(configured(tmp_path / "out.jsonl", window_size=2, micro_batch_size=16), Shouting(most=5))
    task = Shouting(most=7)
    said = do(configured(tmp_path / "out.jsonl", window_size=3, micro_batch_size=4), task)
    assert task.worked == ["4", "5", "6"]
    assert said[0].startswith("going on behind the 4 rows")
    assert "--micro_batch_size 16, --window_size 2: what comes now may differ by rounding, no more" in said[1]
    do(configured(tmp_path / "whole.jsonl"), Shouting(most=7))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_key_changes_with_what_an_answer_depends_on_and_not_with_what_makes_it_faster(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    output = tmp_path / "out.jsonl"
    key = job_key(configured(output), ROWS)
    faster = {"micro_batch_size": 2, "max_num_seqs": 8, "tp_size": 2, "zero_stage": 3, "window_size": 5}
    assert {*faster, "enable_prefix_caching"} == {*SPEED}
    assert job_key(configured(tmp_path / "other.jsonl", **faster, enable_prefix_caching=True), ROWS) == key
    others = [{"seed": 1}, {"temperature": 0.5}, {"max_new_tokens": 3}, {"best_of_n": 2}, {"iter": 1}]
    keys = {job_key(configured(output, **flags), ROWS) for flags in others} | {job_key(configured(output), ROWS[:6])}
    (tmp_path / "config.json").write_text("{ }")
    keys.add(job_key(configured(output), ROWS))
    assert len(keys - {key}) == len(others) + 2
