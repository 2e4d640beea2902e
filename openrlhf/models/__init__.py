"""Language models and value models. The names below are imported when they are first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Actor": "openrlhf.models.actor",
    "get_llm_for_sequence_regression": "openrlhf.models.value_head",
}
__all__ = ["Actor", "get_llm_for_sequence_regression"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
