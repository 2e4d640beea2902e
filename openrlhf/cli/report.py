"""Write the report of a run anew, from what the run has left in its folder so far.

python -m openrlhf.cli.report RUN_FOLDER ...
"""

from __future__ import annotations

import sys
from itertools import takewhile

from openrlhf.cli.common import run
from openrlhf.config.report import ReportConfig


def plan(config: ReportConfig, _: int) -> list[str]:
    """Return what would be done."""
    return [f"write {path}/report.html" for path in config.runs]


def write(config: ReportConfig) -> None:
    """Write the report of every folder. Raises the errors of :mod:`openrlhf.errors`."""
    from openrlhf.trainer.report import report_line

    for path in config.runs:
        print(report_line(path))


def named(words: list[str]) -> list[str]:
    """Return the words of a command line whose first ones, without a flag, are folders."""
    folders = list(takewhile(lambda word: not word.startswith("-"), words))
    return ["--runs", *words] if folders else words


if __name__ == "__main__":
    run(ReportConfig, write, "report", plan, argv=named(sys.argv[1:]))
