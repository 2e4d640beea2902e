"""DeepSpeed's configuration as plain dictionaries; nothing here imports DeepSpeed or torch."""

from __future__ import annotations

from typing import Any

from openrlhf.config.groups import DeepSpeedConfig


def train_config(
    config: DeepSpeedConfig,
    *,
    bf16: bool,
    max_norm: float,
    micro_batch_size: int,
    world_size: int,
    offload: bool = False,
    param_persistence_threshold: int | None = None,
) -> dict[str, Any]:
    """Return the configuration of a trained model.

    Gradients accumulate until the caller steps, so the batch sizes only have to be consistent: DeepSpeed never divides
    by them. ``max_norm`` 0 switches clipping off (DeepSpeed's own default is 1). ``offload`` keeps the optimizer in
    host memory. ``param_persistence_threshold`` is the size in elements under which ZeRO-3 does not shard a parameter.
    """
    overlap = config.overlap_comm and config.zero_stage >= 2
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "offload_param": {"device": "none"},
        "offload_optimizer": {"device": "cpu", "pin_memory": True} if offload else {"device": "none"},
        "zero_hpz_partition_size": config.zpg if config.zero_stage == 3 else 1,
        "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
        # Left to DeepSpeed, stage 3 overlaps by default; unmanaged accumulation forbids it below stage 2.
        "overlap_comm": overlap,
    }
    if overlap:
        zero["contiguous_gradients"] = True
    if config.zero_stage == 3:
        zero["reduce_scatter"] = True
    return {
        **_common(micro_batch_size, world_size, bf16),
        "zero_optimization": _with_threshold(zero, param_persistence_threshold),
        "gradient_clipping": max_norm,
        "managed_gradient_accumulation": False,
        "zero_force_ds_cpu_optimizer": False,
        "prescale_gradients": False,
        "data_types": {"grad_accum_dtype": config.grad_accum_dtype},
    }


def eval_config(
    config: DeepSpeedConfig,
    *,
    bf16: bool,
    micro_batch_size: int,
    world_size: int,
    offload: bool = False,
    param_persistence_threshold: int | None = None,
) -> dict[str, Any]:
    """Return the configuration of a model that is only read: stage 3 where training shards weights, else 0.

    ``offload`` keeps the shards in host memory; without stage 3 there are no shards and it has no effect.
    """
    stage = 3 if config.zero_stage == 3 else 0
    zero = {"stage": stage, "offload_param": {"device": "cpu", "pin_memory": True} if offload else {"device": "none"}}
    return {
        **_common(micro_batch_size, world_size, bf16),
        "zero_optimization": _with_threshold(zero, param_persistence_threshold),
    }


def _common(micro_batch_size: int, world_size: int, bf16: bool) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "train_batch_size": micro_batch_size * world_size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "bf16": {"enabled": bf16},
    }


def _with_threshold(zero: dict[str, Any], threshold: int | None) -> dict[str, Any]:
    if zero["stage"] == 3 and threshold is not None:
        zero["stage3_param_persistence_threshold"] = threshold
    return zero
