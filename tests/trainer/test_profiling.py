"""The steps that --profile_steps names are recorded, others are not."""

import gzip
import json

import pytest
import torch

from openrlhf.config.checks import profiled_steps
from openrlhf.config.groups import LoggingConfig
from openrlhf.trainer.profiling import Profiling, Recorder


class Run:
    """As much of a loop as a callback sees; every step multiplies matrices of its own size."""

    def __init__(self, callback, first=0):
        self.callback, self.global_step = callback, first

    def go(self, steps):
        self.callback.on_start(self)
        for _ in range(steps):
            torch.ones(self.global_step + 10, 2) @ torch.ones(2, 3)
            self.global_step += 1
            self.callback.on_step_end(self, {})
        self.callback.on_end(self)


def profiling(steps, folder, said):
    recorder = Recorder()

    def start():
        recorder.start()

    return Profiling(steps, start, lambda path: recorder.stop(path, "rank0"), folder, said.append)


def products(folder):
    """Return how many matrix products the trace holds."""
    events = json.loads(gzip.decompress((folder / "trace.rank0.json.gz").read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


@pytest.mark.parametrize(
    ("steps", "first", "recorded", "named"),
    [("3-5", 0, 3, "3-5"), ("1", 0, 1, "1-1"), ("1-3", 2, 1, "3-3"), ("6-9", 0, 2, "6-7")],
)
def test_the_steps_asked_for_are_recorded_or_those_of_them_that_the_run_gets_to(
    tmp_path, steps, first, recorded, named
):
    said = []
    Run(profiling(steps, tmp_path, said), first).go(7 - first)
    assert products(tmp_path) == recorded
    assert len(said) == 1 and f"trace of steps {named} " in said[0]
    assert "aten::mm" in (tmp_path / "profile.rank0.txt").read_text()


@pytest.mark.parametrize("steps", [None, "8-9"])
def test_without_the_flag_or_the_steps_nothing_is_written(tmp_path, steps):
    said = []
    Run(profiling(steps, tmp_path, said)).go(4)
    assert not said and not list(tmp_path.iterdir())


def test_of_several_recorders_in_one_process_the_first_records_for_all(tmp_path):
    first, second = Recorder(), Recorder()
    for again in ("1", "2"):
        first.start()
        second.start()
        torch.ones(2, 2) @ torch.ones(2, 3)
        first.stop(tmp_path, f"first{again}")
        second.stop(tmp_path, f"second{again}")
    assert {path.name for path in tmp_path.glob("trace.*")} == {"trace.first1.json.gz", "trace.first2.json.gz"}


@pytest.mark.parametrize("text", ["0-3", "5-3", "a", "3-", "-3", "3-5-7", "1.5"])
def test_what_is_no_range_of_steps_is_an_error_that_shows_one(text):
    (problem,) = LoggingConfig(profile_steps=text).problems()
    assert f"--profile_steps {text} " in problem and "3-5" in problem
    assert profiled_steps("4") == (4, 4)


def test_a_trace_that_cannot_be_written_is_told_and_does_not_end_the_run(tmp_path):
    said = []
    run = Run(profiling("1", tmp_path / "missing", said))
    run.go(3)
    assert run.global_step == 3
    assert len(said) == 1 and said[0].startswith("no trace of steps 1-1: ") and "training goes on" in said[0]
