"""One source of rows: a local file, a folder, a data set saved to disk, or one of the hub.

An entry of ``--dataset a,b`` is a data file (json, jsonl, csv, parquet, arrow), a folder (``save_to_disk``, or files
named after their split), ``type@folder`` (``json@./data`` reads ``train.jsonl`` and ``test.jsonl``) or a hub name.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openrlhf import device
from openrlhf.config.groups import DATA_FORMATS
from openrlhf.datasets.fields import check_keys
from openrlhf.datasets.local_files import check_file, csv_rows, data_files, files_of_split, format_of, spread
from openrlhf.datasets.local_files import some_rows as some_rows_of_file
from openrlhf.datasets.saved import check_saved, is_saved
from openrlhf.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

OPTIONAL_COLUMNS = ("margin", "datasource")


def load_split(
    entry: str, split: str, *, flag: str, required: Mapping[str, str], or_only_split: bool = False
) -> Dataset | None:
    """Return one split of one source, or None when it is not there.

    Args:
        or_only_split: a source with a single split gives that one whatever its name; no such split is then an error.
    """
    splits = _open_source(entry, split, flag, required)
    rows = splits.get(split)
    if rows is None and or_only_split:
        if len(splits) != 1:
            there = ", ".join(sorted(splits)) or "none"
            raise DataError(f"{flag} {entry}: no split {split!r}; splits there: {there}")
        rows = next(iter(splits.values()))
    if rows is None:
        return None
    if len(rows) == 0:
        raise DataError(f"{flag} {entry}: the split {split!r} has no rows; give data with at least one")
    check_keys(rows.column_names, required, f"{flag} {entry}")
    keep = [name for name in rows.column_names if name in required or name in OPTIONAL_COLUMNS]
    return rows.select_columns(keep) if required else rows


def is_here(entry: str) -> bool:
    """Return whether an entry means something on this machine, there or not, rather than a data set of a hub."""
    text, _, data_dir = entry.partition("@")
    a_type = bool(data_dir) and f".{text.removeprefix('.')}" in DATA_FORMATS
    return a_type or text.startswith((".", "/", "~")) or format_of(Path(text)) is not None or Path(text).exists()


def some_rows(entry: str, split: str, *, flag: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the first row of a source, the last and some between, each with where it stands.

    JSON and CSV files are judged one by one, and before ``datasets`` sees them.
    """
    found = _local_files(entry, split, flag)
    if found and found[1] and format_of(found[1][0]) in ("json", "csv"):
        return [row for path in found[1] for row in some_rows_of_file(path)]
    rows = load_split(entry, split, flag=flag, required={}, or_only_split=True)
    return [(f"{flag} {entry}: row {number}", rows[number]) for number in spread(range(len(rows)))]


def _open_source(entry: str, split: str, flag: str, required: Mapping[str, str]) -> dict[str, Any]:
    """Return ``{split name: rows}`` of one entry; of a folder with several splits only ``split`` is read."""
    found = _local_files(entry, split, flag)
    if found:
        own_name, paths, names = found
        return {own_name: _load_files(paths, required)} if paths else dict.fromkeys(names)
    text, _, data_dir = entry.partition("@")
    path = _folder(text, data_dir)
    if is_saved(path):
        check_saved(path)
        return _as_splits(_call_datasets("load_from_disk", f"{flag} {entry}", str(path)))
    if text.startswith((".", "/", "~")):
        _existing(path, flag)
    if path.is_file():
        kinds = ", ".join(DATA_FORMATS)
        raise DataError(f"{flag} {path}: not a data file by its name; give it one of the extensions {kinds}")
    if not path.exists() and not (data_dir and Path(data_dir).expanduser().is_dir()):
        _check_hub(text, f"{flag} {entry}")
    return _as_splits(_call_datasets("load_dataset", f"{flag} {entry}", text, data_dir=data_dir or None))


