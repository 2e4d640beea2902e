"""Checkpoints for another number of ranks or another ZeRO stage, through DeepSpeed's universal format.

The files of a whole, verified checkpoint are taken apart into one folder a weight, which any layout can read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONVERTIBLE = {"world_size", "zero_stage"}


def convertible(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether files of the layout ``before`` can be converted to the layout ``now``.

    Stage 0 has no ZeRO files to convert, neither from nor to.
    """
    differ = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    return differ <= CONVERTIBLE and bool(before.get("zero_stage")) and bool(now.get("zero_stage"))
