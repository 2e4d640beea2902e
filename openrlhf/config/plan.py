"""The plan of a run in words: what ``--dry_run`` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import ceil
from typing import Any

from openrlhf.config.arguments import to_flat_dict
from openrlhf.config.ppo import PPOConfig

WIDTH = 100


def plan_lines(config: Any, world_size: int, *, rows: int | None = None, placement: Sequence[str] = ()) -> list[str]:
    """Return the lines of the plan: changed settings, ranks and batches, steps, placement, all other settings.

    Args:
        config: the configuration of a command.
        world_size: training ranks; for PPO the ranks of the actor.
        rows: training samples, or prompts for PPO, when known; the number of steps follows from it.
        placement: who shares which device, one line each.
    """
    flat, defaults = to_flat_dict(config), to_flat_dict(type(config)())
    changed = {name: value for name, value in flat.items() if value != defaults[name]}
    same = [f"{name}={value!r}" for name, value in flat.items() if name not in changed]
    work = _ppo_lines if isinstance(config, PPOConfig) else _supervised_lines
    return [
        *_section("settings", [f"{name} = {value!r}" for name, value in changed.items()]),
        *_section("plan", work(config, world_size, rows)),
        *_section("devices", placement),
        *_section("by default", textwrap.wrap(" ".join(same), WIDTH, break_long_words=False, break_on_hyphens=False)),
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _supervised_lines(config: Any, ranks: int, rows: int | None) -> list[str]:
    return [_step_line(config, ranks, "samples"), _total_line(config.batch, rows), *_files(config)]


def _step_line(config: Any, ranks: int, unit: str) -> str:
    batch = config.batch
    share = ceil(batch.train_batch_size / ranks)
    micro = ceil(share / batch.micro_train_batch_size)
    return (
        f"{_count(ranks, 'rank')}, ZeRO stage {config.deepspeed.zero_stage}: an optimizer step is "
        f"{batch.train_batch_size} {unit} = {_count(ranks, 'rank')} x {_count(micro, 'micro-batch', 'es')} "
        f"of at most {min(share, batch.micro_train_batch_size)}"
    )


def _total_line(batch: Any, rows: int | None) -> str:
    epochs = batch.max_epochs
    if rows is None:
        return f"{_count(epochs, 'epoch')}; the number of steps follows from the data"
    steps = ceil(rows / batch.train_batch_size)
    total = f"{_count(steps * epochs, 'step')} in {_count(epochs, 'epoch')}"
    return f"{rows} rows: {_count(steps, 'step')} an epoch, {total}"


def _ppo_lines(config: PPOConfig, ranks: int, rows: int | None) -> list[str]:
    rollout, batch, name = config.rollout, config.batch, config.algorithm.advantage_estimator
    updates = ceil(rollout.samples / batch.train_batch_size)
    lines = [
        f"a rollout step is {_count(rollout.rollout_batch_size, 'prompt')} x "
        f"{_count(rollout.n_samples_per_prompt, 'answer')} = {_count(rollout.samples, 'answer')} of at most "
        f"{_count(rollout.generate_max_len, 'token')}, from {_engine_text(config)}",
        f"then {_count(updates, 'optimizer step')} x {_count(batch.max_epochs, 'epoch')}",
        _step_line(config, ranks, "answers"),
        f"advantages: {name}, {'critic from ' + str(config.critic_source) if config.critic_source else 'no critic'}",
        f"reward: {config.reward.remote_rm_url or ' + '.join(config.model.reward_models)}",
    ]
    if rows is not None:
        steps = ceil(rows / rollout.rollout_batch_size) * rollout.num_episodes
        lines.append(f"{rows} prompts x {_count(rollout.num_episodes, 'episode')}: {_count(steps, 'rollout step')}")
    return lines + _files(config)


def _engine_text(config: PPOConfig) -> str:
    engines = config.vllm.engines
    return _count(engines, "vLLM engine") if engines else "the policy itself"


def _files(config: Any) -> list[str]:
    checkpoint = config.checkpoint
    every = f"every {_count(checkpoint.save_steps, 'step')} in {checkpoint.ckpt_path}"
    return [
        f"model in {checkpoint.save_path}, figures and report in {config.logging.run_path}",
        f"checkpoints: {every if checkpoint.save_steps > 0 else 'none'}",
    ]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
