"""Merge a LoRA adapter into its base model.

    python -m openrlhf.cli.lora_combiner --model_path BASE --lora_path ADAPTER --output_path MERGED [--is_rm] [--bf16]

Writes a folder that transformers loads without peft. An adapter that was trained on 4-bit weights is merged into the
whole ones, so its outputs differ from those in training by the rounding of the four bits.
"""

from __future__ import annotations

from openrlhf.cli.common import libraries_hushed, run
from openrlhf.config.combiner import CombinerConfig


def plan(config: CombinerConfig, _: int) -> list[str]:
    """Return what would be done."""
    kind = "reward model" if config.is_rm else "language model"
    return [f"merge the adapter {config.lora_path} into the {kind} {config.model_path}, write {config.output_path}"]


def combine(config: CombinerConfig) -> None:
    """Merge as ``config`` says. Raises the errors of :mod:`openrlhf.errors`."""
    with libraries_hushed():
        from openrlhf.models.merging import merge_adapter
        from openrlhf.strategy.export import write_model

        model, tokenizer = merge_adapter(
            config.model_path,
            config.lora_path,
            is_rm=config.is_rm,
            bf16=config.bf16,
            trust_remote_code=config.trust_remote_code,
        )
        write_model(model, config.output_path, tokenizer)
    print(f"done: merged model in {config.output_path}")


if __name__ == "__main__":
    run(CombinerConfig, combine, "lora_combiner", plan)
