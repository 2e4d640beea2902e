"""Rewards that do not come from a model: a python file with ``reward_func``, checked before anything trusts it."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from openrlhf.errors import DataError
from openrlhf.rollout.reward_result import RewardResult, check_finite, names_of, spread

FUNCTION = "reward_func"
SIGNATURE = f"{FUNCTION}(queries, prompts, labels, **kwargs)"


class RewardFunction:
    """The ``reward_func`` of a python file.

    The function takes ``(queries, prompts)``, ``(queries, prompts, labels)`` or that and ``**kwargs``; it gives a
    tensor, a list, or ``{"rewards": ..., "scores": ..., "extra_logs": {name: ...}}``.

    Args:
        path: the python file.

    Raises:
        DataError: no such file, it fails to load, it has no usable ``reward_func``.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser().absolute()
        self._function = _load_function(self.path)
        self._takes_labels = _label_passing(self._function, self.path)

    def score(
        self,
        queries: Sequence[str],
        prompts: Sequence[str],
        labels: Sequence[str] | None = None,
        uids: Sequence[str] | None = None,
    ) -> RewardResult:
        """Return the rewards as :meth:`~openrlhf.rollout.reward_result.RewardSource.score` describes."""
        labels = [""] * len(queries) if labels is None else list(labels)
        names = names_of(len(queries), uids)
        columns = (list(queries), list(prompts), labels)
        try:
            returned = self._call(*columns)
        except Exception as error:
            self._blame_one(columns, names, error)
            raise DataError(self._explain(error)) from error
        return self._check(returned, names)

    def _call(self, queries: list[str], prompts: list[str], labels: list[str]) -> Any:
        if self._takes_labels == "positional":
            return self._function(queries, prompts, labels)
        if self._takes_labels == "keyword":
            return self._function(queries, prompts, labels=labels)
        return self._function(queries, prompts)

    def _blame_one(self, columns: tuple[list[str], ...], names: list[str], error: Exception) -> None:
        """Raise with the first query that fails by itself as the batch did; return when only the whole batch fails."""
        for name, query, prompt, label in zip(names, *columns, strict=True):
            try:
                self._call([query], [prompt], [label])
            except type(error) as alone:
                raise DataError(f"{self._explain(alone)} for {name}: {_excerpt(query)!r}") from alone
            except Exception as other:
                raise DataError(self._explain(error)) from other

    def _explain(self, error: Exception) -> str:
        return f"{_place_in(self.path, error)}: {FUNCTION} raised {type(error).__name__}: {error}"

    def _check(self, returned: Any, names: list[str]) -> RewardResult:
        if not isinstance(returned, dict):
            return RewardResult(self._numbers(returned, "rewards", names))
        if "rewards" not in returned:
            raise DataError(
                f"{self.path}: {FUNCTION} gave a dict without 'rewards'; keys: {', '.join(map(str, returned))}"
            )
        logs = returned.get("extra_logs") or {}
        if not isinstance(logs, dict):
            raise DataError(f"{self.path}: 'extra_logs' of {FUNCTION} is a dict; found {type(logs).__name__}")
        if returned.get("scores") is not None:
            logs = {**logs, "scores": returned["scores"]}
        extra = {
            str(name): self._numbers(spread(values, len(names)), str(name), names) for name, values in logs.items()
        }
        return RewardResult(self._numbers(returned["rewards"], "rewards", names), extra)

    def _numbers(self, values: Any, what: str, names: list[str]) -> list[float]:
        """Return ``values`` as one finite float a query."""
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, (list, tuple)):
            found = type(values).__name__
            raise DataError(
                f"{self.path}: {FUNCTION} should give {len(names)} {what}, one a query; it gave one {found}"
            )
        if len(values) != len(names):
            raise DataError(
                f"{self.path}: {FUNCTION} should give {len(names)} {what}, one a query; it gave {len(values)}"
            )
        numbers = [self._number(value, what, name) for value, name in zip(values, names, strict=True)]
        check_finite(numbers, what, names, f"{self.path}: {FUNCTION}")
        return numbers

    def _number(self, value: Any, what: str, name: str) -> float:
        value = value.tolist() if hasattr(value, "tolist") else value
        while isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if not isinstance(value, (int, float)):
            raise DataError(
                f"{self.path}: {FUNCTION} should give numbers as {what}; {name} got {type(value).__name__}"
            )
        return float(value)


def _load_function(path: Path) -> Callable[..., Any]:
    if not path.is_file():
        raise DataError(f"--remote_rm_url {path}: no such file")
    function = getattr(_load_module(path), FUNCTION, None)
    if function is None:
        close = difflib.get_close_matches(FUNCTION, _defined_names(path), n=1)
        hint = f"; it has {close[0]!r}" if close else ""
        raise DataError(f"{path}: defines no {FUNCTION}{hint}; write {SIGNATURE}")
    if not callable(function) or inspect.iscoroutinefunction(function):
        raise DataError(f"{path}: {FUNCTION} should be an ordinary function {SIGNATURE}")
    return function


def _load_module(path: Path) -> ModuleType:
    name = f"openrlhf_reward_{sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise DataError(f"{path}: not a python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise DataError(
            f"{_place_in(path, error)}: the file fails to load: {type(error).__name__}: {error}"
        ) from error
    return module


def _defined_names(path: Path) -> list[str]:
    words = (line.split("(")[0].split() for line in path.read_text(encoding="utf-8").splitlines())
    return [parts[-1] for parts in words if len(parts) > 1 and parts[-2] == "def"]


def _label_passing(function: Callable[..., Any], path: Path) -> str:
    """Return how the function takes labels: ``"positional"``, ``"keyword"`` or ``"no"``."""
    kinds = inspect.Parameter
    parameters = list(inspect.signature(function).parameters.values())
    in_order = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    rest = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    needed = sum(p.default is kinds.empty for p in in_order)
    keyword_only = [p for p in parameters if p.kind is kinds.KEYWORD_ONLY and p.default is kinds.empty]
    stray = [p.name for p in keyword_only if p.name != "labels"]
    if needed > 3 or (len(in_order) < 2 and not rest) or stray:
        raise DataError(f"{path}: {FUNCTION}{inspect.signature(function)} cannot be called; write {SIGNATURE}")
    if len(in_order) > 2 or rest:
        return "positional"
    by_name = any(p.kind is kinds.VAR_KEYWORD or p.name == "labels" for p in parameters)
    return "keyword" if by_name else "no"


def _place_in(path: Path, error: Exception) -> str:
    """Return ``file:line`` of the last frame of ``error`` inside ``path``."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f"{path}:{error.lineno}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
    return f"{path}:{frames[-1].lineno}" if frames else str(path)


def _excerpt(text: str, width: int = 120) -> str:
    return text if len(text) <= width else text[:width] + "..."
