"""Rewrite the commands of a script into the other dialect of flags, or a TRL configuration into a command.

    python -m openrlhf.cli.migrate train.sh                    (flat flags become dotted ones, dotted ones flat)
    python -m openrlhf.cli.migrate grpo.yaml --ranks 8         (a command for what `trl ... --config grpo.yaml` does)

The result goes to standard output, what deserves a word to standard error.
"""

from __future__ import annotations

import sys
from pathlib import Path

from openrlhf.cli.common import run
from openrlhf.config.migrate import MigrateConfig
from openrlhf.config.migration import migrated
from openrlhf.config.trl import command_of, guessed, settings_of
from openrlhf.errors import DataError, InfraError


def plan(config: MigrateConfig, _: int) -> list[str]:
    """Return what would be done."""
    kind = "TRL configuration" if config.is_trl else "script"
    return [f"rewrite the {kind} {config.file}, write {config.output_path or 'to standard output'}"]


def migrate(config: MigrateConfig) -> None:
    """Rewrite as ``config`` says. Raises the errors of :mod:`openrlhf.errors`."""
    try:
        text = Path(str(config.file)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--file {config.file} cannot be read: {error}") from None
    written, notes = _from_trl(config, text) if config.is_trl else _from_script(config, text)
    _write(config, written)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def _write(config: MigrateConfig, text: str) -> None:
    if config.output_path is None:
        print(text, end="")
        return
    try:
        Path(config.output_path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InfraError(
            f"--output_path {config.output_path} cannot be written ({error.strerror}); name another place"
        ) from None


def _from_script(config: MigrateConfig, text: str) -> tuple[str, list[str]]:
    result = migrated(text, config.to)
    if not result.found:
        raise DataError(f"{config.file} holds no command of this project with flags: nothing to rewrite")
    return result.text, result.notes


def _from_trl(config: MigrateConfig, text: str) -> tuple[str, list[str]]:
    settings = settings_of(text, str(config.file))
    command = config.command or guessed(settings)
    written, notes = command_of(settings, command, config.ranks)
    return written, [f"for {command}; --command names another", *notes]


def words_of(argv: list[str]) -> list[str]:
    """Return the arguments with the file that stands first behind its flag."""
    return ["--file", *argv] if argv and not argv[0].startswith("-") else argv


def main() -> None:
    """Do what the command line says."""
    run(MigrateConfig, migrate, "migrate", plan, argv=words_of(sys.argv[1:]))


if __name__ == "__main__":
    main()
