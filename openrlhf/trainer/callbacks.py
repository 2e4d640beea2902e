"""What happens between optimizer steps: progress line, logs, evaluation, checkpoints. Their cadence is theirs.

A loop shows itself as ``global_step``, ``max_steps``, ``epoch`` and ``max_epochs``; evaluation asks for
``steps_per_epoch``, ``eval_data`` and ``evaluate()`` too, checkpoints for its state, its ``best_metric`` and whether
it is ``evaluating``: then the evaluation after the last step was begun and not finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from openrlhf.config.groups import CheckpointConfig
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.retention import Score
from openrlhf.strategy.room import checkpoint_bytes
from openrlhf.trainer.console import OURS, Console
from openrlhf.trainer.loggers import JsonlLogger, Logger


class Callback:
    """Does nothing at each event of a run; subclasses say what they do. All ranks call all events in one order."""

    def restore(self, trainer: Any) -> None:
        """Bring the run to where it was left, before anything else looks at it."""

    def on_start(self, trainer: Any) -> None:
        """Called before the first step."""

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Called after each optimizer step with its metrics over all ranks."""

    def on_evaluate(self, trainer: Any, values: dict[str, float]) -> None:
        """Called after each evaluation."""

    def on_stop(self, trainer: Any) -> str | None:
        """Called when the run is asked to stop: keep what would be lost, and say how to go on, if this knows."""

    def on_end(self, trainer: Any) -> None:
        """Called after the last step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it, for JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned; called within :meth:`restore` of the checkpoints."""


class Callbacks(Callback):
    """Several callbacks, called in order. Evaluation goes before checkpoints, so that a saved step is a whole one."""

    def __init__(self, callbacks: Sequence[Callback]):
        self._callbacks = list(callbacks)

    def restore(self, trainer: Any) -> None:
        """Restore each."""
        for callback in self._callbacks:
            callback.restore(trainer)

    def on_start(self, trainer: Any) -> None:
        """Start each."""
        for callback in self._callbacks:
            callback.on_start(trainer)

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Tell each about a step."""
        for callback in self._callbacks:
            callback.on_step_end(trainer, metrics)

    def on_evaluate(self, trainer: Any, values: dict[str, float]) -> None:
        """Tell each about an evaluation."""
        for callback in self._callbacks:
            callback.on_evaluate(trainer, values)

    def on_stop(self, trainer: Any) -> str:
        """Stop each, the last one first, so that what must be saved is saved; return how to go on."""
        return "; ".join(filter(None, [callback.on_stop(trainer) for callback in reversed(self._callbacks)]))

    def on_end(self, trainer: Any) -> None:
        """End each."""
        for callback in self._callbacks:
            callback.on_end(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the states of those that have one, by the name of their class."""
        states = {type(callback).__name__: callback.state_dict() for callback in self._callbacks}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Hand each its state; one that had none begins anew."""
        for callback in self._callbacks:
            if type(callback).__name__ in state:
                callback.load_state_dict(state[type(callback).__name__])


def due(step: int, every: int) -> bool:
    """Return whether something that happens each ``every`` steps happens at ``step``; -1 (or 0) means never."""
    return every > 0 and step % every == 0


class ProgressLine(Callback):
    """Step, key figures, rate and time left: one line that updates itself on a terminal, else one now and then."""

    def __init__(self, console: Console, shown: Sequence[str]):
        """``shown`` names the metrics that the line shows."""
        self._console, self._shown = console, tuple(shown)
        self._began, self._first_step = 0.0, 0

    def on_start(self, trainer: Any) -> None:
        """Start the clock."""
        self._began, self._first_step = time.monotonic(), trainer.global_step

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Show the step."""
        done = trainer.global_step - self._first_step
        left = (time.monotonic() - self._began) / done * (trainer.max_steps - trainer.global_step)
        figures = [f"{name} {metrics[name]:.4g}" for name in self._shown if name in metrics]
        if "tokens_per_second" in metrics:
            figures.append(f"{metrics['tokens_per_second']:,.0f} tok/s")
        line = [
            f"step {trainer.global_step}/{trainer.max_steps}",
            f"epoch {trainer.epoch}/{trainer.max_epochs}",
            *figures,
            f"{format_seconds(left)} left",
        ]
        last = done == 1 or trainer.global_step == trainer.max_steps
        self._console.status("  ".join(line), at_once=last)

    def on_evaluate(self, trainer: Any, values: dict[str, float]) -> None:
        """Show the evaluation on a line of its own."""
        figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._console.line(f"evaluation at step {trainer.global_step}: {figures}")

    def on_end(self, trainer: Any) -> None:
        """Leave the last line where it is."""
        self._console.settle()


def format_seconds(seconds: float) -> str:
    """Return ``"1h02m"``, ``"3m05s"`` or ``"7s"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


class MetricLogging(Callback):
    """Writes every step to ``metrics.jsonl`` and every few steps to the other loggers; only rank 0 has loggers."""

    def __init__(self, journal: JsonlLogger | None, others: Sequence[Logger], logging_steps: int):
        self._journal = [] if journal is None else [journal]
        self._others, self._every = list(others), logging_steps

    def on_start(self, trainer: Any) -> None:
        """Let the loggers forget what a crash left behind the present step."""
        for logger in self._journal + self._others:
            logger.start(trainer.global_step)

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Log the step."""
        logged = due(trainer.global_step, self._every)
        for logger in self._journal + (self._others if logged else []):
            logger.log("train", trainer.global_step, trainer.epoch, metrics)
        if logged and hasattr(trainer, "window"):
            trainer.window.clear()

    def on_evaluate(self, trainer: Any, values: dict[str, float]) -> None:
        """Log the evaluation."""
        for logger in self._journal + self._others:
            logger.log("eval", trainer.global_step, trainer.epoch, values)

    def on_stop(self, trainer: Any) -> None:
        """Close the loggers."""
        self.on_end(trainer)

    def on_end(self, trainer: Any) -> None:
        """Close the loggers."""
        for logger in self._journal + self._others:
            logger.close()


class Evaluation(Callback):
    """Evaluates every ``eval_steps`` steps, or with -1 after each epoch, and always after the last step."""

    def __init__(self, eval_steps: int):
        self._eval_steps = eval_steps

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Evaluate when the step is due, and after the last step."""
        every = trainer.steps_per_epoch if self._eval_steps == -1 else self._eval_steps
        if not trainer.eval_data:
            return
        if due(trainer.global_step, every) or trainer.global_step == trainer.max_steps:
            OURS.debug("phase: evaluation after step %d", trainer.global_step)
            trainer.evaluate()


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
