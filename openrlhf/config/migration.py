"""Rewriting the commands of a shell script from flat flags into dotted ones and back; all else stays as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from openrlhf.config.commands import COMMANDS, CONFIGS, config_class
from openrlhf.config.dialect import GUESSED, OF_BOTH, SWITCHES, Dialect
from openrlhf.config.flags import Flag, flag_table
from openrlhf.config.help import COMMAND_FLAGS
from openrlhf.config.reader import ALIASES
from openrlhf.config.shell import Word, commands

FLAT, DOTTED = "flat", "dotted"
IN_DOTS = ("train_sft", "train_rm", "train_dpo", "train_ppo_ray")
"""The commands whose flags have dots in OpenRLHF 0.10 and later."""
MODULE = re.compile(r"(?:.*openrlhf[./]cli[./])(\w+?)(?:\.py)?")
CONSOLE = re.compile(r"(?:.*/)?openrlhf")
FLAG = re.compile(r"--([A-Za-z][\w.]*)")


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
    result.notes = list(dict.fromkeys(result.notes))
    for start, end, new in sorted(edits, reverse=True):
        result.text = result.text[:start] + new + result.text[end:]
    return result


def _ours(text: str) -> list[tuple[str, list[Word]]]:
    """Return name and words behind it of every command of this project; a list of flags belongs to the only one."""
    found: list[tuple[str, list[Word]]] = []
    loose: list[list[Word]] = []
    for words in _all_commands(text):
        place = next((index for index in range(len(words)) if _name(words, index)), None)
        if place is not None:
            found.append((_name(words, place), words[place:]))
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


def _name(words: Sequence[Word], index: int) -> str:
    """Return the command that a word names, the console script with the short name behind it; ``""`` if none."""
    word = words[index].inside.text
    module = MODULE.fullmatch(word)
    name = module[1] if module else ""
    is_value = index > 0 and FLAG.match(words[index - 1].text)
    if name == "main" or (CONSOLE.fullmatch(word) and not is_value):
        short = words[index + 1].inside.text if index + 1 < len(words) else ""
        name = COMMANDS[short][0] if short in COMMANDS else ""
    return name if name in CONFIGS else ""


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
        self._tell_type(flags)
        if self.goal == DOTTED and flags:
            self._tell_other_versions(flags)
        return found

    def _dotted(self, given: Given) -> tuple[int, int, str] | None:
        names = self._dotted_names(given)
        if not names:
            self._tell_unknown(given)
            return None
        rest = self.text[given.end : given.until]
        return given.start, given.until, " ".join(f"--{name}{rest}" for name in names)

    def _dotted_names(self, given: Given) -> list[str]:
        """Return how the dotted forms of a flag begin; --bf16=false has none, and is read as it is."""
        names = self.dialect.write(ALIASES.get(given.name, given.name))
        has_rest = given.until > given.end
        return [] if names and has_rest and names[0].split()[0] in SWITCHES else names

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
        """Tell of a data type that is left to the default, which is another one here and there."""
        if any(given.name in ("ds.param_dtype", "bf16") for given in flags):
            return
        if self.goal == FLAT and any("." in given.name for given in flags):
            fix = "add --bf16"
        elif self.goal == DOTTED and flags and self.command in IN_DOTS:
            fix = "name it with --ds.param_dtype"
        else:
            return
        self.notes.append(
            f"{self.command} names no data type: the default is fp32 here, and bf16 in OpenRLHF 0.10 and later; {fix}"
        )

    def _tell_other_versions(self, flags: Sequence[Given]) -> None:
        """Tell what of a command with dots would not run, or might not, in OpenRLHF 0.10."""
        if self.command not in IN_DOTS:
            self.notes.append(
                f"{self.command}: its dotted flags are read here; OpenRLHF 0.10 has them for {', '.join(IN_DOTS)}"
            )
            return
        ours = {*self.table, *ALIASES, *(row[0] for row in COMMAND_FLAGS)} - OF_BOTH
        flat = [given.name for given in flags if given.name in ours and not self._dotted_names(given)]
        if flat:
            self.notes.append(
                f"{self.command}: no dotted form, so these stay as they are, and OpenRLHF 0.10 does not know them: "
                + ", ".join(f"--{name}" for name in dict.fromkeys(flat))
            )
        guessed = [name for given in flags for name in self._dotted_names(given) if name in GUESSED]
        if guessed:
            self.notes.append(
                f"{self.command}: OpenRLHF 0.10 may spell these otherwise: "
                + ", ".join(f"--{name}" for name in dict.fromkeys(guessed))
            )
