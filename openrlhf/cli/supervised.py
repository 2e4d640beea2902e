"""A supervised command: how it is started, and what reads its data. What one differs in is its recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openrlhf.cli.common import run
from openrlhf.trainer.setup import open_run

if TYPE_CHECKING:
    from openrlhf.trainer.inputs import Inputs
    from openrlhf.trainer.program import Recipe


@dataclass(frozen=True)
class Command:
    """One supervised command.

    Attributes:
        name: of its module.
        config_class: its flags.
        recipe: ``recipe(config)`` says what is trained, on what, and how. It imports torch, so it is called late.
    """

    name: str
    config_class: type
    recipe: Callable[[Any], Recipe]

    def __call__(self) -> None:
        """Do what the command line says."""
        run(self.config_class, self.train, self.name, data=lambda config: self.read(config).train)

    def train(self, config: Any) -> None:
        """Train as ``config`` says, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
        with open_run(config, self.name) as opened:
            from openrlhf.trainer import program

            program.train(config, opened, self.recipe(config))

    def read(self, config: Any) -> Inputs:
        """Return the tokenizer and the data, before any model."""
        return self.recipe(config).read(config)
