"""The loops and the algorithms. The names below are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DPOTrainer": "openrlhf.trainer.dpo",
    "KDTrainer": "openrlhf.trainer.kd",
    "KTOTrainer": "openrlhf.trainer.kto",
    "ProcessRewardModelTrainer": "openrlhf.trainer.prm",
    "RewardModelTrainer": "openrlhf.trainer.reward_model",
    "SFTTrainer": "openrlhf.trainer.sft",
    "Trainer": "openrlhf.trainer.loop",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
