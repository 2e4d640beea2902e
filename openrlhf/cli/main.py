"""The console script: ``openrlhf sft --pretrain ...`` is ``python -m openrlhf.cli.train_sft --pretrain ...``."""

from __future__ import annotations

import runpy
import sys
from difflib import get_close_matches
from pkgutil import resolve_name

from openrlhf.config.commands import COMMANDS


def main(argv: list[str] | None = None) -> None:
    """Run the command that the first word names, with the words behind it as if its module had been started."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
    elif words[0] == "--version":
        print(resolve_name("openrlhf:__version__"))
    elif words[0] in COMMANDS:
        module, _ = COMMANDS[words[0]]
        sys.argv = [f"openrlhf {words[0]}", *words[1:]]
        runpy.run_module(f"openrlhf.cli.{module}", run_name="__main__", alter_sys=True)
    else:
        close = get_close_matches(words[0], COMMANDS, 1)
        hint = f"did you mean {close[0]}?" if close else "openrlhf --help lists the commands"
        print(f"error: openrlhf {words[0]}: there is no such command: {hint}", file=sys.stderr)
        raise SystemExit(2)


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<10} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: openrlhf COMMAND [--flag value ...]",
            "",
            *lines,
            "",
            "openrlhf COMMAND --help lists the flags of a command; --config FILE reads them from YAML, --dry_run",
            "checks them and prints the plan. On several devices: deepspeed --module openrlhf.cli.main COMMAND ...",
        ]
    )


if __name__ == "__main__":
    main()
