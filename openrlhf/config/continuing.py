"""Which flags a run may change when it goes on from a checkpoint, and what to say about the others.

Free are places and cadences, placement, and what changes a gradient by rounding at most. The rows of the data are
compared themselves, not the flags that choose them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from openrlhf.config.flags import flag_table

FREE_GROUPS = {"checkpoint", "logging", "evaluation", "placement", "vllm", "data", "prompts"}
FREE_FLAGS = {
    *("micro_train_batch_size", "micro_rollout_batch_size", "gradient_checkpointing"),
    *("use_dynamic_batch", "train_max_tokens_per_gpu", "rollout_max_tokens_per_gpu", "ring_head_stride"),
    *("gradient_checkpointing_use_reentrant", "flash_attn", "packing_samples", "ref_reward_offload"),
    *("ref_offload", "teacher_offload", "precompute_ref_log_probs"),
    *("zpg", "overlap_comm", "local_rank", "collective_timeout", "actor_init_on_gpu", "perf", "save_value_network"),
    *("trust_remote_code", "use_ms", "disable_fast_tokenizer", "max_skipped_steps"),
}
BINDING = {"reward_tokens"}
"""Flags of free groups that change the training all the same."""
IN_THE_LAYOUT = {"zero_stage", "bf16", "adam_offload"}
"""Flags that the layout of a checkpoint names by itself."""


def training_flags(config: Any) -> dict[str, Any]:
    """Return the flags of ``config`` that change the training, with their values as JSON gives them back."""
    kept = {
        name: entry.value(config)
        for name, entry in flag_table(type(config)).items()
        if name in BINDING or entry.path[0] not in FREE_GROUPS and name not in FREE_FLAGS | IN_THE_LAYOUT
    }
    return json.loads(json.dumps(kept))


def changed_flags(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return ``--flag OLD -> NEW`` for each flag that both know and that differs.

    A run may be made longer, so more epochs (with rollouts: more episodes) are no change; see `longer`.
    """
    length = _length_flag(now)
    return [
        f"--{name} {_shown(before[name])} -> {_shown(now[name])}"
        for name in now
        if name in before and before[name] != now[name] and not (name == length and now[name] > before[name])
    ]


def longer(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return ``--flag OLD -> NEW`` of the flag that makes the run longer than before, if it does."""
    name = _length_flag(now)
    if name not in before or name not in now or now[name] <= before[name]:
        return None
    return f"--{name} {before[name]} -> {now[name]}"


def _length_flag(flags: Mapping[str, Any]) -> str:
    return "num_episodes" if "num_episodes" in flags else "max_epochs"


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
