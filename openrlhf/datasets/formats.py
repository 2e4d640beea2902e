"""TRL's standard formats: columns whose names say what they hold, so that no key flag is needed.

A key flag that was set wins, and so does the default of one where the data has that column. See
https://huggingface.co/docs/trl/dataset_formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from openrlhf.datasets.fields import is_blank
from openrlhf.errors import DataError

Keys = Mapping[str, str | None]

DEMONSTRATIONS: tuple[Keys, ...] = (
    {"input_key": "messages", "output_key": None},
    {"input_key": "prompt", "output_key": "completion"},
)
RAW_TEXTS: tuple[Keys, ...] = ({"input_key": "text"},)
PROMPTS: tuple[Keys, ...] = ({"input_key": "prompt"},)
PAIRS: tuple[Keys, ...] = (
    {"prompt_key": "prompt", "chosen_key": "chosen", "rejected_key": "rejected"},
    {"prompt_key": None, "chosen_key": "chosen", "rejected_key": "rejected"},
)
UNPAIRED: tuple[Keys, ...] = ({"input_key": "prompt", "output_key": "completion", "label_key": "label"},)
STEPWISE: tuple[Keys, ...] = ({"input_key": "prompt", "steps_key": "completions", "label_key": "labels"},)
STEP_END = "\ufdd2"
"""A noncharacter of Unicode, which no text holds: it stands for the placeholder until a text is tokenised."""
KEYS = ("input_key", "output_key", "prompt_key", "chosen_key", "rejected_key", "label_key", "steps_key")


def recognise(cfg: Any, formats: Sequence[Keys], columns: Collection[str]) -> dict[str, str | None]:
    """Return ``{key flag: column}`` of the first format that the columns hold and no key flag contradicts, or ``{}``.

    Args:
        cfg: a dataclass with key flags among its fields.
    """
    for keys in formats:
        wanted = {name: _chosen(cfg, name, columns) for name in KEYS}
        fits = all(column in (None, keys.get(name)) for name, column in wanted.items())
        if fits and all(column in columns for column in keys.values() if column):
            return dict(keys)
    return {}


def with_standard_keys(cfg: Any, formats: Sequence[Keys], rows: Sequence[tuple[str, Mapping]]) -> tuple[Any, str]:
    """Return ``cfg`` with the keys of the format that the rows have, and what that changed as words of a command line.

    Where these columns hold messages the chat template is switched on. Nothing changes for rows of no such format.

    Args:
        rows: some of the data, each with where it stands. Those that leave one of the columns blank say nothing where
            there are others.

    Raises:
        DataError: two rows have different formats; names both.
    """
    if getattr(cfg, "pretrain_mode", False):
        formats = RAW_TEXTS
    columns = {column for keys in formats for column in keys.values()}
    telling = [row for row in rows if not any(is_blank(value) for name, value in row[1].items() if name in columns)]
    if not (rows := telling or rows[:1]):
        return cfg, ""
    where, first = rows[0]
    found, words = _keys_of(cfg, formats, first)
    columns = {getattr(found, name, None) for name in KEYS}
    for other, row in rows[1:]:
        differs, others_words = _keys_of(cfg, formats, row)
        # A column that is not there, or of another type, is an error that says more when the rows are loaded.
        if differs != found and all(type(row.get(name)) is type(first.get(name)) for name in columns):
            read, reads = (f"with {flags}" if flags else "as the flags say" for flags in (words, others_words))
            raise DataError(
                f"{where} is to be read {read}, but {other} {reads}: rows of one data set have one format; make them "
                "alike, or name every column with its key flag"
            )
    return found, words


def _keys_of(cfg: Any, formats: Sequence[Keys], row: Mapping[str, Any]) -> tuple[Any, str]:
    keys = recognise(cfg, [keys for keys in formats if not _holds_prompt(row, keys)], row)
    known = {item.name for item in fields(cfg)}
    changes: dict[str, Any] = {name: column for name, column in keys.items() if name in known}
    if any(_is_conversation(row[column]) for column in keys.values() if column):
        changes["apply_chat_template"] = True
    changes = {name: value for name, value in changes.items() if getattr(cfg, name) != value}
    words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in changes.items() if value]
    return replace(cfg, **changes), " ".join(words)


def shared_prompt(chosen: Sequence[Mapping], rejected: Sequence[Mapping]) -> int:
    """Return how many messages two conversations share before the first answer in which they differ."""
    most = min(len(chosen), len(rejected)) - 1
    start = next((index for index in range(most) if chosen[index] != rejected[index]), most)
    while start > 0 and {chosen[start]["role"], rejected[start]["role"]} != {"assistant"}:
        start -= 1
    return start


def stepwise_text(steps: Any, labels: Any, where: str) -> str:
    """Return a solution given in steps as one text: a line a step, each ending in a space and :data:`STEP_END`.

    Raises:
        DataError: the steps are no texts, or there are not as many labels; says ``where``.
    """
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise DataError(f"{where}: the steps of a solution are a list of texts; found {type(steps).__name__}")
    if not isinstance(labels, list) or len(labels) != len(steps):
        count = len(labels) if isinstance(labels, list) else type(labels).__name__
        raise DataError(f"{where}: {len(steps)} steps and {count} labels; give one label a step")
    return "\n".join(f"{step} {STEP_END}" for step in steps)


def _chosen(cfg: Any, name: str, columns: Collection[str]) -> str | None:
    """Return the column that a key flag asks for; None where it has its default and the data no such column."""
    value = getattr(cfg, name, None)
    default = next((item.default for item in fields(cfg) if item.name == name), None)
    return None if value == default and value not in columns else value


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "role" in part for part in value)


def _holds_prompt(row: Mapping[str, Any], keys: Keys) -> bool:
    """Whether the answers of a pair bring their prompt along, as both texts' beginning or in the first messages."""
    prompt, *answers = (row.get(keys.get(name) or "") for name in ("prompt_key", "chosen_key", "rejected_key"))
    if _is_conversation(answers[0]):
        return prompt is not None and answers[0][0]["role"] != "assistant"
    if not all(isinstance(text, str) for text in (prompt, *answers)):
        return False
    return bool(prompt) and all(answer.startswith(prompt) for answer in answers)
