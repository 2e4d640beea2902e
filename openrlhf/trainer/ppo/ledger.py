"""Which samples every step learned from: that none was lost and none learned twice can be read from a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from openrlhf.rollout.types import Rollout
from openrlhf.trainer.callbacks import Callback
from openrlhf.trainer.loggers import rewind

LOG = logging.getLogger(__name__)


class Ledger(Callback):
    """``ledger.jsonl``: a line a step, ``{"step": 3, "samples": {"17": [2, 2]}}``.

    Prompt 17 was answered twice, both times by the policy of version 2. A run that goes on from a checkpoint keeps the
    lines up to it and writes those of the steps that it repeats anew.
    """

    def __init__(self, path: Path):
        self.path = path
        self._failed = False

    def on_start(self, trainer: Any) -> None:
        """Begin anew at step 0; else keep the steps that are not done again."""
        try:
            rewind(self.path, trainer.global_step)
        except OSError as error:
            self._tell(error)

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Write what the step learned from. A disk that refuses is said, never raised."""
        line = json.dumps({"step": trainer.global_step, "samples": by_prompt(trainer.learned)})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
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
