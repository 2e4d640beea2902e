"""Folders that ``save_to_disk`` of the datasets library wrote: what their own files name lies in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from openrlhf.errors import DataError
from openrlhf.paths import inside

SPLITS, STATE = "dataset_dict.json", "state.json"


def is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` wrote ``folder``."""
    return any((folder / mark).is_file() for mark in (SPLITS, STATE))


def check_saved(folder: Path) -> None:
    """Raise DataError when a split or a data file that the folder names is not in it."""
    parts = [folder]
    if (folder / SPLITS).is_file():
        parts = [inside(folder, name, f"{folder / SPLITS}") for name in _entries(folder / SPLITS, "splits")]
    for part in parts:
        state = part / STATE
        for entry in _entries(state, "_data_files") if state.is_file() else []:
            inside(part, entry.get("filename") if isinstance(entry, dict) else entry, f"{state}")


def _entries(path: Path, key: str) -> list[Any]:
    """Return the list under ``key`` of a JSON object."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))[key]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path}: no list {key!r} ({type(error).__name__})") from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: {key!r} is no list")
    return entries
