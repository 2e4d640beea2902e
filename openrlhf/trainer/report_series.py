"""What a run recorded, read back: its numbers as named series, grouped into the panels of a report."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

GROUPS = (
    ("Alarms (0 or 1)", r"^alarm/"),
    ("Reward", r"reward(?!_auc)|^return"),
    ("True score", r"true_score|pass@?\d|^score"),
    ("Reward against true score: pairs in the right order", r"reward_auc"),
    ("Accuracy", r"acc(uracy)?(_mean)?$"),
    ("KL", r"(^|_)(?<!approx_)kl$"),
    ("KL of one update", r"approx_kl$"),
    ("KL coefficient", r"kl_coef"),
    ("Length of a response (tokens)", r"response_length|tokens_per_(sample|response)"),
    ("Length with the prompt (tokens)", r"length"),
    ("Responses cut at the limit", r"truncated_rate"),
    ("Policy loss", r"(policy|actor)_loss"),
    ("Critic loss", r"(critic|value)_loss"),
    ("Loss", r"loss"),
    ("Clipped updates", r"clip_fraction"),
    ("Learning rate", r"(^|_)lr$|learning_rate"),
    ("Gradient norm", r"grad_norm"),
    ("Engine against trainer: log-prob gap", r"sync_gap"),
    ("Speed", r"per_second"),
)
TIME = "Time by phase (s)"
HEADLINES = (
    *("eval true_score", "true_score", "eval reward", "reward", "kl", "response_length"),
    *("eval loss", "eval gpt_loss", "eval prm_loss", "loss", "gpt_loss", "kto_loss", "prm_loss"),
    *("eval kl", "eval acc_mean", "eval acc", "acc"),
)
NOT_METRICS = {"step", "global_step", "epoch", "phase", "time/step"}
SMOOTH_ABOVE = 40


class Series(NamedTuple):
    """One curve: its name, the optimizer steps and the values there."""

    name: str
    steps: list[float]
    values: list[float]


class Panel(NamedTuple):
    """Curves that share a vertical axis."""

    title: str
    series: list[Series]


class Headline(NamedTuple):
    """A number at the beginning and at the end of a run, each a mean over ``width`` entries."""

    name: str
    first: float
    last: float
    width: int


def read_series(path: Path) -> list[Series]:
    """Return the numeric series of a metrics file in order of appearance; evaluations are named ``eval ...``.

    An alarm that was never raised is left out.
    """
    found: dict[str, dict[float, float]] = defaultdict(dict)
    for number, record in enumerate(json_lines(path), start=1):
        step = record.get("step", record.get("global_step", number))
        for name, value in record.items():
            if name not in NOT_METRICS and _is_number(value) and _is_number(step):
                found[_full_name(name, str(record.get("phase", "train")))][step] = value
    series = [
        Series(name, sorted(points), [points[step] for step in sorted(points)]) for name, points in found.items()
    ]
    return [one for one in series if any(one.values) or not one.name.startswith("alarm/")]


def _full_name(name: str, phase: str) -> str:
    """Return ``eval loss`` for the names ``loss``, ``eval_loss``, ``eval/loss`` and ``eval loss`` of an evaluation."""
    return name if phase == "train" else f"{phase} {re.sub(f'^{re.escape(phase)}[ _/]', '', name)}"


def group(series: list[Series]) -> list[Panel]:
    """Return the panels: the known groups in their order, then a panel for each other series, then the times."""
    panels: dict[str, list[Series]] = {title: [] for title, _ in GROUPS}
    times = []
    for one in series:
        bare = one.name.split(" ")[-1]
        if bare.startswith("time/"):
            times.append(one._replace(name=bare.removeprefix("time/")))
            continue
        title = next((title for title, pattern in GROUPS if re.search(pattern, bare.lower())), bare.replace("_", " "))
        panels.setdefault(title, []).append(one)
    panels[TIME] = times
    return [Panel(title, members) for title, members in panels.items() if members]


def headlines(series: list[Series]) -> list[Headline]:
    """Return where the numbers that people ask for first began and ended."""
    known = {one.name: one for one in series if len(one.values) > 1}
    found = []
    for name in HEADLINES:
        if name in known:
            values = known[name].values
            width = 1 if name.startswith("eval") else max(1, min(10, len(values) // 5))
            found.append(Headline(name, _mean(values[:width]), _mean(values[-width:]), width))
    return found


def smoothed(values: list[float]) -> list[float]:
    """Return the exponential moving average over about a twentieth of the series, without bias at its beginning."""
    keep = 1 - 2 / (len(values) / 20 + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def is_noisy(values: list[float]) -> bool:
    """Return whether a curve is long and turns so often that its average is easier to read."""
    if len(values) <= SMOOTH_ABOVE:
        return False
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(values, values[1:], values[2:]))
    return turns > len(values) / 5


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines; lines that hold none are left out, as is a missing file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [record for record in map(_parsed, lines) if isinstance(record, dict)]


def json_object(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file; nothing when the file is missing or holds something else."""
    record = _parsed(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
    return record if isinstance(record, dict) else {}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
