"""Keys of services: where a run gets one from, and how it stays out of everything that is written or passed on."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

MASK = "***"
NAMES_A_KEY = ("remote_rm_key", "api_key")
"""Flags that name the file or the environment variable of a key; what is neither may be the key itself."""
SECRET_VARIABLE = re.compile(r"(^|_)(KEYS?|APIKEY|TOKENS?|SECRETS?|PASSWORD|PASSWD|CREDENTIALS?)(_|$)")
COUNT_OF_TOKENS = re.compile(
    r"(?<![A-Z])(MAX|MIN|NUM|N|TOTAL)_((NUM|NEW|BATCHED|INPUT|OUTPUT|PROMPT|PREFILL|MODEL)_)*TOKENS(?=_|$)"
)
LOGGED_IN = ("true", "1", "yes", "on", "online")
"""What ``--use_wandb`` says instead of a key, in any case."""
NOT_LOGGED = ("false", "0", "no", "off", "none", "null")
"""What a person may say who wants no log there, in any case; none of them is a key."""
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def literal_key(use_wandb: str | None) -> str:
    """Return the key that ``--use_wandb`` holds itself, ``""`` when it says where the key is."""
    if not use_wandb or use_wandb.lower() in LOGGED_IN or os.path.isfile(use_wandb):
        return ""
    return use_wandb


def wandb_key(use_wandb: str | None) -> str:
    """Return the key that ``--use_wandb`` holds or whose file it names; ``""``: wandb knows where to look.

    Raises:
        OSError: the file cannot be read.
    """
    if use_wandb and os.path.isfile(use_wandb):
        with open(use_wandb, encoding="utf-8") as file:
            return file.read().strip()
    return literal_key(use_wandb)


def named_key(where: str | None) -> str:
    """Return the key in the file, or else in the environment variable, that ``where`` names; ``""`` for None.

    Raises:
        ValueError: there is neither, or no key in it; the rest of a sentence that begins with the flag. It does not
            repeat ``where``, which may be the key itself.
    """
    if where is None:
        return ""
    if os.path.isfile(where):
        with open(where, encoding="utf-8") as file:
            key = file.read().strip()
    else:
        key = os.environ.get(where, "").strip()
    if not key:
        raise ValueError("names neither a file nor an environment variable with a key in it; keep the key itself out")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("names a key that cannot be sent: letters, digits and signs on one line")
    return key


def masked(name: str, value: Any) -> Any:
    """Return the value of a flag fit for a file: no key, and no name and password in an address."""
    if not isinstance(value, str):
        return value
    if name == "use_wandb" and literal_key(value):
        return MASK
    if name in NAMES_A_KEY and not os.path.isfile(value) and value not in os.environ:
        return MASK
    return IN_URL.sub(MASK, value)


def hide_in_argv(key: str) -> None:
    """Mask ``key`` in this process's copy of its command line, which libraries store with what they log."""
    if key:
        whole = re.compile(rf"(^|=){re.escape(key)}$")
        sys.argv[:] = [whole.sub(rf"\g<1>{MASK}", word) for word in sys.argv]


def is_secret(variable: str) -> bool:
    """Return whether an environment variable of this name holds something secret."""
    return SECRET_VARIABLE.search(COUNT_OF_TOKENS.sub("", variable.upper())) is not None
