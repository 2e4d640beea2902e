"""What the checkpoints of a run will take on the disk, known before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openrlhf.config.groups import CheckpointConfig
from openrlhf.strategy.disk import GIB, free_bytes, in_words
from openrlhf.strategy.retention import kept_steps

# Adam's two moments and the fp32 weights that DeepSpeed keeps for them.
MOMENTS, MASTER = 8, 4


def checkpoint_bytes(engine: Any) -> tuple[int, int]:
    """Return the bytes of one checkpoint of a `TrainEngine` over all ranks, and of one export of its weights.

    Both hold what is trained: an export of a model with adapters is these alone.
    """
    sizes = [
        (getattr(param, "ds_numel", param.numel()), param.element_size())
        for param in engine.module.parameters()
        if param.requires_grad
    ]
    stage = engine.strategy.config.zero_stage
    weights = sum(count * width for count, width in sizes)
    trained = sum(count for count, _ in sizes)
    # Stage 3 writes the weights once, as the optimizer's fp32 ones.
    written = weights if stage < 3 else 0
    plain = stage == 0 and not engine.strategy.bf16
    return written + trained * (MOMENTS if plain else MOMENTS + MASTER), weights


def shortage(root: Path, config: CheckpointConfig, step_bytes: int, saves: int, scored: bool) -> str | None:
    """Return why the disk of ``root`` cannot take ``saves`` more steps of ``step_bytes`` each, or None.

    Older steps make room as they are pruned: the most on the disk is what is kept and one being written. ``scored``
    says that steps will be evaluated, so that the best one is kept too.
    """
    there = kept_steps(root)
    kept = max(config.max_ckpt_num, 2 if scored else 1)
    copies = min(kept + 1, saves + len(there))
    needed = min(copies * step_bytes, config.max_ckpt_mem * GIB + step_bytes)
    free = free_bytes(root) + sum(step.size for step in there.values())
    if saves < 1 or needed <= free:
        return None
    return (
        f"the checkpoints in {root} will need {in_words(needed)} = {copies} x {in_words(step_bytes)} (at most {kept} "
        f"kept and one being written), and {in_words(free)} are free: make room, lower --max_ckpt_num "
        f"{config.max_ckpt_num}, or give --ckpt_path on another disk"
    )
