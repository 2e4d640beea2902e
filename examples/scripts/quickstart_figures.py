"""What the scripts share that gather the figures of the quickstart and its relatives."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path


def metrics(run: Path, phase: str) -> list[dict]:
    """Return the rows of ``run``'s metrics of one phase, ``train`` or ``eval``, first to last."""
    rows = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["phase"] == phase]


def seconds(out: Path, stages: tuple[str, ...]) -> dict[str, int]:
    """Return how long each stage took, from the markers that the scripts leave."""
    return {name: int((out / f"{name}.done").read_text()) for name in stages}


def tell(description: str, figures: Callable[[Path, int], dict], table: Callable[[dict], str]) -> None:
    """Read the folder of a run and its seed from the command line, write its figures as JSON and print them.

    Args:
        description: the text of ``--help``.
        figures: called with the folder and the seed; returns what the JSON file holds.
        table: called with the figures; returns what a person reads.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--result", type=Path, required=True)
    args = parser.parse_args()
    result = figures(args.out, args.seed)
    args.result.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{table(result)}\nfigures: {args.result.resolve()}")
