"""File names that come out of a file: they may not lead out of the folder they speak of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from openrlhf.errors import DataError

LONGEST = 255
"""Characters of a file name that file systems take."""


def inside(root: Path, name: Any, where: str) -> Path:
    """Return ``root / name`` when ``name`` names something in the folder ``root``, after links are followed.

    A link may lead to a file of the hub's cache: the hub's client fills folders with such links.

    ``where`` says in messages what the name stands in.

    Raises:
        DataError: it is no name, or leads elsewhere.
    """
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST or "\0" in name:
        raise DataError(f"{where}: {_excerpt(name)} is not the name of a file")
    # A name that climbs out and comes back in would depend on what lies around the folder.
    plain = not Path(name).is_absolute() and ".." not in Path(name).parts
    try:
        target = (root / name).resolve()
        contained = plain and (target.is_relative_to(_boundary(root.resolve())) or _is_cached(target))
    except (OSError, RuntimeError) as error:
        raise DataError(f"{where}: {_excerpt(name)} cannot be followed: {type(error).__name__}") from error
    if not contained:
        raise DataError(f"{where}: {_excerpt(name)} leads out of the folder {root}; put the file itself there")
    return root / name


def no_links_out(root: Path, files: Iterable[Path], where: str) -> None:
    """Raise DataError when one of ``files``, which lie in ``root``, is a link to something outside."""
    for file in files:
        if file.is_symlink():
            inside(root, file.name, where)


def _boundary(root: Path) -> Path:
    """Return the folder that holds what ``root`` may link to: itself, or the model's part of the hub's cache.

    There ``models--x/snapshots/<revision>/`` links to ``models--x/blobs/``.
    """
    in_cache = root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()
    return root.parent.parent if in_cache else root


def _is_cached(path: Path) -> bool:
    """Return whether ``path`` is where the hub's cache keeps a file: ``models--x/blobs/<hash>``."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith(("models--", "datasets--"))


def _excerpt(name: Any, width: int = 80) -> str:
    text = repr(name)
    return text if len(text) <= width else text[:width] + "..."
