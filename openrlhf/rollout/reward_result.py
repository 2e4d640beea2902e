"""What every reward source gives, and the check that an answer in JSON must pass before it is one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from typing_extensions import Self

from openrlhf.errors import DataError, NumericError

LARGEST = 3.4028234663852886e38
"""The largest float32; a greater reward would become infinite in the trainer."""


@dataclass(frozen=True)
class RewardResult:
    """Rewards of some queries.

    Attributes:
        rewards: one finite number a query.
        extra: further numbers to log, by name, one a query each (``scores`` among them when the source gives scores).
    """

    rewards: list[float]
    extra: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def join(cls, parts: Sequence[RewardResult], who: str) -> Self:
        """Return what ``who`` gave for several lists of queries as one; parts without queries count for nothing.

        Raises:
            DataError: see :func:`join_extra`.
        """
        filled = [part for part in parts if part.rewards]
        rewards = [reward for part in filled for reward in part.rewards]
        return cls(rewards, join_extra([part.extra for part in filled], who))


def join_extra(parts: Sequence[dict[str, list[float]]], who: str) -> dict[str, list[float]]:
    """Return the further numbers that ``who`` gave for several lists of queries, one after the other.

    Raises:
        DataError: a name is in some parts only.
    """
    every = {name for part in parts for name in part}
    odd = sorted(name for name in every if any(name not in part for part in parts))
    if odd:
        names = ", ".join(odd[:5])
        raise DataError(
            f"{who} gave 'scores' or 'extra_logs' for some queries only: {names}; give every query a number"
        )
    return {name: [value for part in parts for value in part[name]] for name in sorted(every)}


class RewardSource(Protocol):
    """Whatever scores texts: a python function, an HTTP server, several of them."""

    def score(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[str] | None = None,
        uids: Sequence[str] | None = None,
    ) -> RewardResult:
        """Return a finite reward for each query.

        Args:
            queries: prompt and answer as text, special tokens included.
            prompts: the prompt's part of each query.
            labels: reference answers; ``""`` each when there are none.
            uids: names of the queries for messages; their positions when not given.

        Raises:
            DataError: the source refused, failed, or gave the wrong number or type of rewards.
            InfraError: the source could not be reached in time.
            NumericError: a reward is not finite.
        """
        ...


def names_of(count: int, uids: Sequence[str] | None) -> list[str]:
    """Return how messages call each of ``count`` queries."""
    return [f"query {number}" for number in range(count)] if uids is None else [f"uid {uid}" for uid in uids]


def result_from_json(document: Any, names: Sequence[str], who: str) -> RewardResult:
    """Return the rewards in ``{"rewards": [...], "scores": [...], "extra_logs": {name: [...]}}``.

    Args:
        document: what the JSON text stands for; ``scores`` and ``extra_logs`` may be missing.
        names: how messages call the queries.
        who: the source, the first word of every message.

    Raises:
        DataError: not such an object, or not one number a query.
        NumericError: a number is not finite, or is too large for float32.
    """
    if not isinstance(document, dict):
        raise DataError(f'{who} should give {{"rewards": [...]}}; it gave {_kind(document)}')
    if "rewards" not in document:
        keys = ", ".join(sorted(str(key)[:40] for key in document)[:5]) or "none"
        raise DataError(f'{who} should give {{"rewards": [...]}}; keys of its answer: {keys}')
    rewards = _numbers(document["rewards"], "rewards", names, who)
    logs = document.get("extra_logs") or {}
    if not isinstance(logs, dict):
        raise DataError(f"{who}: 'extra_logs' should be an object of lists; found {_kind(logs)}")
    if document.get("scores") is not None:
        logs = {**logs, "scores": document["scores"]}
    return RewardResult(rewards, {name: _numbers(spread(logs[name], len(names)), name, names, who) for name in logs})


def spread(values: Any, count: int) -> Any:
    """Return ``count`` times a number that stands for the whole batch, and anything else as it is."""
    return [values] * count if isinstance(values, (int, float)) else values


def check_finite(numbers: Sequence[float], what: str, names: Sequence[str], who: str) -> None:
    """Raise NumericError that names the queries whose number is not finite or too large for float32."""
    bad = [f"{name}: {number:g}" for name, number in zip(names, numbers, strict=True) if not abs(number) <= LARGEST]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise NumericError(f"{who} gave {what} that are not finite: {', '.join(bad[:5])}{more}")


def _numbers(values: Any, what: str, names: Sequence[str], who: str) -> list[float]:
    if not isinstance(values, list):
        raise DataError(f"{who} should give {len(names)} {what}, one a query; it gave one {_kind(values)}")
    if len(values) != len(names):
        raise DataError(f"{who} should give {len(names)} {what}, one a query; it gave {len(values)}")
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise DataError(f"{who} should give numbers as {what}; {name} got {_kind(value)}")
    numbers = [_as_float(value) for value in values]
    check_finite(numbers, what, names, who)
    return numbers


def _as_float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _kind(value: Any) -> str:
    known = {type(None): "null", bool: "boolean", str: "string", list: "list", dict: "object"}
    return known.get(type(value), "number")
