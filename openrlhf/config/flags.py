"""How a flag is declared, how its words become a value, and the flat table of the flags of a command."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

KIND_NAMES = {int: "a whole number", float: "a number"}
SWITCH_WORDS = {"true": True, "false": False}


def flag(
    default: Any,
    text: str,
    *,
    choices: Iterable[Any] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
) -> Any:
    """Declare one flag as a dataclass field: its default, its help, and which values it takes."""
    limits = {"at_least": at_least, "at_most": at_most, "above": above}
    metadata = {"help": text, "choices": None if choices is None else tuple(choices), **limits}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Flag:
    """One flag of one command.

    Attributes:
        name: without dashes, e.g. ``"zero_stage"``.
        path: where its value lives, e.g. ``("deepspeed", "zero_stage")``.
        kind: the type of one value: ``bool``, ``int``, ``float`` or ``str``.
        count: how many values it takes: 0 for a switch, 1, 2, or -1 for one or more.
        optional: whether None is a value.
        default: the default of this command.
        metadata: help, choices and limits as declared.
        group: the first line of the docstring of its group.
    """

    name: str
    path: tuple[str, ...]
    kind: type
    count: int
    optional: bool
    default: Any
    metadata: Any
    group: str

    def value(self, config: Any) -> Any:
        """Return the value of this flag in ``config``."""
        for name in self.path:
            config = getattr(config, name)
        return config

    def convert(self, words: list[str] | None) -> Any:
        """Return the value that ``words`` stand for; None is the null of a YAML file.

        Raises:
            ValueError: with the rest of a sentence that begins with the name of the flag.
        """
        if words is None:
            if not self.optional:
                raise ValueError(f"needs a value; leave it out for its default {self.default!r}")
            return None
        if self.count == 0:
            return self._switch(words)
        needed = {1: "one value", -1: "one value or more"}.get(self.count, f"{self.count} values")
        if not words or self.count not in (-1, len(words)):
            got = f"got {len(words)}: {' '.join(words)}" if words else "got none"
            raise ValueError(f"takes {needed}, {got}")
        values = tuple(self._one(word) for word in words)
        return values[0] if self.count == 1 else values

    def _switch(self, words: list[str]) -> bool:
        if not words:
            return True
        if len(words) > 1 or words[0].lower() not in SWITCH_WORDS:
            raise ValueError(f"is a switch and takes no value, got: {' '.join(words)}")
        return SWITCH_WORDS[words[0].lower()]

    def _one(self, word: str) -> Any:
        value: Any = word
        if self.kind is not str:
            try:
                value = float(word) if self.kind is float or not word.lstrip("+-").isdigit() else int(word)
            except ValueError:
                value = math.nan
            if math.isnan(value) or (self.kind is int and not float(value).is_integer()):
                raise ValueError(f"takes {KIND_NAMES[self.kind]}, got {word!r}")
            value = self.kind(value)
        choices = self.metadata["choices"]
        if choices is not None and value not in choices:
            raise ValueError(f"must be one of {', '.join(map(str, choices))}, got {word!r}")
        self._check_limits(value)
        return value

    def _check_limits(self, value: Any) -> None:
        low, high, above = (self.metadata[name] for name in ("at_least", "at_most", "above"))
        if low is not None and value < low:
            raise ValueError(f"must be at least {low:g}, got {value:g}")
        if above is not None and value <= above:
            raise ValueError(f"must be above {above:g}, got {value:g}")
        if high is not None and value > high:
            raise ValueError(f"must be at most {high:g}, got {value:g}")
        if (low is not None or above is not None) and math.isinf(value):
            raise ValueError("must be finite")


def _shape(hint: Any) -> tuple[type, int, bool]:
    """Return ``(kind, count, optional)`` of a type hint such as ``tuple[float, float]`` or ``str | None``."""
    members = [member for member in get_args(hint) if member is not type(None)]
    if get_origin(hint) is tuple:
        return members[0], -1 if Ellipsis in members else len(members), False
    if type(None) in get_args(hint):
        kind, count, _ = _shape(members[0])
        return kind, count, True
    return hint, 0 if hint is bool else 1, False


def _walk(config: Any, path: tuple[str, ...]) -> Iterable[Flag]:
    hints = get_type_hints(type(config))
    group = (type(config).__doc__ or "").partition("\n")[0].rstrip(".")
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from _walk(value, (*path, item.name))
        else:
            kind, count, optional = _shape(hints[item.name])
            yield Flag(item.name, (*path, item.name), kind, count, optional, value, item.metadata, group)


@cache
def flag_table(config_class: Any) -> dict[str, Flag]:
    """Return the flags of a command by name, in the order of its groups."""
    table = {}
    for entry in _walk(config_class(), ()):
        if entry.name in table:
            raise TypeError(f"{config_class.__name__} declares --{entry.name} twice")
        table[entry.name] = entry
    return table
