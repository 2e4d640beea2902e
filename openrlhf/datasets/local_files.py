"""Data files on this machine: which of them hold a split, and whether every row can be read.

JSON rows are checked one by one before ``datasets`` sees the file, because only here the file, the line and the flag
to set are known together.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from openrlhf.config.groups import DATA_FORMATS
from openrlhf.datasets.fields import check_keys, check_row
from openrlhf.errors import DataError

LINE_LIMIT = 50 * 2**20
"""Bytes of one JSON line. A longer one is a file without line breaks, or not the data that was meant."""
Item = TypeVar("Item")
NO_ROWS = "no rows; give a file with at least one"
MAGIC = {b"\x1f\x8b": "a gzip file (.gz)", b"PAR1": "a parquet file (.parquet)", b"ARROW1": "an arrow file (.arrow)"}
NO_DATA = {"dataset_infos.json", "dataset_info.json", "configuration.json", "config.json"}
"""Files that hubs and libraries put beside the data."""
BOM = b"\xef\xbb\xbf"
SHARD = re.compile(r"-\d+-of-\d+$")
SPLIT_WORDS = re.compile(
    r"(^|[-_. ])(train(ing)?|test(ing)?|dev|val(id(ation)?)?|eval(uation)?)([-_. ]|$)", re.IGNORECASE
)


def format_of(path: Path) -> str | None:
    """Return the loader for a file by its extension (``.gz`` aside), or None when it is not a data file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        kind = DATA_FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in ("json", "csv") else None
    return DATA_FORMATS.get(suffixes[-1]) if suffixes else None


def split_name(path: Path) -> str:
    """Return the name of a data file without its extensions and shard number: the split it may hold."""
    name = path.name.removesuffix(".gz")
    return SHARD.sub("", name.rsplit(".", 1)[0])


def data_files(folder: Path, kind: str | None = None) -> dict[str, list[Path]]:
    """Return the data files of ``folder`` and its ``data`` subfolder by split name; ``kind`` keeps one format."""
    found: dict[str, list[Path]] = {}
    for place in (folder, folder / "data"):
        for path in sorted(place.iterdir()) if place.is_dir() else []:
            if path.name not in NO_DATA and path.is_file() and format_of(path) and kind in (None, format_of(path)):
                found.setdefault(split_name(path), []).append(path)
    return found


def files_of_split(named: Mapping[str, list[Path]], split: str, folder: Path) -> list[Path]:
    """Return the files that hold ``split``: ``train.jsonl``, else ``train-*`` / ``train_*``, else one ``*_train``.

    Where no file is named after any split, all of them are the split ``train``, as the hub has it.

    Raises:
        DataError: several files end in the name of the split, so that none of them is meant alone.
    """
    if split in named:
        return named[split]
    if split == "train" and not any(map(SPLIT_WORDS.search, named)):
        return [path for paths in named.values() for path in paths]
    begins = [path for name, paths in named.items() if re.match(re.escape(split) + r"[-_.]", name) for path in paths]
    if begins:
        return begins
    ends = [name for name in named if re.search(r"[-_.]" + re.escape(split) + "$", name)]
    if len(ends) > 1:
        raise DataError(f"{folder}: the split {split!r} could be {', '.join(ends)}; give the file itself")
    return named[ends[0]] if ends else []


def check_file(path: Path, required: Mapping[str, str]) -> None:
    """Read a JSON or CSV file once and raise on the first row that training could not use.

    Args:
        path: the data file; other formats carry their own schema and are checked after loading.
        required: key that every row must have -> flag that chooses the key.

    Raises:
        DataError: starts with ``file:line``.
    """
    kind = format_of(path)
    if kind == "json":
        _check_rows(path, required)
    elif kind == "csv":
        _check_table(path, required)


