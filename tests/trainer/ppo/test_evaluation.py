"""How well the reward agrees with the true score."""

import json

import pytest

from openrlhf.trainer.ppo.evaluation import SampleLog, pair_accuracy


@pytest.mark.parametrize(
    ("scores", "true_scores", "expected"),
    [
        ([3.0, 1.0, 2.0], [1.0, 0.0, 0.0], 1.0),
        ([1.5, 1.0, 2.0], [1.0, 0.0, 0.0], 0.5),
        ([1.0, 1.0], [1.0, 0.0], 0.5),
        ([0.0, 1.0, 2.0], [1.0, 0.5, 0.0], 0.0),
    ],
)
def test_pair_accuracy_counts_the_pairs_in_the_right_order(scores, true_scores, expected):
    assert pair_accuracy(scores, true_scores) == expected


@pytest.mark.parametrize(("resumed_at", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2])])
def test_the_samples_of_an_interrupted_run_do_not_come_twice(tmp_path, resumed_at, kept):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(3)) + '{"step": 1, "wh')
    SampleLog(path, None).start(resumed_at)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept


def test_pair_accuracy_says_nothing_when_all_answers_are_alike():
    assert pair_accuracy([1.0, 2.0], [1.0, 1.0]) is None


def test_a_disk_that_refuses_the_samples_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    log = SampleLog(tmp_path / "missing" / "samples.jsonl", None)
    log.start(0)
    for step in (1, 2):
        log.write("train", step, [], [], None, 4, 1.0)
    assert log.failures == 3
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{log.path} cannot be written"]
