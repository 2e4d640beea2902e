"""What happens between optimizer steps: progress line, logs, evaluation; checkpoints are in ``checkpointing.py``.

Their cadence is theirs. A loop shows itself as ``global_step``, ``max_steps``, ``epoch`` and ``max_epochs``;
evaluation asks for ``epoch_ended``, ``eval_data`` and ``evaluate()`` too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

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

    def on_pass_over(self, trainer: Any) -> None:
        """Called after data was taken from which no step could learn."""

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

    def on_pass_over(self, trainer: Any) -> None:
        """Tell each that there was no step."""
        for callback in self._callbacks:
            callback.on_pass_over(trainer)

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
        if not trainer.eval_data:
            return
        wanted = trainer.epoch_ended if self._eval_steps == -1 else due(trainer.global_step, self._eval_steps)
        if wanted or trainer.global_step == trainer.max_steps:
            OURS.debug("phase: evaluation after step %d", trainer.global_step)
            trainer.evaluate()
