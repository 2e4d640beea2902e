"""Reads flags from a command line and a YAML file, and collects what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from openrlhf.config.dialect import Dialect, sections_joined
from openrlhf.config.flags import Flag
from openrlhf.config.help import COMMAND_FLAGS

ALIASES = {"value_prefix_head": "value_head_prefix"}


class Reader:
    """Turns words into values.

    Attributes:
        problems: one sentence for each mistake, in the order of the command line.
        broken: the flags that those sentences speak of; their values mean nothing.
        dialect: how the flags are spelled with dots.
        written: the names of the flags that were given, as they were written.
    """

    def __init__(self, table: dict[str, Flag]):
        self.table = table
        self.problems: list[str] = []
        self.broken: set[str] = set()
        self.dialect = Dialect(table)
        self.written: set[str] = set()

    def read(self, argv: list[str]) -> tuple[dict[str, Any], bool]:
        """Return ``(values of the given flags, dry_run)``; the command line wins over the YAML file."""
        words = dict(_split(argv))
        for stray in words.pop("", []):
            self._fail(None, f"unexpected argument {stray!r}: a value follows its flag, as in --pretrain NAME")
        dry_run = words.pop("dry_run", None)
        if dry_run:
            self._fail("dry_run", f"--dry_run is a switch and takes no value, got: {' '.join(dry_run)}")
        path = words.pop("config", None)
        if path is not None and len(path) != 1:
            self._fail("config", "--config takes one YAML file: write --config run.yaml")
            path = None
        given = self.convert(self._read_yaml(path[0]), f" in {path[0]}") if path else {}
        return given | self.convert(words, ""), dry_run is not None

    def explains(self, problem: str) -> bool:
        """Whether ``problem`` names a flag that could not be read: then it only repeats a known mistake."""
        return not self.broken.isdisjoint(re.findall(r"--(\w+)", problem))

    def _fail(self, name: str | None, text: str) -> None:
        self.problems.append(text)
        if name:
            self.broken.add(self.dialect.flat.get(name, name))

    def convert(self, words: Mapping[str, list[str] | None], where: str = "") -> dict[str, Any]:
        """Return the values that words by flag stand for; ``where`` says in messages where they were written."""
        values: dict[str, Any] = {}
        spelled: dict[str, str] = {}
        self.written |= set(words)
        for written, texts in words.items():
            name = ALIASES.get(written, self.dialect.flat.get(written, written))
            if name not in self.table:
                close = self._closest(name)
                hint = f"did you mean --{close}?" if close else "see --help for the flags of this command"
                self._fail(close or name, f"unknown flag --{written}{where}: {hint}")
                continue
            try:
                value = self.table[name].convert(self.dialect.read(written, texts)[1])
            except ValueError as error:
                self._fail(name, f"--{written}{where} {error}")
                continue
            if values.get(name, value) != value:
                both = f"--{spelled[name]} and --{written}{where}"
                self._fail(
                    name, f"{both} are one flag here, and have two values: give them the same, or leave one out"
                )
            values[name], spelled[name] = value, written
        return values

    def _closest(self, name: str) -> str | None:
        plain, names = name.replace("-", "_").lower(), [*self.table, *(row[0] for row in COMMAND_FLAGS)]
        names = [*self.dialect.flat] if "." in name else names
        longer = [other for other in names if plain and other.startswith(plain)]
        return next(iter(longer or get_close_matches(plain, names, 1)), None)

    def _read_yaml(self, path: str) -> dict[str, list[str] | None]:
        import yaml

        try:
            with open(path, encoding="utf-8") as file:
                content = yaml.safe_load(file)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            self._fail(None, f"--config {path} cannot be read: {' '.join(str(error).split())}")
            return {}
        if content is None:
            return {}
        if not isinstance(content, dict):
            self._fail(None, f"--config {path} must hold lines of the form flag: value")
            return {}
        content = sections_joined(content)
        for name in [name for name, value in content.items() if isinstance(value, dict)]:
            del content[name]
            self._fail(str(name), f"--{name} in {path} holds further names: the file is flat, as the command line is")
        return {str(name): self._yaml_words(str(name), value) for name, value in content.items()}

    def _yaml_words(self, name: str, value: Any) -> list[str] | None:
        """Return a YAML value as the words of a command line; null, and false where it is no switch, are None."""
        entry = self.table.get(self.dialect.flat.get(name, name))
        if value is None or (value is False and entry and entry.kind is not bool):
            return None
        return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _split(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield ``(flag, words)``; words before any flag have the flag ``""``. ``--flag=word`` is one word."""
    name, words = "", []
    for word in argv:
        if not word.startswith("--") or word == "--":
            words.append(word)
            continue
        if name or words:
            yield name, words
        name, equals, value = word[2:].partition("=")
        words = [value] if equals else []
    if name or words:
        yield name, words
