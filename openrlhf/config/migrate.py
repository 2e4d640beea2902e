"""The flags of ``migrate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from openrlhf.config.checks import file_problems
from openrlhf.config.flags import flag
from openrlhf.config.migration import DOTTED, FLAT
from openrlhf.config.trl_keys import COMMANDS


@dataclass(frozen=True)
class MigrateConfig:
    """Rewriting commands.

    Turn the flags of a shell script from flat ones into dotted ones or back, or a TRL configuration into a command.
    """

    run_prefix: ClassVar[str] = "migrate"
    file: str | None = flag(None, "Shell script, or YAML or JSON file of TRL; also without --file, as first word.")
    to: str | None = flag(None, "Script: flags to write; default is what it does not have.", choices=(FLAT, DOTTED))
    command: str | None = flag(None, "TRL: the command; default is what its keys tell.", choices=tuple(COMMANDS))
    ranks: int = flag(1, "TRL: processes that the run had, for the size of a step.", at_least=1)
    output_path: str | None = flag(None, "File to write; default is standard output.")

    def problems(self) -> list[str]:
        if not self.file:
            return ["--file is missing: name a shell script, or a .yaml or .json file of TRL"]
        return file_problems("file", self.file)

    @property
    def is_trl(self) -> bool:
        """Whether the file is a configuration of TRL."""
        return str(self.file).endswith((".yaml", ".yml", ".json"))
