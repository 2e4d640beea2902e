"""However a step is packed, cut into micro-batches, dealt to ranks or sharded: it applies the gradient of the formula.

The full tier runs all 48 ways for each loss.
"""

from __future__ import annotations

import pytest

from tests.helpers import tiny_folder
from tests.strategy.ranks import run_ranks
from tests.trainer.gradient_adapters import write_models
from tests.trainer.gradient_programs import LOSSES, differences, every_case, ring_cases
from tests.trainer.ppo.harness import tiny_reward_model

TOLERANCE = 1e-5
DIAGONAL = [
    ["sft", True, 0, 2],
    ["sft", False, 3, 4],
    ["rm", True, 2, 1],
    ["rm", False, 0, 4],
    ["dpo", True, 2, 2],
    ["dpo", False, 3, 1],
    ["simpo", True, 0, 4],
    ["kto_pair", True, 2, 2],
    ["kto", True, 1, 2],
    ["kto", False, 3, 4],
    ["kd", True, 3, 1],
    ["kd", False, 1, 4],
    ["prm", True, 3, 2],
    ["prm", False, 0, 1],
    ["policy", True, 3, 2],
    ["policy", False, 1, 1],
    ["ptx", True, 3, 4],
    ["ptx", False, 2, 1],
    ["dual", True, 3, 1],
    ["dual", False, 0, 4],
    ["gspo", True, 2, 2],
    ["gspo", False, 3, 4],
    ["cispo", True, 1, 1],
    ["cispo", False, 2, 2],
    ["value", True, 1, 4],
    ["value", False, 2, 2],
]
ADAPTERS = [["sft_lora", True, 2, 4], ["dpo_lora", False, 3, 2], ["kto_lora", True, 0, 2]]
RINGS = [
    ["sft", True, 2, 2],
    ["rm", True, 3, 1],
    ["dpo", True, 3, 2],
    ["kto", True, 1, 4],
    ["kto_lora", True, 1, 4],
    ["kd", True, 3, 1],
    ["prm", True, 2, 2],
    ["ptx", True, 2, 2],
    ["gspo", True, 3, 1],
    ["value", True, 3, 2],
]


def check(folder, ranks: int, cases: list[list], timeout: float = 240, **how: int) -> float:
    """Compare the gradients of the cases on so many ranks with plain torch; return the largest difference.

    ``how`` names the size of the rings, and a budget of tokens.
    """
    tiny_folder(folder / "policy")
    tiny_folder(folder / "frozen", seed=1)
    tiny_reward_model(folder / "reward")
    write_models(folder)
    if ranks == 1:
        results = [differences(str(folder), cases, **how)]
    else:
        program = "tests.trainer.gradient_programs:differences"
        results = run_ranks(program, ranks, timeout=timeout, folder=str(folder), cases=cases, **how)
    wrong = [
        f"{case} on {ranks} ranks {how}: {name} is off by {off:.1e}"
        for found in results
        for case, (name, off) in zip(cases, found, strict=True)
        if not off <= TOLERANCE
    ]
    assert not wrong, "\n".join(wrong)
    return max(off for found in results for _, off in found)


@pytest.mark.parametrize(("ranks", "packed"), [(1, True), (2, False)])
def test_the_gradient_of_every_loss_is_that_of_plain_torch(tmp_path, ranks, packed):
    check(tmp_path, ranks, [case for case in DIAGONAL if case[1] == packed])


def test_the_gradient_of_adapters_is_that_of_plain_torch(tmp_path):
    check(tmp_path, 1, ADAPTERS)


@pytest.mark.full
def test_the_gradient_of_adapters_is_that_of_plain_torch_on_two_ranks(tmp_path):
    check(
        tmp_path,
        2,
        [[case[0], packed, stage, 2] for case in ADAPTERS for packed in (True, False) for stage in (0, 2, 3)],
    )


def test_ranks_that_share_sequences_give_the_gradient_of_plain_torch(tmp_path):
    check(tmp_path, 2, RINGS, ring=2)


def test_a_budget_of_tokens_gives_the_gradient_of_plain_torch(tmp_path):
    check(tmp_path, 1, [[loss, True, 0, 1] for loss in LOSSES], budget=20)


@pytest.mark.full
@pytest.mark.timeout(1700)
@pytest.mark.parametrize(("ranks", "ring"), [(2, 2), (4, 4), (4, 2)])
def test_every_stage_and_micro_batch_gives_the_gradient_of_plain_torch_in_a_ring(tmp_path, ranks, ring):
    largest = check(tmp_path, ranks, ring_cases(), timeout=1500, ring=ring)
    print(f"{len(ring_cases())} cases on {ranks} ranks in rings of {ring}: the largest difference is {largest:.1e}")


@pytest.mark.full
@pytest.mark.timeout(1700)
@pytest.mark.parametrize(("ranks", "ring"), [(2, 1), (2, 2), (4, 2)])
def test_a_budget_of_tokens_gives_the_gradient_of_plain_torch_on_ranks_and_in_rings(tmp_path, ranks, ring):
    cases = [[loss, True, stage, 1] for loss in LOSSES for stage in (2, 3)]
    for budget in (1, 20, 1000):
        check(tmp_path, ranks, cases, ring=ring, budget=budget)


@pytest.mark.full
@pytest.mark.timeout(1700)
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_packing_micro_batch_and_stage_gives_the_gradient_of_plain_torch(tmp_path, ranks):
    cases = every_case()
    assert len(cases) == len(LOSSES) * 48 / 2
    largest = check(tmp_path, ranks, cases, timeout=1500)
    print(f"{len(cases)} cases on {ranks} ranks: the largest difference is {largest:.1e}")
