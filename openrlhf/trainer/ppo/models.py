"""Which model a role of PPO starts from, and how it is loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from openrlhf.config.ppo import PPOConfig
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.models.tokenizer import check_vocabulary
from openrlhf.models.value_head import ValueModel, load_value_model
from openrlhf.strategy.deepspeed import DeepSpeedStrategy


def load_actor(config: PPOConfig, strategy: DeepSpeedStrategy, *, train: bool = True) -> Actor:
    """Return the policy of ``--pretrain``; ``train`` false for a model that only looks."""
    model = load_causal_lm(
        config.model.pretrain,
        config.model if train else replace(config.model, gradient_checkpointing=False),
        lora=config.lora if train else config.lora.without_adapters,
        context=partial(strategy.loading_context, train=train),
        seed=config.batch.seed,
    )
    aux_loss_coef = config.model.aux_loss_coef if train else 0.0
    return _without_padding(Actor(model, aux_loss_coef=aux_loss_coef), config)


def load_critic(config: PPOConfig, strategy: DeepSpeedStrategy, pad_token_id: int) -> ValueModel:
    """Return the critic: a reward model goes on with its head, the policy's own folder gets a fresh one."""
    source, named = config.critic_source, config.model
    own_flag = "--pretrain" if source == named.pretrain else "--reward_pretrain"
    model = load_value_model(
        source,
        config.model,
        lora=config.lora,
        gather=partial(strategy.gather, modifier_rank=0),
        context=strategy.loading_context,
        init_value_head=True if source == named.pretrain else None,
        value_head_prefix=config.model.value_head_prefix,
        normalize_reward=config.reward.normalize_reward,
        pad_token_id=pad_token_id,
        seed=config.batch.seed,
        flag="--critic_pretrain" if named.critic_pretrain else own_flag,
    )
    return _without_padding(ValueModel(model, read="each", aux_loss_coef=config.model.aux_loss_coef), config)


def load_reward_model(config: PPOConfig, strategy: DeepSpeedStrategy, path: str, tokenizer: Any) -> Any:
    """Return the reward model at ``path``, ready to score. Raises DataError when it has another vocabulary."""
    check_vocabulary(path, tokenizer, config.model, "--reward_pretrain")
    model = load_value_model(
        path,
        replace(config.model, gradient_checkpointing=False),
        lora=config.lora.without_adapters,
        gather=strategy.gather,
        context=partial(strategy.loading_context, train=False),
        init_value_head=False,
        value_head_prefix=config.model.value_head_prefix,
        normalize_reward=config.reward.normalize_reward,
        pad_token_id=tokenizer.pad_token_id,
        flag="--reward_pretrain",
    )
    value_model = _without_padding(ValueModel(model, read="last"), config)
    return strategy.prepare_eval(value_model, offload=config.reward.ref_reward_offload)


def load_process_reward_model(config: PPOConfig, strategy: DeepSpeedStrategy, tokenizer: Any) -> Any:
    """Return the process reward model, ready to score. Raises DataError when it has another vocabulary."""
    path, flag = config.reward.prm_pretrain, "--prm_pretrain"
    check_vocabulary(path, tokenizer, config.model, flag)
    model = load_causal_lm(
        path,
        replace(config.model, gradient_checkpointing=False),
        lora=config.lora.without_adapters,
        context=partial(strategy.loading_context, train=False),
        flag=flag,
    )
    return strategy.prepare_eval(_without_padding(Actor(model), config), offload=config.reward.ref_reward_offload)


def _without_padding(model: Any, config: PPOConfig) -> Any:
    """Return ``model``, for which padding that cannot be removed is an error where a flag counts on it."""
    flags = {
        "--packing_samples": config.attention.packing_samples,
        "--use_dynamic_batch": config.batch.use_dynamic_batch,
    }
    for flag in [name for name, given in flags.items() if given][:1]:
        model.insist_on_packing(flag)
    return model
