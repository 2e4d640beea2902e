"""The cadence of what happens between steps, on a loop that only counts."""

import io
import json
from collections import Counter

import pytest

from openrlhf.trainer.callbacks import Evaluation, MetricLogging, ProgressLine, due, format_seconds
from openrlhf.trainer.console import Console
from openrlhf.trainer.loggers import JsonlLogger, Logger
from openrlhf.trainer.metrics import Mean, MeanWindow


class CountingLoop:
    """Ten steps over two epochs, with what a callback may look at."""

    max_steps, max_epochs, steps_per_epoch = 10, 2, 5

    def __init__(self, *callbacks, eval_rows=1):
        self.callbacks, self.global_step, self.evaluated = callbacks, 0, []
        self.eval_data = [0] * eval_rows
        self.window = MeanWindow({"loss": "loss_mean"})

    @property
    def epoch(self):
        return (self.global_step - 1) // self.steps_per_epoch + 1

    @property
    def epoch_ended(self):
        return self.global_step % self.steps_per_epoch == 0

    def run(self):
        for callback in self.callbacks:
            callback.on_start(self)
        for step in range(1, self.max_steps + 1):
            self.global_step = step
            metrics = {"loss": float(self.global_step), **self.window.add({"loss": Mean(self.global_step, 1)})}
            for callback in self.callbacks:
                callback.on_step_end(self, metrics)
        for callback in self.callbacks:
            callback.on_end(self)
        return self

    def evaluate(self):
        self.evaluated.append(self.global_step)
        for callback in self.callbacks:
            callback.on_evaluate(self, {"eval_loss": 1.0})


class ListLogger(Logger):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def _write(self, phase, step, epoch, values):
        self.rows.append((phase, step, dict(values)))


@pytest.mark.parametrize(("every", "steps"), [(1, [1, 2, 3, 4]), (2, [2, 4]), (3, [3]), (-1, []), (0, [])])
def test_due_means_every_so_many_steps_and_minus_one_never(every, steps):
    assert [step for step in range(1, 5) if due(step, every)] == steps


@pytest.mark.parametrize(("eval_steps", "steps"), [(-1, [5, 10]), (4, [4, 8, 10]), (5, [5, 10]), (100, [10])])
def test_evaluation_comes_at_its_cadence_and_after_the_last_step(eval_steps, steps):
    assert CountingLoop(Evaluation(eval_steps)).run().evaluated == steps


def test_without_rows_there_is_no_evaluation():
    assert CountingLoop(Evaluation(1), eval_rows=0).run().evaluated == []


def test_the_journal_takes_every_step_and_the_others_every_few(tmp_path):
    other = ListLogger()
    CountingLoop(MetricLogging(JsonlLogger(tmp_path / "m.jsonl"), [other], 4), Evaluation(-1)).run()
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["phase"] == "train"] == list(range(1, 11))
    assert Counter(row["phase"] for row in rows) == {"train": 10, "eval": 2}
    assert [(phase, step) for phase, step, _ in other.rows] == [("train", 4), ("eval", 5), ("train", 8), ("eval", 10)]


def test_the_window_mean_covers_the_steps_since_the_last_log_line():
    other = ListLogger()
    CountingLoop(MetricLogging(None, [other], 4)).run()
    assert [values["loss_mean"] for _, _, values in other.rows] == [2.5, 6.5]


def test_the_progress_line_shows_step_figures_and_time_left():
    stream = io.StringIO()
    CountingLoop(ProgressLine(Console(stream), ["loss"])).run()
    first, *_, last = stream.getvalue().splitlines()
    assert first.startswith("step 1/10  epoch 1/2  loss 1  ")
    assert last.startswith("step 10/10  epoch 2/2  loss 10  ")
    assert last.endswith("0s left")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (3720, "1h02m")])
def test_times_are_short(seconds, text):
    assert format_seconds(seconds) == text
