"""What only an optimizer step needs, in host memory while others use the device: fp32 weights, Adam's moments."""

from __future__ import annotations

from typing import Any


def rest(engine: Any) -> None:
    """Move those states of a DeepSpeed ``engine`` of ZeRO stage 1 to 3 to host memory; forwards work on."""
    from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as States
    from deepspeed.runtime.zero.offload_states import offload_optimizer_states

    if engine.zero_optimization_stage() < 3:
        engine.offload_states(include=[States.hp_params, States.optim_states], pin_memory=False)
        return
    # For these two DeepSpeed insists on an Adam of its own in stage 3; they are moved the same way.
    _move_weights(engine.optimizer, "cpu")
    offload_optimizer_states(engine.optimizer.optimizer, "cpu")
    engine.offload_states(include=[States.lp_grads, States.contiguous_grad_buffer], pin_memory=False)


def resume(engine: Any) -> None:
    """Undo :func:`rest`; does nothing where it was not called."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.zero.offload_states import reload_optimizer_states

    if engine.zero_optimization_stage() == 3:
        device = get_accelerator().current_device_name()
        _move_weights(engine.optimizer, device)
        reload_optimizer_states(engine.optimizer.optimizer, device)
    engine.reload_states()


def _move_weights(optimizer: Any, device: str) -> None:
    for flat in optimizer.fp32_partitioned_groups_flat:
        flat.data = flat.data.to(device)
