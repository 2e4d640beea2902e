"""Whether a saved position still means something: the same data, cut into as many steps.

The flags are compared before, with those that the manifest of the checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openrlhf.errors import UsageError

ROWS, DATA, STEPS = "rows", "data", "steps_per_epoch"


def check_position(before: Mapping[str, Any], now: Mapping[str, Any], data_flag: str, allow_change: bool) -> None:
    """Compare what a position rests on, as the checkpoint has it and as this run has it.

    Both hold ``rows``, ``data`` (a fingerprint) and ``steps_per_epoch``. Raises ``UsageError`` that names
    ``data_flag``. ``allow_change`` lets the data differ, but not the steps of an epoch, which a position counts.
    """
    as_it_was = before[STEPS] == now[STEPS]
    if before[DATA] != now[DATA] and not allow_change:
        otherwise = "--allow_config_change to go on with the new rows" if as_it_was else "start a new run"
        raise UsageError(
            f"{data_flag}: the rows are not those of the checkpoint ({before[ROWS]:,} rows then, {now[ROWS]:,} now): "
            f"give the same data and template, or {otherwise}"
        )
    if not as_it_was:
        raise UsageError(
            f"{data_flag}: an epoch had {before[STEPS]} steps and now has {now[STEPS]}; --allow_config_change cannot "
            "carry a position over: start a new run, with --pretrain on an export of this one"
        )
