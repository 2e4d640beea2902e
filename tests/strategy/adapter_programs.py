"""What the ranks of the tests of sharded adapters run."""

from __future__ import annotations

from pathlib import Path

import torch

from openrlhf.config.groups import LoRAConfig, ModelConfig, OptimConfig
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel
from openrlhf.strategy.engine import merged_weights
from openrlhf.strategy.export import export_model
from tests.strategy.programs import strategy_of

TOKENS = torch.arange(44).view(4, 11) * 7 % 300 + 3
MASK = torch.arange(11) < torch.tensor([11, 6, 2, 9])[:, None]


def train_adapter(folder: str, out: str, stage: int, value: bool, bf16: bool, four_bits: bool) -> dict:
    """Take three steps on this rank's rows and export; return losses, norms, and what the ranks compute at the end."""
    strategy = strategy_of(zero_stage=stage, bf16=bf16)
    lora = LoRAConfig(lora_rank=4, load_in_4bit=four_bits)
    common = {"lora": lora, "context": strategy.loading_context}
    if value:
        loaded = load_value_model(folder, ModelConfig(bf16=bf16), gather=strategy.gather, pad_token_id=0, **common)
        model = ValueModel(loaded, read="last")
    else:
        model = Actor(load_causal_lm(folder, ModelConfig(bf16=bf16), **common))

    def read(rows: slice) -> torch.Tensor:
        output = engine(TOKENS[rows], MASK[rows])
        return output if value else output.log_probs

    engine = strategy.prepare_train(model, OptimConfig(learning_rate=2e-2, lr_scheduler="constant"), 10)
    mine = slice(strategy.rank, None, strategy.world_size)
    losses, norms = [], []
    for _ in range(3):
        engine.train()
        loss = -read(mine).sum()
        losses.append(strategy.comm.all_reduce(float(loss.detach())))
        engine.backward(loss, 24)
        norms.append(engine.step().grad_norm)
    engine.save(Path(f"{out}-checkpoint"))
    engine.eval()
    found = {"losses": losses, "norms": norms}
    with torch.no_grad():
        found["after"] = read(slice(None))
        if not value:
            with model.without_adapter():
                found["without"] = read(slice(None))
            found["again"] = read(slice(None))
    export_model(engine, strategy, out)
    merged = list(merged_weights(model.model, strategy, wanted=strategy.rank == 0))
    found["merged"] = sum(tensor.double().sum().item() for _, tensor in merged)
    return found
