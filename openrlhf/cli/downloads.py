"""``--use_ms``: models and data sets of ModelScope are fetched into its cache, then used as the folders they are.

The only place that imports ``modelscope``. Every rank asks; the first to come on a machine fetches, the others wait.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from openrlhf import device
from openrlhf.config.arguments import with_values
from openrlhf.config.flags import flag_table
from openrlhf.datasets.cache import alone
from openrlhf.datasets.sources import is_here
from openrlhf.errors import DataError

MODELS = ("pretrain", "ref_pretrain", "reward_pretrain", "critic_pretrain", "prm_pretrain", "teacher_model")
DATA = ("dataset", "eval_dataset", "prompt_data", "pretrain_data")
NAME = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
DUPLICATES = ["original/*"]
"""Weights that some models bring a second time, in the format of their maker."""


def fetched(config: Any) -> Any:
    """Return ``config`` with a folder in place of every ModelScope name; without ``--use_ms`` as it is.

    Files and folders of this machine stay as they are named.

    Raises:
        DataError: something is neither here nor a name of ModelScope, or it cannot be fetched.
    """
    command: Any = type(config)
    values = {name: entry.value(config) for name, entry in flag_table(command).items()}
    if not values.get("use_ms"):
        return config
    for flags, is_local, fetch in ((MODELS, _is_folder, _fetch_model), (DATA, is_here, _fetch_data)):
        for name in flags:
            if values.get(name):
                entries = [entry.strip() for entry in values[name].split(",")]
                folders = [each if is_local(each) else _fetch(each, f"--{name}", fetch) for each in entries]
                values[name] = ",".join(folders)
    return with_values(config, values)


def _is_folder(path: str) -> bool:
    return Path(path).is_dir()


def _fetch_model(name: str) -> str:
    from modelscope import snapshot_download

    return snapshot_download(name, ignore_file_pattern=DUPLICATES)


def _fetch_data(name: str) -> str:
    from modelscope import dataset_snapshot_download

    return dataset_snapshot_download(name)


def _fetch(entry: str, flag: str, fetch: Callable[[str], str]) -> str:
    """Return the folder of ``namespace/name``; a folder in it that stands behind an ``@`` stays there."""
    name, at, inside = entry.partition("@")
    if not NAME.fullmatch(name):
        raise DataError(f"{flag} {entry}: no such file or folder here, and names of ModelScope are namespace/name")
    endpoint = f"https://{os.environ.get('MODELSCOPE_DOMAIN', 'www.modelscope.cn')}"
    if reason := device.why_unreachable(endpoint):
        raise DataError(
            f"{flag} {entry}: no such file or folder here, and ModelScope cannot be reached ({endpoint}: {reason}); "
            "name a local folder, or fetch it where there is a network (`modelscope download`)"
        )
    try:
        with alone(_cache() / name.replace("/", "--")):
            return fetch(name) + at + inside
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)) and not type(error).__module__.startswith("modelscope"):
            raise
        raise DataError(f"{flag} {entry}: ModelScope does not give it: {' '.join(str(error).split())}") from error


def _cache() -> Path:
    """Return the folder of ModelScope's cache, which ranks of several machines may share."""
    folder = Path(os.environ.get("MODELSCOPE_CACHE", "~/.cache/modelscope")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder
