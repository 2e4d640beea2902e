"""What the models of a run really take: the growth of a process from just before they load to its highest point.

A small model goes through everything first, so that code, libraries and what they keep for themselves do not count.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openrlhf.config.groups import BatchConfig, DeepSpeedConfig, ModelConfig
from openrlhf.config.ppo import AlgorithmConfig, PPOConfig
from openrlhf.config.supervised import DPOConfig, SFTConfig
from openrlhf.datasets.batch import TokenBatch
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.rollout.types import SequenceBatch
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.frozen import load_frozen
from openrlhf.trainer.ppo.shards import shard
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker
from tests.trainer.ppo.harness import rollout_of, tiny_ppo_config, tiny_prompts

LENGTH, ROWS = 256, 8
PPO_ROLES = {"actor": PolicyWorker, "critic": CriticWorker, "ref": ReferenceWorker, "reward": RewardWorker}


def measure(kind: str, folder: str, small: str, stage: int, bf16: bool, checkpointing: bool) -> float:
    """Return the bytes by which this process grew at most while it worked as ``kind`` with the model in ``folder``."""
    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=stage), bf16=bf16, micro_batch_size=ROWS)
    strategy.setup_distributed()
    work: Callable[..., Any] = _ppo if kind in PPO_ROLES else _supervised
    flags = ModelConfig(pretrain=small, bf16=bf16, gradient_checkpointing=checkpointing)
    strategy.release(work(kind, strategy, flags))
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest point so far is forgotten
    kept = work(kind, strategy, replace(flags, pretrain=folder))
    grown = _status("VmHWM") - before
    del kept
    return grown


def config_of(kind: str, folder: str, stage: int, bf16: bool, checkpointing: bool) -> Any:
    """Return the configuration that :func:`measure` works by."""
    model = ModelConfig(pretrain=folder, bf16=bf16, gradient_checkpointing=checkpointing)
    batch = BatchConfig(micro_train_batch_size=ROWS, train_batch_size=2 * ROWS)
    if kind == "sft":
        config = SFTConfig(model=model, batch=batch)
        return replace(config, data=replace(config.data, max_len=LENGTH), deepspeed=DeepSpeedConfig(zero_stage=stage))
    if kind == "dpo":
        batch = BatchConfig(micro_train_batch_size=ROWS // 2, train_batch_size=ROWS)
        config = DPOConfig(model=model, batch=batch)
        return replace(config, data=replace(config.data, max_len=LENGTH), deepspeed=DeepSpeedConfig(zero_stage=stage))
    return _ppo_config(folder, batch, stage, bf16, checkpointing)


def _ppo_config(folder: str, batch: BatchConfig, stage: int, bf16: bool, checkpointing: bool) -> PPOConfig:
    gae = AlgorithmConfig(advantage_estimator="gae")
    groups = {"batch": batch, "deepspeed": DeepSpeedConfig(zero_stage=stage), "algorithm": gae}
    config = tiny_ppo_config(Path(folder).parent, **groups)
    own = {"bf16": bf16, "gradient_checkpointing": checkpointing, "reward_pretrain": folder}
    model = replace(config.model, pretrain=folder, critic_pretrain=folder, **own)
    half = LENGTH // 2
    rollout = replace(config.rollout, micro_rollout_batch_size=ROWS, prompt_max_len=half, generate_max_len=half)
    return replace(config, model=model, rollout=rollout)


def _supervised(kind: str, strategy: DeepSpeedStrategy, flags: ModelConfig) -> Any:
    """Take two optimizer steps of two micro-batches each; for ``dpo`` ask a reference before each."""
    context = strategy.loading_context
    config = replace(config_of(kind, flags.pretrain, strategy.config.zero_stage, False, False), model=flags)
    engine = strategy.prepare_train(Actor(load_causal_lm(flags.pretrain, flags, context=context)), config.optim, 4)
    frozen = load_frozen(config, strategy, flags.pretrain, "--ref_pretrain", False) if kind == "dpo" else None
    engine.train()
    for _ in range(2):
        for _ in range(2):
            batch = _batch()
            if frozen:
                with torch.no_grad():
                    frozen(batch.sequences, batch.attention_mask)
            engine.backward(-engine(batch.sequences, batch.attention_mask).log_probs.sum(), 1e4)
        engine.step()
    return engine.module


def _batch() -> TokenBatch:
    ids = torch.randint(5, 300, (ROWS, LENGTH))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(ids, mask, mask[:, 1:])


def _ppo(kind: str, strategy: DeepSpeedStrategy, flags: ModelConfig) -> Any:
    """Score answers, and let a role that learns learn from them, with two micro-batches a step, twice."""
    stage = strategy.config.zero_stage
    config = config_of(kind, flags.pretrain, stage, flags.bf16, flags.gradient_checkpointing)
    options = {"path": flags.pretrain} if kind == "reward" else {"max_steps": 4} if kind != "ref" else {}
    worker = PPO_ROLES[kind](config, strategy, **options)
    batch = _rollouts(worker.tokenizer)
    if kind == "actor":
        scored = worker.log_probs([batch])
        scores = torch.randn(len(batch))
        made = worker.assemble([batch], scored, scored, scored, [scores], [scores], kl_coef=0.0)
        worker.update(made, rollout=1)
        return worker.engine.module
    if kind == "critic":
        values = worker.values([batch])
        scores = torch.randn(len(batch))
        made = PolicyWorker.assemble(worker, [batch], values, values, values, [scores], [scores], kl_coef=0.0)
        worker.update(made, rollout=1)
        return worker.engine.module
    worker.log_probs([batch]) if kind == "ref" else worker.score([batch])
    return worker.model


def _rollouts(tokenizer: Any) -> SequenceBatch:
    """Return four micro-batches of answers that are as long as they may be."""
    prompts = tiny_prompts(tokenizer, 4 * ROWS)
    half = LENGTH // 2
    full = [replace(prompt, token_ids=(prompt.token_ids * half)[:half]) for prompt in prompts]
    return shard([rollout_of(prompt, [10] * half) for prompt in full], 1, tokenizer.pad_token_id)[0]


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
