"""Which model a path stands for: what is kept of its answers holds as long as it is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 1 << 22
CONTENT = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.py")
"""The files of a folder that a model is made of."""


def model_identity(path: str) -> str | None:
    """Return what changes with any weight or setting of the model at ``path``; None where nobody can tell.

    Of a folder it is a hash of the content of its files, whose place and dates do not count; of a model of the hub it
    is the revision.
    """
    folder = Path(path)
    if not folder.is_dir():
        from transformers import PretrainedConfig

        return PretrainedConfig.get_config_dict(path)[0].get("_commit_hash")
    digest = hashlib.sha256()
    for file in sorted({file for pattern in CONTENT for file in folder.glob(pattern)}):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as content:
            while block := content.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
