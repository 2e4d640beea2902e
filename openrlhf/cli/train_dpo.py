"""Direct preference optimisation on pairs of a preferred and another answer: DPO, IPO, SimPO, ORPO or KTO.

    deepspeed --module openrlhf.cli.train_dpo --pretrain MODEL --dataset FILE --prompt_key prompt --chosen_key better
    python -m openrlhf.cli.train_dpo ...        (one rank)

Writes a Hugging Face folder to ``--save_path``; metrics, report and log go to ``--run_path``.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from openrlhf.cli.supervised import Command
from openrlhf.config.supervised import DPOConfig

if TYPE_CHECKING:
    from openrlhf.trainer.program import Recipe


def recipe(config: DPOConfig) -> Recipe:
    """Return what is trained: a language model on pairs, against a reference where the loss has one."""
    from openrlhf.datasets.reward import PreferenceDataset
    from openrlhf.trainer.dpo import DPOTrainer
    from openrlhf.trainer.program import Recipe

    beside = {"--ref_pretrain": config.reference}
    return Recipe(DPOTrainer, PreferenceDataset, "all_exhausted", options=options, beside=beside)


def options(config: DPOConfig, strategy: Any, inputs: Any, engine: Any) -> dict[str, Any]:
    """Return the loss, and the reference model that it needs."""
    from openrlhf.trainer.frozen import load_reference

    path = config.reference
    flag = "--ref_pretrain" if config.ref_pretrain else "--pretrain"
    return {
        "pair_loss": partial(config.pair_loss.load(), **config.loss_options),
        "measures_divergences": config.pair_loss.needs_divergences,
        "beta": config.beta,
        "nll_loss_coef": config.nll_loss_coef,
        "reference": path and load_reference(config, strategy, engine, path, flag, inputs.sets, inputs.folder),
    }


command = Command("train_dpo", DPOConfig, recipe)

if __name__ == "__main__":
    command()
