"""The flags of ``report``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

from openrlhf.config.flags import flag


@dataclass(frozen=True)
class ReportConfig:
    """The report of a run.

    Write report.html and curves.png anew into run folders, of runs that still train too.
    """

    run_prefix: ClassVar[str] = "report"
    runs: tuple[str, ...] = flag((), "Run folders: what --run_path was, by default <save_path>_run.")

    def problems(self) -> list[str]:
        if not self.runs:
            return ["--runs is missing: name the run folder, by default <save_path>_run"]
        return [f"--runs {path}: there is no such folder" for path in self.runs if not os.path.isdir(path)]
