"""The manifest of a checkpoint: what is in the folder, and how to tell that it still is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openrlhf.strategy import files

FORMAT = "openrlhf-checkpoint-1"
MANIFEST = "manifest.json"


def files_of(root: Path) -> list[str]:
    """Return the files under ``root``, relative to it, sorted."""
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def describe(root: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Bring files to the disk and return the size in bytes and the SHA-256 of each."""
    entries = {}
    for name in names:
        files.fsync(root / name)
        entries[name] = {"size": (root / name).stat().st_size, "sha256": files.sha256(root / name)}
    return entries


def write(root: Path, body: dict[str, Any]) -> None:
    """Write the manifest, which carries a hash of itself, and wait until it is on the disk.

    ``body`` holds step, layout, flags, state, score, and ``files`` as `describe` returns them.
    """
    body = json.loads(json.dumps({"format": FORMAT, **body}))
    files.write_durably(root / MANIFEST, json.dumps({"sha256": _digest(body), **body}, indent=1))


def read(root: Path) -> tuple[dict[str, Any], str | None]:
    """Return the manifest of a folder and None, or an empty one and what is wrong with it."""
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return {}, f"no readable {MANIFEST} ({type(error).__name__})"
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return {}, f"{MANIFEST} is not of the format {FORMAT}"
    if manifest.get("sha256") != _digest({key: value for key, value in manifest.items() if key != "sha256"}):
        return {}, f"{MANIFEST} does not match its own hash"
    return manifest, None


def first_damage(root: Path, entries: dict[str, dict[str, Any]], rank: int = 0, world_size: int = 1) -> str | None:
    """Compare this rank's share of the files with their entries; return what is wrong with the first that differs.

    A file that no entry names is damage too, because it may be read: only hidden ones, as network disks make, are not.
    """
    for name in sorted(entries)[rank::world_size]:
        try:
            damage = _damage(root, name, entries[name])
        except OSError as error:
            damage = f"{name} cannot be read ({error})"
        if damage:
            return damage
    strangers = set(files_of(root)) - {*entries, MANIFEST}
    for name in sorted(name for name in strangers if not Path(name).name.startswith(".")):
        return f"{name} does not belong to it"
    return None


def _damage(root: Path, name: str, entry: dict[str, Any]) -> str | None:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        return f"{name} leads outside the folder"
    if not path.is_file():
        return f"{name} is missing"
    if path.stat().st_size != entry["size"]:
        return f"{name} has {path.stat().st_size} bytes, not {entry['size']}"
    return None if files.sha256(path) == entry["sha256"] else f"{name} does not match its hash"


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
