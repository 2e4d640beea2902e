"""Whether a saved position still means something: the same data, cut into the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from openrlhf.errors import UsageError

ROWS, DATA, STEPS = "rows", "data", "steps_per_epoch"


def check_position(before: Mapping[str, Any], now: Mapping[str, Any], data_flag: str, allow_change: bool) -> None:
    """Compare what a position rests on, as the checkpoint has it and as this run has it.

    Both hold ``rows``, ``data`` (a fingerprint), ``steps_per_epoch``, and flags by name. Raises ``UsageError`` that
    names ``data_flag`` or the flags that changed, with both values. ``allow_change`` lets data and flags differ, but
    not the steps of an epoch, which a position counts.
    """
    again = "since the checkpoint was written"
    problems = []
    as_it_was = before[STEPS] == now[STEPS]
    otherwise = "--allow_config_change to go on with the new rows" if as_it_was else "start a new run"
    if before[DATA] != now[DATA]:
        problems.append(
            f"{data_flag}: the rows are not those of the checkpoint ({before[ROWS]:,} rows then, {now[ROWS]:,} now): "
            f"give the same data and template, or {otherwise}"
        )
    problems += [
        f"--{name} {before.get(name)} -> {value} {again}: give the old value, or --allow_config_change to go on with "
        "the new"
        for name, value in now.items()
        if name not in (ROWS, DATA, STEPS) and before.get(name) != value
    ]
    if allow_change and not as_it_was:
        raise UsageError(
            f"{data_flag}: an epoch had {before[STEPS]} steps and now has {now[STEPS]}; --allow_config_change cannot "
            "carry a position over: start a new run, with --pretrain on an export of this one"
        )
    if problems and not allow_change:
        raise UsageError(problems)
