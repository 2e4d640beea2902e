"""Where metrics go: ``metrics.jsonl`` always, TensorBoard or Weights & Biases when asked. The door to both.

A logger never raises into training: what it could not write is counted, and said once.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from openrlhf.config.groups import LoggingConfig
from openrlhf.config.secrets import hide_in_argv, literal_key, wandb_key

LOG = logging.getLogger(__name__)


class Logger:
    """Takes named numbers. Subclasses write them in ``_open``, ``_write`` and ``_close``, which may fail."""

    expected: tuple[type[Exception], ...] = (
        OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError
    )  # fmt: skip

    def __init__(self, secret: str = ""):
        """``secret`` is kept out of what is said about failures."""
        self.failures = 0
        self._secret = secret

    def start(self, step: int) -> None:
        """Begin, or go on after ``step``; what an interrupted run logged beyond it is dropped where that can be."""
        self._guard(self._open, step)

    def log(self, phase: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write ``values`` of ``phase`` (``"train"`` or ``"eval"``) at optimizer step ``step`` of ``epoch``."""
        self._guard(self._write, phase, step, epoch, values)

    def close(self) -> None:
        """Write out what is buffered, and say how much was lost."""
        self._guard(self._close)
        if self.failures:
            LOG.warning("%s: %d writes failed", type(self).__name__, self.failures)

    def _guard(self, call, *arguments: Any) -> None:
        try:
            call(*arguments)
        except self.expected as error:
            self.failures += 1
            if self.failures == 1:
                reason = self._without_secret(error)
                LOG.warning("%s failed (%s: %s); training goes on", type(self).__name__, type(error).__name__, reason)

    def _without_secret(self, error: Exception) -> str:
        return str(error).replace(self._secret, "***") if self._secret else str(error)

    def _open(self, step: int) -> None:
        """Open what is written to."""

    def _write(self, phase: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Write one set of numbers."""
        raise NotImplementedError

    def _close(self) -> None:
        """Close it."""


def rewind(path: Path, step: int) -> None:
    """Keep the lines of a JSON lines file up to ``step``, drop later or torn ones; at step 0 begin anew."""
    # Not splitlines(): text may hold other line separators of Unicode.
    lines = path.read_text(encoding="utf-8").split("\n") if step and path.exists() else []
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines if _step_of(line) <= step), encoding="utf-8")
    os.replace(temporary, path)


def _step_of(line: str) -> float:
    """Return the step of a line; infinity for a line that a crash cut short."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


class JsonlLogger(Logger):
    """``metrics.jsonl``: a JSON object a line with ``step``, ``epoch``, ``phase`` and the metrics; NaN is null."""

    def __init__(self, path: str | Path):
        super().__init__()
        self._path = Path(path)
        self._file = None

    def _open(self, step: int) -> None:
        rewind(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def _write(self, phase: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "epoch": epoch, "phase": phase, **finite}, allow_nan=False) + "\n")
        self._file.flush()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()


class TensorboardLogger(Logger):
    """Scalars ``train/<name>`` and ``eval/<name>`` in ``<directory>/<run name>``."""

    def __init__(self, directory: str, run_name: str):
        super().__init__()
        self._folder, self._writer = os.path.join(directory, run_name), None

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=step + 1)

    def _write(self, phase: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{phase}/{name}", value, step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbLogger(Logger):
    """A Weights & Biases run with ``train/*`` over ``train/global_step`` and ``eval/*`` over ``eval/global_step``."""

    def __init__(self, config: LoggingConfig, flags: Mapping[str, Any], folder: str | Path):
        """``flags`` is the saved configuration, without the key; ``folder`` takes wandb's own files."""
        super().__init__(secret=literal_key(config.use_wandb))
        self._config, self._flags, self._folder, self._run = config, dict(flags), str(folder), None

    def _open(self, step: int) -> None:
        import wandb

        self.expected = (*type(self).expected, wandb.Error)
        self._secret = wandb_key(self._config.use_wandb)
        # wandb stores the command line of the process with the run. `wandb.login` would store the key in ~/.netrc.
        hide_in_argv(self._secret)
        try:
            self._run = self._init(api_key=self._secret or None)
        except (wandb.Error, OSError) as error:
            LOG.warning(
                "Weights & Biases refuses or is out of reach (%s): logging offline to %s; `wandb sync` sends it later",
                self._without_secret(error),
                self._folder,
            )
            self._run = self._init(mode="offline")
        for phase in ("train", "eval"):
            self._run.define_metric(f"{phase}/global_step")
            self._run.define_metric(f"{phase}/*", step_metric=f"{phase}/global_step")

    def _init(self, **settings: Any) -> Any:
        import wandb

        return wandb.init(
            entity=self._config.wandb_org,
            project=self._config.wandb_project,
            group=self._config.wandb_group,
            name=self._config.wandb_run_name,
            config=self._flags,
            dir=self._folder,
            settings=wandb.Settings(console="off", init_timeout=30, **settings),
        )

    def _write(self, phase: str, step: int, epoch: int, values: Mapping[str, float]) -> None:
        named = {f"{phase}/{name}": value for name, value in values.items()}
        self._run.log({**named, f"{phase}/global_step": step, f"{phase}/epoch": epoch})

    def _close(self) -> None:
        if self._run is not None:
            self._run.finish()


def build_loggers(config: LoggingConfig, flags: Mapping[str, Any], folder: str | Path) -> list[Logger]:
    """Return the loggers that the flags ask for beside ``metrics.jsonl``; TensorBoard only where wandb is not used."""
    if config.use_wandb:
        return [WandbLogger(config, flags, folder)]
    if config.use_tensorboard:
        return [TensorboardLogger(config.use_tensorboard, config.wandb_run_name)]
    return []
