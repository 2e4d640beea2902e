"""Rewriting the commands of a shell script from flat flags into dotted ones and back; all else stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any

from openrlhf.config.dialect import SWITCHES, Dialect
from openrlhf.config.flags import Flag, flag_table
from openrlhf.config.help import COMMAND_FLAGS
from openrlhf.config.reader import ALIASES
from openrlhf.config.shell import Word, commands

CONFIGS = {
    "train_sft": "openrlhf.config.supervised:SFTConfig",
    "train_rm": "openrlhf.config.supervised:RewardModelConfig",
    "train_dpo": "openrlhf.config.supervised:DPOConfig",
    "train_kto": "openrlhf.config.supervised:KTOConfig",
    "train_kd": "openrlhf.config.supervised:KDConfig",
    "train_prm": "openrlhf.config.supervised:PRMConfig",
    "train_ppo": "openrlhf.config.ppo:PPOConfig",
    "train_ppo_ray": "openrlhf.config.ppo_ray:RayPPOConfig",
    "serve_rm": "openrlhf.config.serve:ServeConfig",
    "batch_inference": "openrlhf.config.inference:BatchInferenceConfig",
}
"""Where the flags of each command are."""
FLAT, DOTTED = "flat", "dotted"
MODULE = re.compile(r"(?:.*openrlhf[./]cli[./])(\w+?)(?:\.py)?")
FLAG = re.compile(r"--([A-Za-z][\w.]*)")


@cache
def config_class(command: str) -> Any:
    """Return the configuration class of a command."""
    module, _, name = CONFIGS[command].partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True)
class Given:
    """A flag of a command in a script.

    Attributes:
        before: behind the word that stands before it.
        start: of its first dash.
        end: behind its name.
        until: behind its last value.
        name: without dashes.
        values: as they are written.
    """

    before: int
    start: int
    end: int
    until: int
    name: str
    values: tuple[str, ...]


@dataclass
class Migration:
    """A script in the other dialect.

    Attributes:
        text: the script.
        to: the dialect that it is in now.
        found: how many flags of known commands there are.
        notes: what to tell, one sentence each.
    """

    text: str
    to: str
    found: int = 0
    notes: list[str] = field(default_factory=list)


def migrated(text: str, to: str | None = None) -> Migration:
    """Return a shell script with the flags of its commands in the dialect ``to``; by default in the other one.

    Comments, quoting, the order of the flags and continued lines stay as they are.
    """
    found = [(command, list(_flags(command, words))) for command, words in _ours(text)]
    names = [given.name for _, flags in found for given in flags]
    goal = to or (FLAT if any("." in name for name in names) else DOTTED)
    result = Migration(text, goal, len(names))
    edits: list[tuple[int, int, str]] = []
    for command, flags in found:
        edits += _Rewriter(text, command, goal, result.notes).edits(flags)
    for start, end, new in sorted(edits, reverse=True):
        result.text = result.text[:start] + new + result.text[end:]
    return result


def _ours(text: str) -> list[tuple[str, list[Word]]]:
    """Return name and words behind it of every command of this project; a list of flags belongs to the only one."""
    found: list[tuple[str, list[Word]]] = []
    loose: list[list[Word]] = []
    for words in _all_commands(text):
        place = next((index for index, word in enumerate(words) if _name(word)), None)
        if place is not None:
            found.append((_name(words[place]), words[place:]))
        elif FLAG.match(words[0].text):
            loose.append(words)
    if len({command for command, _ in found}) == 1:
        found += [(found[0][0], words) for words in loose]
    return found


def _all_commands(text: str) -> Iterator[list[Word]]:
    """Yield the commands of a script, also those that stand in a string."""
    for words in commands(text):
        yield words
        for word in words:
            inner = word.inside
            if inner is not word and "openrlhf" in inner.text and re.search(r"\s", inner.text):
                yield from commands(text, inner.start, inner.end)


def _name(word: Word) -> str:
    found = MODULE.fullmatch(word.inside.text)
    return found[1] if found and found[1] in CONFIGS else ""


def _flags(command: str, words: Sequence[Word]) -> Iterator[Given]:
    """Yield the flags of a command with the values that belong to them."""
    table = flag_table(config_class(command))
    dialect = Dialect(table)
    places = [index for index, word in enumerate(words) if FLAG.match(word.text)]
    for number, place in enumerate(places):
        word, last = words[place], (places[number + 1] if number + 1 < len(places) else len(words))
        match = FLAG.match(word.text)
        name = match[1]
        values = [] if "=" in word.text else words[place + 1 : last]
        entry = table.get(ALIASES.get(name, dialect.flat.get(name, name)))
        values = values[: _count(entry, name, values)]
        until = values[-1].end if values else word.end
        before = words[place - 1].end if place else word.start
        spelled = tuple(value.inside.text for value in values)
        if "=" in word.text:
            spelled = (word.text.partition("=")[2],)
        yield Given(before, word.start, word.start + match.end(), until, name, spelled)


def _count(entry: Flag | None, name: str, values: Sequence[Word]) -> int:
    if name in SWITCHES:
        return 1
    return len(values) if entry is None or entry.count < 0 else entry.count


class _Rewriter:
    """Rewrites one command."""

    def __init__(self, text: str, command: str, goal: str, notes: list[str]):
        self.text, self.command, self.goal, self.notes = text, command, goal, notes
        self.table = flag_table(config_class(command))
        self.dialect = Dialect(self.table)

    def edits(self, flags: Sequence[Given]) -> list[tuple[int, int, str]]:
        """Return what to put in place of which characters."""
        found = []
        seen: dict[str, tuple[str, ...]] = {}
        for given in flags:
            edit = self._dotted(given) if self.goal == DOTTED else self._flat(given, seen)
            if edit is not None:
                found.append(edit)
        if self.goal == FLAT and any("." in given.name for given in flags):
            self._tell_type(flags)
        return found

    def _dotted(self, given: Given) -> tuple[int, int, str] | None:
        flat = ALIASES.get(given.name, given.name)
        names = self.dialect.write(flat)
        if not names:
            self._tell_unknown(given)
            return None
        rest = self.text[given.end : given.until]
        if rest and names[0].split()[0] in SWITCHES:
            return None  # --bf16=false has no dotted form of its own, and is read as it is
        return given.start, given.until, " ".join(f"--{name}{rest}" for name in names)

    def _flat(self, given: Given, seen: dict[str, tuple[str, ...]]) -> tuple[int, int, str] | None:
        flat = self.dialect.flat.get(given.name)
        if flat is None:
            self._tell_unknown(given)
            return None
        if given.name in SWITCHES:
            state = SWITCHES[given.name].get(" ".join(given.values))
            if state is None:
                self.notes.append(f"--{given.name} {' '.join(given.values)} has no flat form and stays")
                return None
            return (given.start, given.until, f"--{flat}") if state == "true" else (given.before, given.until, "")
        if seen.get(flat) == given.values:
            return given.before, given.until, ""
        if flat in seen:
            self.notes.append(f"--{given.name}: --{flat} is given with other values before; leave one of them")
        seen[flat] = given.values
        return given.start, given.end, f"--{flat}"

    def _tell_unknown(self, given: Given) -> None:
        """Tell of a flag that is no flag of this command in either dialect."""
        shared = {row[0] for row in COMMAND_FLAGS}
        if given.name not in self.table and given.name not in self.dialect.flat and given.name not in shared:
            self.notes.append(f"--{given.name} is no flag of {self.command} here and stays")

    def _tell_type(self, flags: Sequence[Given]) -> None:
        if not any(given.name in ("ds.param_dtype", "bf16") for given in flags):
            self.notes.append(
                f"{self.command} names no data type: the dotted default is bf16, the flat one fp32; add --bf16"
            )
