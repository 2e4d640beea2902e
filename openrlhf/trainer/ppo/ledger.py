"""Which samples every step learned from: that none was lost and none learned twice can be read from a file."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openrlhf.rollout.types import Rollout
from openrlhf.trainer.callbacks import Callback

LOG = logging.getLogger(__name__)


class Ledger(Callback):
    """``ledger.jsonl``: a line a step, ``{"step": 3, "taken": 24, "samples": {"17": [2, 2]}, "dropped": ["9"]}``.

    Prompt 17 was answered twice, both times by the policy of version 2; prompt 9 was asked too, and dynamic filtering
    left its answers out. With them 24 prompts were taken since the run began: in every episode each prompt is once
    among those learned from or those dropped. Where a filter leaves nothing of the rest of an episode, a line has no
    samples, and the number of the step before. A run that goes on from a checkpoint keeps the lines up to it and
    writes those of the prompts that it takes again anew.
    """

    def __init__(self, path: Path):
        self.path = path
        self._failed = False

    def on_start(self, trainer: Any) -> None:
        """Begin anew at step 0; else keep the lines of the prompts that are not taken again."""
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else []
            kept = [line for line in lines if _taken(line) <= trainer.stream.position]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            self._tell(error)

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Write what the step learned from. A disk that refuses is said, never raised."""
        self._write(trainer)

    def on_pass_over(self, trainer: Any) -> None:
        """Write what was left out though no step came of it."""
        self._write(trainer)

    def _write(self, trainer: Any) -> None:
        line = {"step": trainer.global_step, "taken": trainer.stream.position, "samples": by_prompt(trainer.learned)}
        if trainer.dropped:
            line["dropped"] = list(trainer.dropped)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._failed:
            self._failed = True
            LOG.warning("%s cannot be written (%s); training goes on", self.path, error)


def by_prompt(rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
    """Return the policy version of every sample, by the uid of its prompt."""
    versions: dict[str, list[int]] = {}
    for rollout in rollouts:
        versions.setdefault(rollout.prompt.uid, []).append(rollout.policy_version)
    return versions


def _taken(line: str) -> float:
    """Return how many prompts were taken by a line; infinity for one that a crash cut short."""
    try:
        return json.loads(line)["taken"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