def some_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the first row of a JSON or CSV file, the last and some between, each with ``"file:line"``.

    No other JSON rows are parsed. A table without rows gives one of empty texts, for its columns.
    """
    if format_of(path) == "csv":
        lines = csv_rows(path)
        where, header = next(lines, ("", []))
        rows = spread(lines) or ([(where, [])] if header else [])
        return [(where, dict.fromkeys(header, "") | dict(zip(header, row, strict=False))) for where, row in rows]
    items = [(where, _parsed(item, where)) for where, item in spread(_json_items(path))]
    return [(where, row) for where, row in items if isinstance(row, dict)]


def spread(items: Iterable[Item], most: int = 16) -> list[Item]:
    """Return the first of ``items``, the last, and up to ``most`` between them, as far from each other as it goes."""
    kept: list[Item] = []
    stride, last = 1, None
    for number, item in enumerate(items):
        last = (number, item)
        if number % stride == 0:
            kept.append(item)
        if len(kept) > most:
            kept, stride = kept[::2], 2 * stride
    return [*kept, last[1]] if last and last[0] % stride else kept


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield ``("file:line", fields)`` of a CSV file, its header first."""
    csv.field_size_limit(LINE_LIMIT)
    with _open(path) as handle:
        reader = csv.reader(_text(raw, f"{path}:{number}") for number, raw in enumerate(handle, 1))
        try:
            yield from ((f"{path}:{reader.line_num}", row) for row in reader)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: bad CSV ({error})") from error


def _check_table(path: Path, required: Mapping[str, str]) -> None:
    rows = csv_rows(path)
    where, header = next(rows, (f"{path}:1", []))
    check_keys(header, required, where)
    count = 0
    for where, row in rows:
        count += bool(row)
        if len(row) > len(header):
            raise DataError(
                f"{where}: {len(row)} fields and the header has {len(header)}; quote the fields that hold a comma"
            )
    if not count:
        raise DataError(f"{path}: {NO_ROWS}")


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open a data file, unpacked; what cannot be read inside the block becomes a :class:`DataError`."""
    packed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            yield handle
    except (OSError, EOFError, zlib.error) as error:
        hint = "; is it really a whole gzip file?" if packed else ""
        raise DataError(f"{path}: cannot be read: {error}{hint}") from error


def _check_rows(path: Path, required: Mapping[str, str]) -> None:
    first_types: dict[str, tuple[str, str]] = {}
    where = ""
    for where, row in _json_rows(path):
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}: {_excerpt(str(row))}")
        check_row(row, required, where)
        for key in required:
            _check_type(key, row[key], where, first_types)
    if not where:
        raise DataError(f"{path}: {NO_ROWS}")


def _check_type(key: str, value: Any, where: str, first_types: dict[str, tuple[str, str]]) -> None:
    """A column has one type: the table format behind ``datasets`` refuses mixtures without saying where."""
    if value is None:
        return
    kind = "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
    first_kind, first_where = first_types.setdefault(key, (kind, where))
    if kind != first_kind:
        raise DataError(f"{where}: {key!r} is a {kind} here and a {first_kind} in {first_where}")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ``("file:line", value)`` of a file of JSON lines, or ``("file: item n", value)`` of one JSON list."""
    return ((where, _parsed(item, where)) for where, item in _json_items(path))


def _parsed(item: Any, where: str) -> Any:
    return _parse(item, where) if isinstance(item, bytes) else item


def _json_items(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield what :func:`_json_rows` yields, lines not yet parsed: bytes."""
    with _open(path) as handle:
        nothing_yet = True
        for number, raw in enumerate(iter(lambda: handle.readline(LINE_LIMIT + 1), b""), 1):
            if nothing_yet and raw.removeprefix(BOM).lstrip().startswith(b"["):
                rest = raw + handle.read()
                items = _parse(rest, f"{path}")
                yield from ((f"{path}: item {index}", item) for index, item in enumerate(items))
                return
            if len(raw) > LINE_LIMIT:
                raise DataError(
                    f"{path}:{number}: the line is longer than {LINE_LIMIT // 2**20} MB; write one JSON object a line"
                )
            if raw.removeprefix(BOM).strip():
                nothing_yet = False
                yield f"{path}:{number}", raw


def _parse(raw: bytes, where: str) -> Any:
    text = _text(raw, where)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half of a surrogate pair (\\ud...) is not text: {_excerpt(text)}") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: bad JSON at column {error.colno} ({error.msg}): {_excerpt(text)}; "
            "a file holds one JSON object a line, or one JSON list"
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: bad JSON ({error}): {_excerpt(text)}") from error
    return value


def _text(raw: bytes, where: str) -> str:
    """Return a line as text, without the mark that some editors put before the first."""
    try:
        return raw.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        kind = next((name for magic, name in MAGIC.items() if raw.startswith(magic)), None)
        hint = f"; it is {kind}: give the file that extension" if kind else "; save the file as UTF-8"
        raise DataError(f"{where}: not UTF-8 (byte {error.start}): {_excerpt(repr(raw), 40)}{hint}") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _excerpt(text: str, width: int = 80) -> str:
    text = text.strip()
    return text if len(text) <= width else text[:width] + "..."
