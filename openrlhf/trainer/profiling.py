"""``--profile_steps 3-5``: a trace of what the processes of a run did in some steps, and a table of the costs.

One ``trace.<name>.json.gz`` a process lies in the run folder and opens in ui.perfetto.dev;
``profile.<name>.txt`` beside it lists operators by their own time. Left out: vLLM engines, which have a profiler of
their own. Recording costs time, so the rates of those steps say little.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openrlhf.config.checks import profiled_steps
from openrlhf.device import device_type
from openrlhf.trainer.callbacks import Callback

ROWS = 60
"""Operators in the table."""


class Recorder:
    """Records what this process does between :meth:`start` and :meth:`stop`, if no other recorder in it does."""

    _one_records = False

    def __init__(self) -> None:
        self._profile: Any = None

    def start(self) -> None:
        """Begin to record."""
        if Recorder._one_records:
            return
        Recorder._one_records = True
        from torch.profiler import ProfilerActivity, profile

        on_gpu = [ProfilerActivity.CUDA] if device_type() != "cpu" else []
        self._profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
        self._profile.start()

    def stop(self, folder: str | Path, name: str) -> None:
        """End, and write ``trace.<name>.json.gz`` and ``profile.<name>.txt`` to ``folder``."""
        if self._profile is None:
            return
        Recorder._one_records = False
        self._profile.stop()
        self._profile.export_chrome_trace(str(Path(folder) / f"trace.{name}.json.gz"))
        order = "self_cpu_time_total" if device_type() == "cpu" else "self_device_time_total"
        table = self._profile.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        (Path(folder) / f"profile.{name}.txt").write_text(table + "\n")
        self._profile = None


class Profiling(Callback):
    """Records the steps that ``--profile_steps`` names, or those of them that the run gets to."""

    def __init__(
        self,
        steps: str | None,
        start: Callable[[], None],
        stop: Callable[[Path], None],
        folder: Path,
        say: Callable[[str], None],
    ):
        """``start()`` and ``stop(folder)`` record all processes that train; all ranks call them."""
        self._first, self._last = profiled_steps(steps) if steps else (0, 0)
        self._start, self._stop, self._folder, self._say = start, stop, folder, say
        self._began = 0

    def on_start(self, trainer: Any) -> None:
        """Begin at once where the first step is wanted."""
        self._begin_before(trainer.global_step + 1)

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """End after the last step that is wanted, or begin before the first one."""
        if self._began and trainer.global_step == self._last:
            self._end(trainer.global_step)
        self._begin_before(trainer.global_step + 1)

    def on_stop(self, trainer: Any) -> None:
        """Write what there is."""
        self.on_end(trainer)

    def on_end(self, trainer: Any) -> None:
        """Write what there is, should the run be shorter."""
        if self._began:
            self._end(trainer.global_step)

    def _begin_before(self, step: int) -> None:
        if not self._began and self._first <= step <= self._last:
            self._began = step
            self._start()

    def _end(self, step: int) -> None:
        try:
            self._stop(self._folder)
        except OSError as error:
            self._say(f"no trace of steps {self._began}-{step}: {error}; training goes on")
        else:
            self._tell(step)
        self._began = self._last = 0

    def _tell(self, step: int) -> None:
        self._say(f"trace of steps {self._began}-{step} in {self._folder}/trace.*.json.gz, open it in ui.perfetto.dev")


def of_groups(groups: Sequence[Any], start: Callable, stop: Callable) -> tuple[Callable, Callable[[Path], None]]:
    """Return what starts and stops the recorders of all workers of ``groups``, by their methods."""

    def start_all() -> None:
        for group in groups:
            group.get(group.run(start))

    def stop_all(folder: Path) -> None:
        for number, group in enumerate(groups):
            group.get(group.run(stop, folder=str(folder.absolute()), number=number))

    return start_all, stop_all
