"""Two ranks that share one policy under ZeRO-3: what they compute must be what one process computes."""

from __future__ import annotations

import pytest
import torch

from openrlhf.config.groups import ModelConfig, OptimConfig
from openrlhf.models.actor import Actor
from openrlhf.models.backbone import enable_gradient_checkpointing
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel
from openrlhf.rollout.hf_engine import HFEngine
from openrlhf.rollout.types import Prompt, SamplingParams
from tests.helpers import tiny_causal_lm, tiny_tokenizer
from tests.strategy.ranks import run_ranks

TOKENS = torch.arange(48).view(4, 12) * 7 % 300 + 3
MASK = torch.arange(12) < torch.tensor([12, 2, 7, 9])[:, None]
PROMPTS = [Prompt(str(index), "", tuple(range(5, 9 - index))) for index in range(4)]
SAMPLING = SamplingParams(max_new_tokens=5, n=1, seed=3)


def train_and_sample(folder: str, stage: int, checkpointing: bool) -> dict:
    """Do two steps on this rank's rows and sample its prompts; return losses, norms and tokens."""
    from tests.strategy.programs import strategy_of

    strategy = strategy_of(zero_stage=stage)
    actor = Actor(load_causal_lm(folder, ModelConfig(pretrain=folder), context=strategy.loading_context))
    if checkpointing:
        enable_gradient_checkpointing(actor)
    engine = strategy.prepare_train(actor, OptimConfig(learning_rate=1e-3, lr_scheduler="constant"), 10)
    mine = slice(strategy.rank, None, strategy.world_size)
    losses, norms = [], []
    for _ in range(2):
        engine.train()
        output = engine(TOKENS[mine], MASK[mine])
        loss = -output.log_probs.sum()
        losses.append(strategy.comm.all_reduce(float(loss.detach())))
        engine.backward(loss, 26)
        norms.append(engine.step().grad_norm)
    engine.eval()
    with torch.no_grad():
        after = engine(TOKENS[mine], MASK[mine]).log_probs
    sampler = HFEngine(actor, tiny_tokenizer(f"{folder}/tokenizer-{stage}-{strategy.rank}"), micro_batch_size=4)
    tokens = [rollout.token_ids for rollout in sampler.generate(PROMPTS[mine], SAMPLING)]
    return {"losses": losses, "norms": norms, "after": after, "tokens": tokens, "packed": actor.packed}


@pytest.mark.parametrize(("tied", "checkpointing"), [(True, True), pytest.param(False, False, marks=pytest.mark.full)])
def test_two_sharded_ranks_train_and_sample_as_one_process(tmp_path, tied, checkpointing):
    tiny_causal_lm(tmp_path, "qwen2", tied=tied)
    arguments = {"folder": str(tmp_path), "checkpointing": checkpointing}
    first, second = run_ranks("tests.models.test_sharded:train_and_sample", 2, stage=3, **arguments)
    alone = run_ranks("tests.models.test_sharded:train_and_sample", 1, stage=0, **arguments)[0]
    assert first["packed"] and second["packed"]
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    torch.testing.assert_close(first["after"], alone["after"][::2], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second["after"], alone["after"][1::2], atol=1e-4, rtol=1e-4)
    assert first["tokens"] == alone["tokens"][::2]
    assert second["tokens"] == alone["tokens"][1::2]


def train_values(folder: str, stage: int) -> dict:
    """Let a critic in half precision do two steps on this rank's rows; return losses, norms and values."""
    from tests.strategy.programs import strategy_of

    strategy = strategy_of(zero_stage=stage, bf16=True)
    model_cfg = ModelConfig(pretrain=folder, bf16=True)
    loaded = load_value_model(folder, model_cfg, gather=strategy.gather, context=strategy.loading_context)
    engine = strategy.prepare_train(ValueModel(loaded), OptimConfig(learning_rate=1e-2, lr_scheduler="constant"), 10)
    mine = slice(strategy.rank, None, strategy.world_size)
    losses, norms = [], []
    for _ in range(2):
        engine.train()
        loss = (engine(TOKENS[mine], MASK[mine]) - 1.0).square().mul(MASK[mine]).sum()
        losses.append(strategy.comm.all_reduce(float(loss.detach())))
        engine.backward(loss, 30)
        norms.append(engine.step().grad_norm)
    return {"losses": losses, "norms": norms, "dtype": engine(TOKENS[mine], MASK[mine]).dtype}


@pytest.mark.full
def test_the_float32_head_of_two_sharded_ranks_learns_as_that_of_one_process(tmp_path):
    tiny_causal_lm(tmp_path, "qwen2")
    first, second = run_ranks("tests.models.test_sharded:train_values", 2, folder=str(tmp_path), stage=3)
    alone = run_ranks("tests.models.test_sharded:train_values", 1, folder=str(tmp_path), stage=0)[0]
    assert first["dtype"] == second["dtype"] == torch.float32
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-2)
    assert first["norms"] == pytest.approx(alone["norms"], rel=5e-2)
    assert first["losses"][1] < 0.9 * first["losses"][0]
