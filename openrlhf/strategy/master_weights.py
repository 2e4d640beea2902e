"""The optimizer step of bf16 weights with fp32 master weights, over all weights at once instead of one by one."""

from __future__ import annotations

import math
import types
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.errors import UsageError


def step_all_at_once(optimizer: Any) -> None:
    """Give DeepSpeed's ``FP16_UnfusedOptimizer``, which wraps ours at ZeRO stage 0, a quicker ``step``.

    Its own reads every gradient three times (smallest and largest value, norm) and waits for an answer at each weight.
    The update is the same: gradients in fp32, clipped by their common norm; none of them, and no update, if that is
    not finite.

    Raises:
        UsageError: it is another optimizer, whose weights would not be where this step looks for them.
    """
    import deepspeed
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        raise UsageError(
            f"--bf16 with --zero_stage 0: DeepSpeed {deepspeed.__version__} updates the weights with its "
            f"{type(optimizer).__name__}, which is not known here; use --zero_stage 1, or DeepSpeed 0.19"
        )
    optimizer.step = types.MethodType(_step, optimizer)


def _step(self: Any, closure: None = None) -> bool:
    """Update the master weights and copy them to the bf16 weights; return whether the step was refused."""
    weights = [weight for group in self.fp16_groups for weight in group]
    masters = [master for group in self.fp32_groups for master in group]
    gradients = [_in_fp32(weight) for weight in weights]
    norm = nn.utils.get_total_norm(gradients)
    self._global_grad_norm = norm.item()
    self.overflow = not math.isfinite(self._global_grad_norm)
    if self.overflow:
        return self._skip_invalid_grad_norm()
    if self.clip_grad > 0 and self._global_grad_norm > self.clip_grad:
        torch._foreach_mul_(gradients, self.clip_grad / (self._global_grad_norm + 1e-6))
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient
    self.optimizer.step()
    for master in masters:
        master.grad = None
    torch._foreach_copy_([weight.data for weight in weights], [master.data for master in masters])
    return False


def _in_fp32(weight: nn.Parameter) -> Tensor:
    """Return the gradient of ``weight``, zeros where it has none."""
    return torch.zeros_like(weight, dtype=torch.float32) if weight.grad is None else weight.grad.float()
