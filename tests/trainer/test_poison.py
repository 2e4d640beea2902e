"""A number that is not finite, on one of two ranks, for everything that learns: it never reaches the weights."""

from __future__ import annotations

import pytest

from tests.helpers import tiny_folder
from tests.strategy.ranks import run_ranks
from tests.trainer.ppo.harness import tiny_reward_model

# Who learns, what is not finite, on which rank, ZeRO stage.
INJECTIONS = [
    ["sft", "nan loss", 0, 0],
    ["sft", "inf loss", 1, 2],
    ["sft", "nan gradient", 1, 0],
    ["sft", "inf gradient", 0, 3],
    ["rm", "nan loss", 1, 2],
    ["rm", "nan gradient", 0, 0],
    ["policy", "nan loss", 0, 0],
    ["policy", "nan gradient", 1, 2],
    ["policy", "inf advantage", 1, 0],
    ["critic", "nan loss", 1, 2],
    ["critic", "return overflow", 0, 0],
    ["critic", "inf gradient", 1, 3],
]


@pytest.fixture
def models(tmp_path):
    tiny_folder(tmp_path / "policy")
    tiny_reward_model(tmp_path / "reward")
    return str(tmp_path)


def test_a_number_that_is_not_finite_stops_all_ranks_before_the_update_and_names_its_row(models):
    ranks = run_ranks("tests.trainer.poison_programs:injections", 2, folder=models, cases=INJECTIONS)
    for found in ranks:
        for case, got in zip(INJECTIONS, found, strict=True):
            told = {name: value for name, value in got.items() if isinstance(value, bool)}
            assert told == dict.fromkeys(("stopped", "names the row", "unchanged", "finite"), True), (case, got)
    assert [got["message"] for got in ranks[0]] == [got["message"] for got in ranks[1]]


def test_a_step_that_may_be_left_out_changes_nothing_on_any_rank_and_training_goes_on(models):
    ranks = run_ranks("tests.trainer.poison_programs:left_out", 2, folder=models, stages=[0, 2, 3])
    for found in ranks:
        for got in found:
            # Of four steps in two epochs the ones with the poisoned row are left out: one in each epoch.
            skipped = [step.get("skipped_steps", 0.0) for step in got["steps"]]
            assert len(skipped) == 4 and sum(skipped) == 2.0, got["message"]
            assert not got["stopped"] and got["finite"]
            assert all(("loss_mean" in step) == (not out) for step, out in zip(got["steps"], skipped, strict=True))
    assert ranks[0][0]["steps"][0]["gpt_loss"] == ranks[1][0]["steps"][0]["gpt_loss"]
