"""The help of a command, printed by tyro: flags by group with defaults, choices and when they do nothing."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, get_args, get_type_hints

from openrlhf.config.flag_status import status

COMMAND_FLAGS = (
    ("config", str | None, None, "YAML file with flags of this command; the command line wins."),
    ("dry_run", bool, False, "Check every flag, print the plan and exit; loads nothing."),
)


def print_help(config_class: type, prog: str) -> None:
    """Print every flag of a command to standard output."""
    import tyro

    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        view = _view(config_class(), top=True)
        tyro.cli(view, prog=prog, args=["--help"], use_underscores=True, config=markers)
    except SystemExit as stop:
        if stop.code:
            raise


def _view(config: Any, top: bool = False) -> type:
    """Return a copy of the class of ``config`` whose help texts also say choices and status."""
    import tyro

    hints = get_type_hints(type(config))
    rows: list[Any] = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            group = _view(value)
            rows.append((item.name, group, dataclasses.field(default_factory=group)))
        else:
            note = tyro.conf.arg(help=_text(item), metavar=_metavar(hints[item.name]))
            rows.append((item.name, Annotated[hints[item.name], note], value))
    if top:
        for name, kind, value, text in COMMAND_FLAGS:
            rows.append((name, Annotated[kind, tyro.conf.arg(help=text, metavar=_metavar(kind))], value))
    view = dataclasses.make_dataclass(type(config).__name__, rows)
    view.__doc__ = type(config).__doc__
    return view


def _metavar(hint: Any) -> str | None:
    """Return ``STR`` for ``str | None``, where tyro would say ``{None}|STR``; None leaves it to tyro."""
    members = [member for member in get_args(hint) if member is not type(None)]
    return members[0].__name__.upper() if type(None) in get_args(hint) else None


def _text(item: dataclasses.Field) -> str:
    choices = item.metadata["choices"]
    listed = f"One of {', '.join(map(str, choices))}." if choices else ""
    parts = [item.metadata["help"], listed, status(item.name)]
    return " ".join(part for part in parts if part)
