"""The quicker step over bf16 weights does what DeepSpeed's own does."""

import pytest
import torch

from openrlhf.errors import UsageError
from openrlhf.strategy.master_weights import step_all_at_once
from tests.strategy import programs


def trained(max_norm: float, quick: bool) -> tuple[list[float], dict[str, torch.Tensor], list[torch.Tensor]]:
    """Return the gradient norms of three steps, the bf16 weights after them, and the fp32 masters."""
    strategy = programs.strategy_of(zero_stage=0, bf16=True, max_norm=max_norm)
    engine = programs.engine_of(strategy)
    wrapped = engine.engine.optimizer
    if not quick:
        del wrapped.step
    norms = [programs.run_step(engine, strategy, step, 2).grad_norm for step in range(3)]
    return norms, programs.weights(engine), [master for group in wrapped.fp32_groups for master in group]


@pytest.mark.parametrize("max_norm", [0.0, 0.05, 100.0], ids=["no clipping", "clipped", "not clipped"])
def test_norms_and_weights_are_those_of_deepspeeds_own_step(max_norm):
    norms, weights, masters = trained(max_norm, quick=True)
    expected_norms, expected_weights, expected_masters = trained(max_norm, quick=False)
    assert norms == pytest.approx(expected_norms, rel=1e-5)
    torch.testing.assert_close(masters, expected_masters, rtol=1e-5, atol=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name])


def test_another_optimizer_of_deepspeed_keeps_its_own_step():
    engine = programs.engine_of(programs.strategy_of(zero_stage=1, bf16=True))
    wrapped = engine.engine.optimizer
    with pytest.raises(UsageError, match=rf"zero_stage 0: .* with its {type(wrapped).__name__}, .*stage 1"):
        step_all_at_once(wrapped)
    assert wrapped.step.__func__ is type(wrapped).step
