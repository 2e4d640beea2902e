"""Writing folders that are either whole or not there: hashes, fsync, rename."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

BLOCK = 1 << 22
WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin")
INDEX_SUFFIX = ".index.json"
ADAPTER_INDEX = "adapter_config.json"
# What torch.save says when the disk takes no more.
CUT_SHORT = ("inline_container", "StreamWriter", "iostream error")


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(root: Path, files: bool = True) -> None:
    """Wait until every folder under ``root``, and with ``files`` every file, is on the disk."""
    for folder, _, names in os.walk(root):
        for name in names if files else ():
            fsync(Path(folder, name))
        fsync(Path(folder))


def write_durably(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    path.write_text(text)
    fsync(path)


def tree_size(root: Path) -> int:
    """Return the bytes of the files under ``root``."""
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


def why(error: Exception) -> str:
    """Return what kept a file from being written; torch reports a full disk by where in the file it stopped."""
    if isinstance(error, RuntimeError) and any(word in str(error) for word in CUT_SHORT):
        return f"a file was cut short: no space left, or a quota or a limit on file sizes was met ({error})"
    return str(error)


def nearest_folder(path: Path) -> Path:
    """Return ``path`` or its nearest parent that is there. Raises ``NotADirectoryError`` if that is a file."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, not a folder")
    return there


def probe(folder: Path) -> None:
    """Write a small file to ``folder``, bring it to the disk and remove it. Raises ``OSError`` when that fails."""
    path = folder / f".openrlhf-probe-{os.getpid()}"
    try:
        write_durably(path, "probe")
    finally:
        path.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a folder with what is in it, or a file; of a link only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def publish_folder(staging: Path, target: Path) -> None:
    """Rename the whole folder ``staging`` to ``target``; an older ``target`` is kept as ``.old`` until
    that is done.
    """
    old = target.with_name(target.name + ".old")
    if target.exists():
        if old.exists():
            remove(old)
        target.rename(old)
    staging.rename(target)
    fsync(target.parent)
    if old.exists():
        remove(old)


def publish_model(staging: Path, target: Path) -> None:
    """Move a written Hugging Face model into place so that ``target`` never mixes the weights of two models.

    A new ``target`` appears by one rename. An existing one may hold other things (checkpoints, logs), which stay.
    There the files are moved one by one, the index of sharded weights and the config of an adapter are taken away
    first and come last, and weights that the new model does not have are removed: at any moment the folder loads the
    old model, the new one, or nothing.
    """
    fsync_tree(staging)
    if not target.exists():
        staging.rename(target)
        fsync(target.parent)
        return
    names = sorted((path.name for path in staging.iterdir()), key=lambda name: (_is_index(name), name))
    for path in list(target.iterdir()):
        if _is_index(path.name):
            path.unlink()
    stale = {path for pattern in WEIGHTS for path in target.glob(pattern)}
    for path in stale if any(map(_is_index, names)) else ():
        path.unlink()
    for name in names:
        os.replace(staging / name, target / name)
    for path in stale:
        if path.name not in names:
            path.unlink(missing_ok=True)
    staging.rmdir()
    fsync(target)


def _is_index(name: str) -> bool:
    """Return whether the file of that name says which weights are read."""
    return name.endswith(INDEX_SUFFIX) or name == ADAPTER_INDEX
