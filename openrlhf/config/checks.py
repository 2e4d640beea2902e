"""What is wrong with the value of one flag: no sentence, or one for each problem with the way to mend it."""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Iterable
from typing import Any
from urllib.parse import urlsplit

from openrlhf.config.secrets import named_key

NO_ANSWER = "--output_key is missing: name the column of the answer, or give conversations with --apply_chat_template"
NO_DEMONSTRATION = f"{NO_ANSWER}, or raw text with --pretrain_mode"
SELF_EXPLAINING = ("input", "prompt", "messages")
"""Input columns whose data may say by itself where the answer is; see openrlhf.datasets.formats."""


def source_problems(name: str, spec: str | None, probs: str | None = None) -> list[str]:
    """Return what is wrong with the comma-separated data sets of ``--<name>`` and their probabilities."""
    entries = [] if spec is None else spec.split(",")
    if not all(entry.strip() for entry in entries):
        return [f"--{name} {spec!r}: an entry between the commas is empty; name data sets as in a,b"]
    return probability_problems(name, len(entries), probs) if probs is not None else []


def same_key_problems(**keys: str | None) -> list[str]:
    """Return a problem for each two of the key flags that name one column."""
    named = [(flag_name, key) for flag_name, key in keys.items() if key]
    return [
        f"--{first} and --{second} both name the column {key!r}: give each its own"
        for index, (first, key) in enumerate(named)
        for second, other in named[index + 1 :]
        if key == other
    ]


def answer_problems(data: Any, said: object, problem: str) -> list[str]:
    """Return ``problem`` where neither ``said`` nor, perhaps, the data of a data group says where the answer is.

    Data that nobody named, the default data set, does not say it.
    """
    may_say_so = data.dataset != type(data).dataset and data.input_key in SELF_EXPLAINING
    return [] if said or may_say_so else [problem]


def profiled_steps(text: str) -> tuple[int, int] | None:
    """Return the first and the last step of ``"3-5"`` or ``"3"``; None when it is neither."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal()):
        return None
    span = int(first), int(last)
    return span if 1 <= span[0] <= span[1] else None


def probability_problems(name: str, count: int, probs: str | Iterable[float]) -> list[str]:
    """Return what is wrong with ``--<name>_probs``, the mixing probabilities of ``count`` data sets.

    A sum within 0.01 of 1 is taken as rounded.
    """
    values = probs.split(",") if isinstance(probs, str) else list(probs)
    written = f"--{name}_probs {','.join(map(str, values))!r}"
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return [f"{written} is not a list of numbers: write for example 0.5,0.5"]
    if len(numbers) != count:
        even = ",".join([f"{1 / count:.3g}"] * count)
        return [
            f"--{name}_probs has {len(numbers)} values for the {count} data sets of --{name}; for equal shares {even}"
        ]
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        return [f"{written}: probabilities are not negative, and finite; write for example 0.5,0.5"]
    if abs(sum(numbers) - 1.0) > 0.01 + 1e-9:
        return [f"{written}: the probabilities add up to {sum(numbers):g}, they must add up to 1"]
    return []


def template_problems(template: str | None) -> list[str]:
    """Return the problem of a template that cannot be filled with a prompt."""
    if template is None:
        return []
    mark = "\0"
    try:
        fits = template.format(mark).count(mark) == 1
    except (LookupError, ValueError, AttributeError):
        fits = False
    return [] if fits else [f"--input_template {template!r} needs one {{}}, and every other brace doubled"]


def file_problems(name: str, path: str | None) -> list[str]:
    """Return the problem of a file that is not there; None is no file."""
    return [] if path is None or os.path.isfile(path) else [f"--{name} {path}: there is no such file"]


def url_problems(name: str, url: str) -> list[str]:
    """Return what is wrong with an address that ``--<name>`` says to send texts to."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return [f"--{name} {url}: {error}; write http://HOST:PORT/PATH"]
    if parts.scheme not in ("http", "https") or not host:
        return [f"--{name} {url}: not an address of a web server; write http://HOST:PORT/PATH"]
    if parts.username or parts.password:
        return [f"--{name}: leave name and password out of the address of {host}; --remote_rm_key names a key"]
    try:
        link_local = ipaddress.ip_address(host.partition("%")[0]).is_link_local
    except ValueError:
        link_local = False
    return [f"--{name} {url}: link-local addresses are the machine's own services, not reward servers"] * link_local


def key_problems(name: str, where: str | None) -> list[str]:
    """Return the problem of ``--<name>`` that should name the file or the environment variable of a key."""
    try:
        named_key(where)
    except (ValueError, OSError) as error:
        return [f"--{name} {error}"]
    return []


def ring_problems(size: int, ranks: int) -> list[str]:
    """Return the problem of a run on ``ranks`` ranks of which ``--ring_attn_size`` share each sequence."""
    if ranks % size == 0:
        return []
    return [
        f"--ring_attn_size {size}: {ranks} rank{'s' if ranks > 1 else ''} cannot be dealt to rings of {size}; start "
        f"the command with deepspeed on a multiple of {size} ranks, or lower the flag"
    ]


def missing_model(pretrain: str | None) -> list[str]:
    """Return the problem of a command without ``--pretrain``."""
    return [] if pretrain else ["--pretrain is missing: name the folder or hub name of the model to train"]
