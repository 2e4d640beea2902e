"""What the ranks of a ring run: the workers of PPO on shards of their own, and what they report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from openrlhf.config.groups import AttentionConfig, BatchConfig
from openrlhf.config.ppo import PPOConfig, PPOModelConfig, PromptDataConfig, RewardConfig
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.rollout.types import SamplingParams
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.ppo.groups import deal
from openrlhf.trainer.ppo.process import ProcessRewardWorker
from openrlhf.trainer.ppo.shards import shard
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker
from tests.trainer.ppo.harness import rollout_of, tiny_ppo_config, tiny_prompts

ANSWERS = ("xex", "exxe.", "x.", "xxxex.", "e.", "xe")
"""Answers of the policy, letter by letter; a full stop is the end of a sequence."""
PARTS = 2


def ring_config(folder: Path, ring: int, budget: int) -> PPOConfig:
    """Return a run with a critic, two kinds of reward models and texts, as ``tests`` put them into ``folder``."""
    config = tiny_ppo_config(folder)
    dynamic = {"use_dynamic_batch": True, "train_max_tokens_per_gpu": budget} if budget else {}
    tokens = {"prm_placeholder_token": "e", "prm_reward_tokens": ("+", "-")}
    return replace(
        config,
        model=PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=str(folder / "reward")),
        reward=RewardConfig(prm_pretrain=str(folder / "prm"), **tokens),
        prompts=PromptDataConfig(pretrain_data=str(folder / "texts.jsonl")),
        algorithm=replace(config.algorithm, advantage_estimator="gae", init_kl_coef=0.1),
        batch=BatchConfig(train_batch_size=4, micro_train_batch_size=2, **dynamic),
        optim=replace(config.optim, actor_learning_rate=1e-3, critic_learning_rate=1e-3),
        deepspeed=replace(config.deepspeed, zero_stage=2, collective_timeout=60),
        attention=AttentionConfig(ring_attn_size=ring),
    )


def reported(folder: str, ring: int, budget: int) -> dict[str, Any]:
    """Return what the workers say of a rollout, of which each rank has its own shards, and of learning from it."""
    config = ring_config(Path(folder), ring, budget)
    tokenizer = load_tokenizer(config.model.pretrain)
    prompts = tiny_prompts(tokenizer, len(ANSWERS))
    letters = {letter: tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ex"}
    letters["."] = tokenizer.eos_token_id
    rollouts = [
        rollout_of(prompt, [letters[letter] for letter in answer])
        for prompt, answer in zip(prompts, ANSWERS, strict=True)
    ]
    strategy = DeepSpeedStrategy(config.deepspeed, ring_size=ring)
    strategy.setup_distributed()
    policy, critic = (worker(config, strategy, max_steps=9) for worker in (PolicyWorker, CriticWorker))
    reference, process = (worker(config, strategy) for worker in (ReferenceWorker, ProcessRewardWorker))
    reward = RewardWorker(config, strategy, path=config.model.reward_models[0])
    ranks, rank = policy.comm.world_size, policy.comm.rank
    mine = deal(shard(rollouts, PARTS, tokenizer.pad_token_id), ranks)[rank]
    log_probs, values, steps = policy.log_probs(mine), critic.values(mine), process.score(mine)
    scores = reward.score(mine)
    shaped = [each + torch.tensor([sum(row) for row in rows]) for each, rows in zip(scores, steps, strict=True)]
    made = policy.assemble(mine, log_probs, reference.log_probs(mine), values, shaped, shaped, steps, kl_coef=0.1)
    learned = policy.update(made, rollout=1, whiten=(0.1, 1.5)), critic.update(made, rollout=1)
    sampled = policy.generate([prompts[rank::ranks]], sampling=SamplingParams(max_new_tokens=3, temperature=0.0))
    return {
        "returns": [
            row[keep].tolist() for part in made for row, keep in zip(part.returns, part.action_mask, strict=True)
        ],
        "learned": learned,
        "sampled": [(answer.prompt.uid, answer.token_ids) for answer in sampled[0]],
    }


def reported_each_way(folder: str, ways: list[list[int]]) -> list[dict[str, Any]]:
    """Return the reports of every ``[ring, budget]``."""
    return [reported(folder, *way) for way in ways]
