"""From a command line and a YAML file to a configuration, with every problem in one message.

tyro prints the help. The reading is done here: a parser that stops at the first problem makes a user start a command
as often as it has mistakes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from openrlhf.config.checks import ring_problems
from openrlhf.config.flag_status import missing_packages, no_effect_notices
from openrlhf.config.flags import Flag, flag_table
from openrlhf.config.groups import run_folder
from openrlhf.config.help import print_help
from openrlhf.config.reader import Reader
from openrlhf.config.secrets import masked
from openrlhf.device import gpu_present
from openrlhf.errors import UsageError

Problems = Callable[[Any], list[str]]
Words = list[str] | None
Config = TypeVar("Config")


def parse(config_class: Any, argv: list[str], prog: str, also: Problems | None = None) -> tuple[Any, bool]:
    """Return ``(config, dry_run)`` of a command line.

    ``also(config)`` returns further problems, of rules that a configuration does not know.

    ``--config run.yaml`` supplies what the command line does not give. Flags may be spelled with dots, see
    :mod:`openrlhf.config.dialect`; messages spell them as they were given. ``--help`` prints the help and exits 0.
    What deserves a word but is no problem is printed to standard error, by rank 0.

    Raises:
        UsageError: with every problem, each naming its flag and the fix.
    """
    if "--help" in argv or "-h" in argv:
        print_help(config_class, prog)
        raise SystemExit(0)
    table = flag_table(config_class)
    reader = Reader(table)
    given, dry_run = reader.read(argv)
    return _settled(config_class(), given, reader, also, dry_run), dry_run


def configure(command: type[Config], **flags: Any) -> Config:
    """Return the configuration of a command with some of its flags set by name.

    ``configure(SFTConfig, pretrain="model", dataset="rows.jsonl", output_key="answer", lora_rank=8)``

    Raises:
        UsageError: a flag is not known or does not take its value. Rules across flags are checked when it is used.
    """
    table = flag_table(command)
    reader = Reader(table)
    given = reader.convert(_flag_words(table, flags))
    if reader.problems:
        raise UsageError(reader.problems)
    return with_values(command(), {name: entry.default for name, entry in table.items()} | given)


def checked(config: Any, also: Problems | None = None) -> Any:
    """Return a configuration that no command line made, checked and completed as :func:`parse` does it.

    Raises:
        UsageError: as :func:`parse`.
    """
    command: Any = type(config)
    table = flag_table(command)
    own = {name: entry.value(config) for name, entry in table.items() if entry.value(config) != entry.default}
    reader = Reader(table)
    return _settled(command(), reader.convert(_flag_words(table, own)), reader, also)


def _flag_words(table: Mapping[str, Flag], values: Mapping[str, Any]) -> dict[str, Words]:
    """Return the words of a command line that stand for values; None is the null of a YAML file."""
    found: dict[str, Words] = {}
    for name, value in values.items():
        several = value if isinstance(value, (tuple, list)) else (value,)
        null = value is None or (value is False and name in table and table[name].kind is not bool)
        found[name] = None if null else [str(item) for item in several]
    return found


def _settled(config: Any, given: dict[str, Any], reader: Reader, also: Problems | None, dry_run: bool = False) -> Any:
    """Return ``config`` with the values ``given`` and those that follow from them, unless something is wrong."""
    values = {name: entry.default for name, entry in reader.table.items()} | given
    notices = _other_default(given, reader) + _resolve(values, config.run_prefix)
    config = with_values(config, values)
    found = _ask(config, "problems") + (also(config) if also else [])
    found += [] if dry_run else missing_packages(values) + _missing_ranks(values)
    problems = reader.problems + [problem for problem in found if not reader.explains(problem)]
    if problems:
        raise UsageError(reader.dialect.as_written(problem, reader.written) for problem in problems)
    notices += _ask(config, "notices") + no_effect_notices(values | {"dry_run": dry_run}, set(given), gpu_present())
    if os.environ.get("RANK", "0") == "0":
        for notice in notices:
            print(f"note: {reader.dialect.as_written(notice, reader.written)}", file=sys.stderr)
    return config


def to_flat_dict(config: Any) -> dict[str, Any]:
    """Return flag -> value of a configuration, fit for a log or a file: lists for tuples, secrets masked."""
    command: Any = type(config)
    flat = {name: masked(name, entry.value(config)) for name, entry in flag_table(command).items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flat.items()}


def _other_default(given: dict[str, Any], reader: Reader) -> list[str]:
    """Return what to tell a command with dotted flags and no data type, which is bf16 where it comes from."""
    dotted = not reader.written.isdisjoint(reader.dialect.flat)
    if not dotted or "bf16" not in reader.table or "bf16" in given:
        return []
    return ["weights are fp32: OpenRLHF 0.10 and later take bf16; --ds.param_dtype bf16 (or fp32) says which"]


def _resolve(values: dict[str, Any], run_prefix: str) -> list[str]:
    """Fill the defaults that depend on other flags or on the time, and mend the template; return what to tell."""
    if "run_path" in values:
        values["run_path"] = run_folder(values["save_path"], values["run_path"])
        values["wandb_run_name"] = values["wandb_run_name"] or f"{run_prefix}_{datetime.now():%m%dT%H:%M}"
    if "input_template" not in values:
        return []
    template = values["input_template"] or None
    notices = []
    if template and "{}" not in template:
        notices.append(f"--input_template {template!r} has no {{}} for the prompt and is not used")
        template = None
    if template and "\\n" in template:
        notices.append("--input_template holds a backslash and an n, not a line break: in bash write $'...\\n...'")
    values["input_template"] = template
    return notices


def with_values(config: Any, values: dict[str, Any]) -> Any:
    """Return ``config`` with the values of its flags, group by group."""
    changes = {}
    for item in fields(config):
        old = getattr(config, item.name)
        changes[item.name] = with_values(old, values) if is_dataclass(old) else values[item.name]
    return replace(config, **changes)


def _missing_ranks(values: dict[str, Any]) -> list[str]:
    """Return the problem of a command whose ranks, those of its launcher, cannot be dealt to rings."""
    if "prompt_data" in values:
        return []
    return ring_problems(values.get("ring_attn_size", 1), int(os.environ.get("WORLD_SIZE", "1")))


def _ask(config: Any, question: str) -> list[str]:
    """Return the answers of a command and its groups to ``problems`` or ``notices``."""
    groups = [getattr(config, item.name) for item in fields(config)]
    return [line for part in (config, *groups) if hasattr(part, question) for line in getattr(part, question)()]
