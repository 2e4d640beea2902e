"""From rows to batches. The public names are loaded when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "PreferenceBatch": "batch",
    "PreferenceDataset": "reward",
    "ProcessRewardBatch": "batch",
    "ProcessRewardDataset": "process_reward",
    "Prompt": "prompts",
    "PromptDataset": "prompts",
    "SFTDataset": "sft",
    "StepSampler": "sampler",
    "TokenBatch": "batch",
    "UnpairedBatch": "batch",
    "UnpairedPreferenceDataset": "unpaired_preference",
    "blending_datasets": "blending",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
