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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What became of everything on each of two ranks."""
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder / "policy")
    tiny_reward_model(folder / "reward")
    program = "tests.trainer.poison_programs:poison"
    return run_ranks(program, 2, folder=str(folder), cases=INJECTIONS, stages=[0, 2, 3])


def test_a_number_that_is_not_finite_stops_all_ranks_before_the_update_and_names_its_row(ranks):
    for rank in ranks:
        for case, got in zip(INJECTIONS, rank["stopped"], strict=True):
            told = {name: value for name, value in got.items() if isinstance(value, bool)}
            assert told == dict.fromkeys(("stopped", "names the row", "unchanged", "finite"), True), (case, got)
    first, second = ([got["message"] for got in rank["stopped"]] for rank in ranks)
    assert first == second


def test_a_step_that_may_be_left_out_changes_nothing_on_any_rank_and_training_goes_on(ranks):
    for rank in ranks:
        for got in rank["left out"]:
            # Two epochs of two steps: the one with the poisoned row is left out in each.
            skipped = [step.get("skipped_steps", 0.0) for step in got["steps"]]
            assert len(skipped) == 4 and sum(skipped) == 2.0, got["message"]
            assert not got["stopped"] and got["finite"]
            assert all(("gpt_loss" in step) == (not out) for step, out in zip(got["steps"], skipped, strict=True))
    losses = [[step.get("gpt_loss") for step in got["steps"]] for rank in ranks for got in rank["left out"]]
    assert losses[:3] == losses[3:]
