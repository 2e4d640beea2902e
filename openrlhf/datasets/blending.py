"""Mixtures of several sources of rows, and their training and evaluation splits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from openrlhf.config.checks import probability_problems
from openrlhf.datasets.formats import KEYS, Keys, with_standard_keys
from openrlhf.datasets.sources import load_split, some_rows
from openrlhf.errors import DataError, UsageError

if TYPE_CHECKING:
    from datasets import Dataset

EVAL_SHARE = 0.03

logger = logging.getLogger(__name__)


def blending_datasets(
    datasets: str,
    probabilities: str | None,
    strategy: Any = None,
    seed: int = 42,
    max_count: int = 5_000_000,
    return_eval: bool = True,
    stopping_strategy: str = "first_exhausted",
    train_split: str = "train",
    eval_split: str = "test",
):
    """Return ``(train, eval)``, or only ``train``, mixed from comma-separated sources. OpenRLHF's public signature.

    Args:
        datasets: ``"a,b"``; see ``sources`` for what an entry may be.
        probabilities: ``"0.3,0.7"``, one each, sum 1; None puts the sources one after the other.
        strategy: not needed here.
        max_count: rows taken of each source.
        stopping_strategy: ``"first_exhausted"`` or ``"all_exhausted"`` (small sources repeat).
    """
    common = {"max_samples": max_count, "seed": seed, "stopping": stopping_strategy}
    train = load_mixture(datasets, probabilities, split=train_split, **common)
    if not return_eval:
        return train
    return train, _eval_beside_train(datasets, probabilities, train_split, eval_split, **common)


def load_train_eval(data_cfg: Any, seed: int, stopping: str) -> tuple[Dataset, Dataset]:
    """Return the training and evaluation rows that the data flags describe.

    Evaluation rows come from ``--eval_dataset``, else from the ``--eval_split`` of each source, else from the first
    3 % (at least one row) of its training rows, which a notice says.

    Raises:
        UsageError: no ``--dataset``, or probabilities that do not fit.
        DataError: a source is missing, empty, or lacks a key; names file and line for local files.
    """
    if not data_cfg.dataset:
        raise UsageError("--dataset: name a file, a folder or a data set of the hub to train on")
    common = {
        "max_samples": int(data_cfg.max_samples),
        "seed": seed,
        "stopping": stopping,
        "required": required_keys(data_cfg),
    }
    probs = data_cfg.dataset_probs
    train = load_mixture(data_cfg.dataset, probs, split=data_cfg.train_split, **common)
    if data_cfg.eval_dataset:
        split = data_cfg.eval_split
        evaluation = load_mixture(data_cfg.eval_dataset, None, split=split, flag="--eval_dataset", **common)
    else:
        splits = (data_cfg.train_split, data_cfg.eval_split)
        evaluation = _eval_beside_train(data_cfg.dataset, probs, *splits, **common)
    return train, evaluation


def recognised(cfg: Any, formats: Sequence[Keys], spec: str, split: str, flag: str = "--dataset") -> Any:
    """Return ``cfg`` with the keys of the standard format that the sources of ``spec`` have; a notice says which.

    Without any the keys stay as they are. ``formats`` are those of :mod:`openrlhf.datasets.formats`.

    Raises:
        DataError: two of the rows looked at have different formats.
    """
    if not formats:
        return cfg
    rows = [row for name in _names(spec, flag) for row in some_rows(name, split, flag=flag)]
    recognised_cfg, words = with_standard_keys(cfg, formats, rows)
    if words:
        logger.warning("%s %s: its columns say what they hold, read with %s", flag, spec, words)
    return recognised_cfg


def required_keys(cfg: Any, **more: str | None) -> dict[str, str]:
    """Return ``{key: flag}`` for every key flag that ``cfg`` sets; ``more`` adds keys of other groups by flag name."""
    raw_text = getattr(cfg, "pretrain_mode", False)
    named = {name: getattr(cfg, name, None) for name in KEYS if not (raw_text and name == "output_key")} | more
    return {key: f"--{name}" for name, key in named.items() if key}


def load_mixture(
    spec: str,
    probs: str | Iterable[float] | None,
    *,
    split: str,
    max_samples: int,
    seed: int,
    stopping: str,
    flag: str = "--dataset",
    required: Mapping[str, str] | None = None,
) -> Dataset:
    """Return the rows of ``split`` of every source in ``spec``, mixed with ``probs`` and cut to ``max_samples``.

    Args:
        spec: comma-separated sources.
        probs: one probability a source, or None to put the sources one after the other.
        stopping: ``"first_exhausted"`` or ``"all_exhausted"``.
        flag: the flag that ``spec`` came from, for messages; its probabilities are ``<flag>_probs``.
        required: key every row must have -> flag that names it; other columns are left out.
    """
    names = _names(spec, flag)
    weights = parse_probabilities(probs, len(names), flag)
    parts = []
    for name in names:
        rows = load_split(name, split, flag=flag, required=required or {}, or_only_split=True)
        parts.append(_take(rows, max_samples))
    return _mix(parts, weights, seed, stopping, max_samples)


def _eval_beside_train(
    spec: str,
    probs: Any,
    train_split: str,
    eval_split: str,
    *,
    max_samples: int,
    seed: int,
    stopping: str,
    required: Mapping[str, str] | None = None,
) -> Dataset:
    names = _names(spec, "--dataset")
    parts = []
    for name in names:
        rows = load_split(name, eval_split, flag="--dataset", required=required or {})
        if rows is None:
            train = load_split(name, train_split, flag="--dataset", required=required or {}, or_only_split=True)
            train = _take(train, max_samples)
            rows = train.select(range(max(1, int(EVAL_SHARE * len(train)))))
            logger.warning(
                "%s has no split %r: evaluation uses its first %d training rows, which are trained on too "
                "(name held-out rows with --eval_dataset)",
                name,
                eval_split,
                len(rows),
            )
        parts.append(_take(rows, max_samples))
    return _mix(parts, parse_probabilities(probs, len(names), "--dataset"), seed, stopping, max_samples)


def parse_probabilities(probs: str | Iterable[float] | None, count: int, flag: str) -> list[float] | None:
    """Return ``count`` probabilities that sum to 1, or None for None. Raises :class:`UsageError`."""
    if probs is None:
        return None
    parts = probs.split(",") if isinstance(probs, str) else list(probs)
    problems = probability_problems(flag.removeprefix("--"), count, parts)
    if problems:
        raise UsageError(problems)
    weights = [float(part) for part in parts]
    return [weight / sum(weights) for weight in weights]


def _names(spec: str, flag: str) -> list[str]:
    names = [name.strip() for name in spec.split(",")]
    if not all(names):
        raise UsageError(f"{flag} {spec!r}: an entry between the commas is empty")
    return names


def _take(rows: Any, count: int) -> Any:
    return rows.select(range(min(int(count), len(rows))))


def _mix(parts: list[Any], weights: list[float] | None, seed: int, stopping: str, max_samples: int) -> Dataset:
    if len(parts) == 1:
        return parts[0]
    import datasets

    try:
        if weights is None:
            mixed = datasets.concatenate_datasets(parts)
        else:
            mixed = datasets.interleave_datasets(parts, weights, seed=seed, stopping_strategy=stopping)
    except ValueError as error:
        raise DataError(f"the data sets do not fit together: {error}") from error
    return _take(mixed, max_samples)
