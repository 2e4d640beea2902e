"""Whether a run may go on from a checkpoint: the same cut over ranks, the same flags, or leave to differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openrlhf.config.continuing import changed_flags, longer
from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import UsageError
from openrlhf.strategy.universal import convertible


def layout_differs(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], config: CheckpointConfig) -> bool:
    """Return whether the files must be converted from the layout ``before`` to that of this run.

    Raises ``UsageError`` that names both when they differ and may not, or cannot.
    """
    if before == now:
        return False
    if config.use_ds_universal_ckpt and convertible(before, now):
        return True
    ways = "use the same, or start without --load_checkpoint"
    if convertible(before, now):
        ways = "use the same, or convert it with --use_ds_universal_ckpt, or start without --load_checkpoint"
    raise UsageError(f"checkpoint {path} was written with {_in_words(before)}; this run has {_in_words(now)}: {ways}")


def flag_lines(path: Path, before: Mapping[str, Any], now: Mapping[str, Any], config: CheckpointConfig) -> list[str]:
    """Return what to tell about flags that changed since the checkpoint was written.

    Raises ``UsageError`` that names each, with both values, unless ``--allow_config_change``.
    """
    changes = changed_flags(before, now)
    if changes and not config.allow_config_change:
        raise UsageError(
            f"{change} since {path.name} was written: give the old value, or --allow_config_change to go on with "
            "the new"
            for change in changes
        )
    lines = [f"--allow_config_change: going on with {', '.join(changes)}"] if changes else []
    more = longer(before, now)
    if more:
        lines.append(f"{more}: the run goes on, and its learning-rate schedule now spans the longer run")
    return lines


def _in_words(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in layout.items()) or "no layout"
