"""Checkpoints as a callback: when a step is saved, what goes with it, and how a run that was stopped goes on.

Beside what every callback asks for, a loop shows its state, its ``best_metric`` and whether it is ``evaluating``: then
the evaluation after the last step was begun and not finished.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openrlhf.config.groups import CheckpointConfig
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.retention import Score
from openrlhf.strategy.room import checkpoint_bytes
from openrlhf.trainer.callbacks import Callback, due
from openrlhf.trainer.console import OURS


class Checkpointing(Callback):
    """Saves every ``save_steps`` steps (-1: never) what resumes the run, and a Hugging Face folder if asked.

    A step that was evaluated is saved with its score; the best of them is kept whatever comes later. A run that was
    stopped in an evaluation left its step on the disk without one: when that evaluation is done, the step is saved as
    it would have been.
    """

    def __init__(self, manager: CheckpointManager, config: CheckpointConfig, export: Callable[[Path], None]):
        """``export(folder)`` writes the present weights as a Hugging Face folder; all ranks call it."""
        self._manager, self._config, self._export = manager, config, export
        self._on_disk = 0
        self._unfinished: int | None = None
        self._evaluated: tuple[int, Score] | None = None

    def savers(self, trainer: Any) -> dict[str, Callable[[Path], None]]:
        """Return what saves each role, by the name of its folder."""
        return {"model": trainer.engine.save}

    def loaders(self, trainer: Any) -> dict[str, Callable[[Path], None]]:
        """Return what loads each role, by the name of its folder."""
        return {"model": trainer.engine.load}

    def sizes(self, trainer: Any) -> tuple[int, int]:
        """Return the bytes of one checkpoint, all roles together, and of one export."""
        return checkpoint_bytes(trainer.engine)

    def restore(self, trainer: Any) -> None:
        """Take up the newest whole checkpoint under ``--load_checkpoint``; without the flag set older ones aside."""
        checkpoint = self._manager.start()
        if checkpoint is None:
            return
        trainer.load_state_dict(checkpoint.state, self._config.allow_config_change)
        self._manager.load(checkpoint, self.loaders(trainer))
        self._on_disk = checkpoint.step
        if trainer.evaluating and due(checkpoint.step, self._config.save_steps):
            self._unfinished = checkpoint.step
        if trainer.global_step >= trainer.max_steps:
            self._manager.say(f"all {trainer.max_steps} steps of this run are done: there is nothing left to train")

    def on_start(self, trainer: Any) -> None:
        """Stop before the first step if the disk has no room for what is going to be saved."""
        every = self._config.save_steps
        if not self._config.saves_at_steps:
            return
        checkpoint, export = self.sizes(trainer)
        size = checkpoint * (not self._config.disable_ds_ckpt) + export * self._config.save_hf_ckpt
        saves = trainer.max_steps // every - trainer.global_step // every + (self._unfinished is not None)
        self._manager.expect(size, saves, scored=bool(trainer.eval_data))

    def on_evaluate(self, trainer: Any, values: dict[str, float]) -> None:
        """Remember how good the present step is; save it again if it was on the disk without that."""
        metric, higher = trainer.best_metric
        value = values.get(metric, math.nan)
        self._evaluated = (trainer.global_step, Score(metric, value, higher)) if math.isfinite(value) else None
        if trainer.global_step == self._unfinished:
            self._unfinished = None
            self.save(trainer)

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Save when the step is due."""
        if due(trainer.global_step, self._config.save_steps):
            self.save(trainer)

    def save(self, trainer: Any) -> None:
        """Save the present step. The export goes first: what resumes the run never stands for one that is missing."""
        if self._config.save_hf_ckpt:
            trainer.before_export()
            self._manager.export(trainer.global_step, self._export, self._score(trainer.global_step))
        if not self._config.disable_ds_ckpt:
            self._save(trainer)

    def on_stop(self, trainer: Any) -> str:
        """Save the present step, whatever the cadence, unless that is done already."""
        if trainer.global_step and trainer.global_step != self._on_disk and not self._config.disable_ds_ckpt:
            self._save(trainer)
        return how_to_resume(self._config, trainer.global_step, self._on_disk)

    def on_end(self, trainer: Any) -> None:
        """Say which of the steps on the disk was best."""
        best = self._manager.best() if self._config.save_steps > 0 else None
        if best:
            self._manager.say(f"best of the steps kept: {best.paths[0]} ({best.score.metric} {best.score.value:.4g})")

    def _save(self, trainer: Any) -> None:
        step = trainer.global_step
        OURS.debug("phase: save step %d", step)
        self._manager.save(step, self.savers(trainer), trainer.state_dict(), self._score(step))
        self._on_disk = step

    def _score(self, step: int) -> Score | None:
        """Return how good ``step`` is, if it was evaluated."""
        return self._evaluated[1] if self._evaluated and self._evaluated[0] == step else None


def how_to_resume(config: CheckpointConfig, step: int, on_disk: int) -> str:
    """Return how a run that stopped after ``step`` goes on, when step ``on_disk`` (0: none) is its last checkpoint."""
    if step == 0:
        return "no step was done: start it again with the same command"
    if not on_disk:
        return "nothing was saved to go on from (--disable_ds_ckpt)"
    return f"saved step {on_disk} in {config.ckpt_path}: add --load_checkpoint to the same command to go on"
