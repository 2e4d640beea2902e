"""Which step folders are ours, which of them stay, and what an interrupted save left.

A folder is ours when it is named ``global_step<N>`` or ``global_step<N>_hf`` and carries our mark. Links are never
followed and never removed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from openrlhf.strategy import files, manifests
from openrlhf.strategy.manifests import MANIFEST

EXPORT_MARK = ".openrlhf-export.json"
STEP_FOLDER = re.compile(r"global_step(\d+)(_hf)?")
UNFINISHED = re.compile(r"global_step\d+(_hf)?(\.tmp|\.part|\.tmp\.part)")
REPLACED = re.compile(r"(global_step\d+(_hf)?)\.old")


class Score(NamedTuple):
    """What an evaluation gave at the step of a checkpoint; ``higher`` says which way is better."""

    metric: str
    value: float
    higher: bool

    def beats(self, other: Score) -> bool:
        """Return whether this is better than a score of the same metric."""
        return self.value > other.value if self.higher else self.value < other.value


@dataclass
class Kept:
    """What is on the disk of one step: a checkpoint, an export, or both."""

    step: int
    paths: list[Path] = field(default_factory=list)
    resumable: bool = False
    score: Score | None = None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(files.tree_size(path) for path in self.paths)


def step_folders(root: Path) -> list[Path]:
    """Return what is named like a checkpoint or an export, oldest step first; a link is not ours."""
    found = (path for path in root.glob("global_step*") if STEP_FOLDER.fullmatch(path.name))
    return sorted((path for path in found if not path.is_symlink()), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a step folder."""
    return int(STEP_FOLDER.fullmatch(path.name).group(1))


def kept_steps(root: Path) -> dict[int, Kept]:
    """Return what is ours in ``root``, by step, oldest first."""
    found: dict[int, Kept] = {}
    for path in step_folders(root):
        resumable = (path / MANIFEST).is_file()
        if not (resumable or (path / EXPORT_MARK).is_file()):
            continue
        step = found.setdefault(step_of(path), Kept(step_of(path)))
        step.paths.append(path)
        step.resumable |= resumable
        step.score = step.score or _score(manifests.read(path)[0] if resumable else _mark(path))
    return found


def best_of(steps: Iterable[Kept]) -> Kept | None:
    """Return the step with the best score of the newest step's metric, the earliest of equals; None without any."""
    scored = [kept for kept in steps if kept.score]
    best = None
    for kept in scored:
        if kept.score.metric == scored[-1].score.metric and (best is None or kept.score.beats(best.score)):
            best = kept
    return best


def surplus(root: Path, most: int, most_bytes: int) -> Iterator[Path]:
    """Yield the folders of the oldest steps beyond the limits.

    Never the newest step, the newest checkpoint and the best one; so there may be one more than ``most``.
    """
    steps = kept_steps(root)
    best = best_of(steps.values())
    protected = {max(steps, default=-1), max((step for step, kept in steps.items() if kept.resumable), default=-1)}
    protected |= {best.step} if best else set()
    sizes = {step: kept.size for step, kept in steps.items()}
    for step, kept in steps.items():
        if len(sizes) <= most and sum(sizes.values()) <= most_bytes:
            return
        if step not in protected:
            del sizes[step]
            yield from kept.paths


def clean(root: Path) -> None:
    """Remove what an interrupted save left; bring back the old copy if it was stopped between two renames."""
    files.nearest_folder(root)
    for path in root.glob("global_step*"):
        replaced = REPLACED.fullmatch(path.name)
        if path.is_symlink():
            continue
        if UNFINISHED.fullmatch(path.name) or (replaced and (root / replaced.group(1)).exists()):
            files.remove(path)
        elif replaced:
            path.rename(root / replaced.group(1))


def set_aside(root: Path, kind: str, paths: Iterable[Path]) -> str | None:
    """Move folders to ``root/<kind>-<time>`` and return that; None when there are none."""
    paths = list(paths)
    if not paths:
        return None
    stamp = time.strftime(f"{kind}-%Y%m%d-%H%M%S")
    target = next(path for path in _numbered(root / stamp) if not path.exists())
    target.mkdir()
    for path in paths:
        path.rename(target / path.name)
    return str(target)


def discard(path: Path) -> None:
    """Delete a step folder under a name that the next start cleans up, should this be interrupted."""
    doomed = path.with_name(path.name + ".tmp")
    if doomed.exists():
        files.remove(doomed)
    path.rename(doomed)
    files.remove(doomed)


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in range(2, 1000):
        yield path.with_name(f"{path.name}-{number}")


def _mark(folder: Path) -> Any:
    try:
        return json.loads((folder / EXPORT_MARK).read_text())
    except (OSError, ValueError):
        return None


def _score(record: Any) -> Score | None:
    """Return the score in a manifest or in the mark of an export; None without one, or in a damaged file."""
    try:
        metric, value, higher = record["score"]
        return Score(str(metric), float(value), bool(higher))
    except (LookupError, TypeError, ValueError):
        return None
