"""The optimizer and the learning-rate schedule of a trained module: AdamW without decay on norms and biases."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch
from torch import nn

from openrlhf.config.groups import OptimConfig
from openrlhf.errors import InfraError

LOG = logging.getLogger(__name__)
NO_DECAY = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")
SCHEDULES_WITH_FLOOR = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
FLOOR = 0.1
# Any step number that no run reaches: see `_forget_beta_powers`.
UNREACHED_STEP = 2**30
COMPILE_S = 900.0
"""Longer than a busy machine needs to compile DeepSpeed's CPU Adam."""
LOOK_EVERY_S = 0.2


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Split the trainable parameters into those with ``weight_decay`` and those without (biases and norm weights)."""
    decay, no_decay = [], []
    for name, param in module.named_parameters():
        if param.requires_grad:
            (no_decay if any(part in name for part in NO_DECAY) else decay).append(param)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: OptimConfig, *, use_cpu_adam: bool = False) -> torch.optim.Optimizer:
    """Return fused AdamW, or DeepSpeed's CPU Adam, with learning rate 0: `build_schedule` sets the real one.

    DeepSpeed may step once on zero gradients while it wraps the optimizer; at rate 0 that moves nothing.
    """
    groups = parameter_groups(module, config.l2)
    if not use_cpu_adam:
        return torch.optim.AdamW(groups, lr=0.0, betas=tuple(config.adam_betas), fused=True)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer = DeepSpeedCPUAdam(groups, lr=0.0, betas=tuple(config.adam_betas), adamw_mode=True)
    optimizer.register_step_pre_hook(_forget_beta_powers)
    return optimizer


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, max_steps: int):
    """Give ``optimizer`` its learning rate and return the schedule over ``max_steps`` steps, warm-up included.

    Schedules that end above zero end at a tenth of the learning rate.
    """
    from transformers import get_scheduler

    # The polynomial schedule reads its start in the defaults.
    optimizer.defaults["lr"] = config.learning_rate
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = config.learning_rate
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=math.ceil(max_steps * config.lr_warmup_ratio),
        num_training_steps=max_steps,
        scheduler_specific_kwargs={"min_lr_rate": FLOOR} if config.lr_scheduler in SCHEDULES_WITH_FLOOR else None,
    )


def cpu_adam_is_available() -> bool:
    """Tell whether DeepSpeed's CPU Adam can be loaded; the first time it is compiled, which takes half a minute.

    Raises:
        InfraError: a process that was killed while it compiled left its lock.
    """
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        wait_for_compiler(_compiler_lock())
        DeepSpeedCPUAdam([nn.Parameter(torch.zeros(1))])
    except (RuntimeError, OSError, ImportError):
        return False
    return True


def _compiler_lock() -> Path:
    """Return the file that is there while a process compiles or loads DeepSpeed's CPU Adam."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"


def wait_for_compiler(lock: Path) -> None:
    """Wait until the file ``lock`` is gone, which torch would do for ever.

    Raises:
        InfraError: it is older than any compilation; it stays when its process is killed.
    """
    try:
        age = max(0.0, time.time() - lock.stat().st_mtime)
    except FileNotFoundError:
        return
    if age < COMPILE_S:
        LOG.info("--adam_offload: waiting for another process to compile DeepSpeed's CPU Adam (its lock: %s)", lock)
    until = time.monotonic() + COMPILE_S - age
    while lock.exists():
        if time.monotonic() >= until:
            raise InfraError(
                f"--adam_offload: {lock} has been there for more than {COMPILE_S / 60:g} minutes: a process was "
                "killed while it compiled DeepSpeed's CPU Adam. If none is compiling it now, delete that file"
            )
        time.sleep(LOOK_EVERY_S)


def _forget_beta_powers(optimizer, args, kwargs) -> None:
    """Make the next update a function of its step number alone.

    DeepSpeed's CPU Adam keeps running products of the betas in its C++ object, outside ``state_dict``, so that a
    resumed run differs in the last bit. A step number out of sequence makes it compute the powers afresh; so before
    every step one scratch element is updated with such a number.
    """
    beta1, beta2 = optimizer.param_groups[0]["betas"]
    scratch = [torch.zeros(1) for _ in range(4)]
    optimizer.ds_opt_adam.adam_update(optimizer.opt_id, UNREACHED_STEP, 0.0, beta1, beta2, 1e-8, 0.0, True, *scratch)