def _local_files(entry: str, split: str, flag: str) -> tuple[str, list[Path], list[str]] | None:
    """Return ``(split, its data files, all splits)`` of an entry that is a data file or a folder of them, else None.

    A folder with files of one split gives these, whatever the split is called.
    """
    text, _, data_dir = entry.partition("@")
    kind = DATA_FORMATS.get(f".{text.removeprefix('.')}") if data_dir else None
    if kind:
        return _files_in(_existing(Path(data_dir).expanduser(), flag), kind, split)
    path = _folder(text, data_dir)
    if path.suffix == ".py" or (path / f"{path.name}.py").is_file():
        raise DataError(f"{flag} {entry}: data set scripts are not run; save the rows as .jsonl or .parquet instead")
    if format_of(path):
        return "train", [_existing(path, flag)], ["train"]
    if not is_saved(path) and path.is_dir() and data_files(path):
        return _files_in(path, None, split)
    return None


def _folder(text: str, data_dir: str) -> Path:
    path = Path(text).expanduser()
    return path / data_dir if data_dir and path.is_dir() else path


def _check_hub(name: str, entry: str) -> None:
    """Raise DataError when a data set is not in the cache and the hub is out of reach: it would be tried for long."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, own_name = name.split("/")
    cached = Path(config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(own_name)]))
    if config.HF_HUB_OFFLINE or cached.is_dir():
        return
    if reason := device.why_unreachable(config.HF_ENDPOINT):
        raise DataError(
            f"{entry}: no such file or folder here, and the hub cannot be reached ({config.HF_ENDPOINT}: {reason}); "
            "name a local file, or download the data where there is a network"
        )


def _files_in(folder: Path, kind: str | None, split: str) -> tuple[str, list[Path], list[str]]:
    named = data_files(folder, kind)
    if not named:
        raise DataError(f"{folder}: no {kind or 'data'} files in this folder")
    paths = files_of_split(named, split, folder)
    if not paths and len(named) == 1:
        split, paths = next(iter(named.items()))
    kinds = {format_of(path) for path in paths}
    if len(kinds) > 1:
        raise DataError(f"{folder}: the split {split!r} is there as {' and '.join(sorted(map(str, kinds)))}; keep one")
    return split, paths, list(named)


def _load_files(paths: list[Path], required: Mapping[str, str]) -> Dataset:
    for path in paths:
        check_file(path, required)
    kind, names = format_of(paths[0]), [str(path) for path in paths]
    options = _csv_options(paths, required) if kind == "csv" else {}
    options |= {"name": _version(paths), "data_files": names, "split": "train"}
    return _call_datasets("load_dataset", ", ".join(names), kind, **options)


def _version(paths: list[Path]) -> str:
    """Return a name for the content of files, which ``datasets`` keeps under it: other files of the same path and age,
    as archives unpack them, would be taken for these. The time of a change to an inode cannot be set.
    """
    stats = [path.stat() for path in paths]
    text = repr([(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _csv_options(paths: list[Path], required: Mapping[str, str]) -> dict[str, Any]:
    """Return what makes pandas keep the required columns as the text they are: ``007``, ``72`` and ``None`` too."""
    if not required:
        return {}
    columns = {name for path in paths for name in next(csv_rows(path))[1]}
    return {
        "converters": dict.fromkeys(columns & set(required), str),
        "keep_default_na": False,
        "na_values": [""],
    }


def _call_datasets(function: str, entry: str, *args: Any, **kwargs: Any) -> Any:
    """Call ``datasets.<function>``; what goes wrong inside becomes a :class:`DataError` that names the entry."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return getattr(datasets, function)(*args, **kwargs)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{entry}: cannot be loaded: {reason[0]}; is it whole, and what its name says?") from error


def _as_splits(loaded: Any) -> dict[str, Any]:
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _existing(path: Path, flag: str) -> Path:
    if path.exists():
        return path
    siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"; perhaps you meant {path.parent / close[0]}" if close else ""
    raise DataError(f"{flag} {path}: no such file or folder{hint}")
