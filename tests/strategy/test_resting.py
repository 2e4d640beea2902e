"""States of the optimizer that go to main memory between updates come back as they were."""

import pytest
import torch

from tests.strategy import programs


def trained(stage: int, bf16: bool, rests: bool) -> dict[str, torch.Tensor]:
    """Return the weights after three steps, between which the states may have been away."""
    strategy = programs.strategy_of(zero_stage=stage, bf16=bf16)
    engine = programs.engine_of(strategy)
    for step in range(3):
        if rests:
            engine.rest()
            engine.rest()  # twice is as good as once
            engine.module(programs.rows(step)[0])  # forwards need none of it
            engine.resume()
        programs.run_step(engine, strategy, step, 2)
    return programs.weights(engine)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_training_goes_on_bit_for_bit(stage, bf16):
    expected, found = (trained(stage, bf16, rests) for rests in (False, True))
    assert expected and all(torch.equal(weight, found[name]) for name, weight in expected.items())
