"""The plan of a run in words: what ``--dry_run`` prints."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from math import ceil
from typing import Any

from openrlhf.config.arguments import to_flat_dict
from openrlhf.config.groups import DATA_FORMATS, BatchConfig
from openrlhf.config.needs import Pool, need_lines, ppo_roles, supervised_roles
from openrlhf.config.ppo import PPOConfig

WIDTH = 100
UNKNOWN = "steps: known once the data is read"
MEMORY = "memory of one rank in GiB, estimated"
IF_ALL = "if every row can be used"


def plan_lines(
    config: Any, world_size: int, placement: Sequence[str] = (), memory: Sequence[str] | None = None
) -> list[str]:
    """Return the lines of the plan: changed settings, ranks and batches, steps, placement, all other settings.

    Args:
        config: the configuration of a command.
        world_size: training ranks; for PPO the ranks of the actor.
        placement: who shares which device, one line each.
        memory: what every role needs; None for models that share every device.
    """
    work = _ppo_lines if isinstance(config, PPOConfig) else _supervised_lines
    data = config.prompts if isinstance(config, PPOConfig) else config.data
    rows = count_rows(data.prompt_data if isinstance(config, PPOConfig) else data.dataset, data.max_samples)
    needed = _memory_lines(config, world_size) if memory is None else memory
    return setting_sections(
        config, work(config, world_size, rows), *_section("devices", placement), *_section(MEMORY, needed)
    )


def setting_sections(config: Any, work: Sequence[str], *more: str) -> list[str]:
    """Return the lines of a plan: changed settings, the work, ``more`` lines, and all other settings."""
    flat, defaults = to_flat_dict(config), to_flat_dict(type(config)())
    changed = {name: value for name, value in flat.items() if value != defaults[name]}
    same = [f"{name}={value!r}" for name, value in flat.items() if name not in changed]
    return [
        *_section("settings", [f"{name} = {value!r}" for name, value in changed.items()]),
        *_section("plan", work),
        *more,
        *_section("by default", textwrap.wrap(" ".join(same), WIDTH, break_long_words=False, break_on_hyphens=False)),
    ]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _memory_lines(config: Any, ranks: int) -> list[str]:
    """Return what models need that all lie on every device."""
    if not isinstance(config, PPOConfig):
        roles = supervised_roles(config, ranks)
    else:
        roles = ppo_roles(config, dict.fromkeys(config.role_names, ranks))
    names = [] if isinstance(roles, str) else [role.name for role in roles]
    return need_lines(roles, [Pool(names, at_once=False)])


def _supervised_lines(config: Any, ranks: int, rows: int | None) -> list[str]:
    total = _unknown(config.data.dataset) if rows is None else f"steps: {total_text(config.batch, rows)}, {IF_ALL}"
    return [_rank_line(config, ranks, "samples"), total, *_files(config)]


def _unknown(spec: str | None) -> str:
    """Return why the steps are not known: a file that is missing may be yet to be made, or mistyped."""
    files = [name for name in (spec or "").split(",") if name.endswith(tuple(DATA_FORMATS))]
    missing = [name for name in files if not os.path.isfile(name)]
    return f"steps: not known: {missing[0]} is no file here" if missing else UNKNOWN


def _rank_line(config: Any, ranks: int, unit: str) -> str:
    text = step_text(config.batch, ranks, unit, config.attention.ring_attn_size)
    return f"{_count(ranks, 'rank')}, ZeRO stage {config.deepspeed.zero_stage}: {text}"


def step_text(batch: BatchConfig, ranks: int, unit: str, ring_size: int = 1) -> str:
    """Return how an optimizer step is cut over ranks and micro-batches; ``unit`` is what it is counted in."""
    parts = max(1, ranks // ring_size)
    who = _count(parts, "rank") if ring_size == 1 else f"{_count(parts, 'ring')} of {ring_size} ranks"
    step = f"an optimizer step is {batch.train_batch_size} {unit} = {who} x"
    if batch.max_tokens_per_gpu is not None:
        return f"{step} micro-batches of at most {batch.max_tokens_per_gpu * ring_size:,} tokens"
    share = ceil(batch.train_batch_size / parts)
    micro = ceil(share / batch.micro_train_batch_size)
    return f"{step} {_count(micro, 'micro-batch', 'es')} of at most {min(share, batch.micro_train_batch_size)}"


def total_text(batch: BatchConfig, rows: int) -> str:
    """Return the optimizer steps of a supervised run over ``rows``."""
    steps, epochs = ceil(rows / batch.train_batch_size), batch.max_epochs
    total = f"{_count(steps * epochs, 'step')} in {_count(epochs, 'epoch')}"
    return f"{rows:,} rows: {_count(steps, 'step')} an epoch, {total}"


def _ppo_lines(config: PPOConfig, ranks: int, rows: int | None) -> list[str]:
    rollout, batch, name = config.rollout, config.batch, config.algorithm.advantage_estimator
    updates = ceil(rollout.samples / batch.train_batch_size)
    lines = [
        f"a rollout step is {_count(rollout.rollout_batch_size, 'prompt')} x "
        f"{_count(rollout.n_samples_per_prompt, 'answer')} = {_count(rollout.samples, 'answer')} of at most "
        f"{_count(rollout.generate_max_len, 'token')}, from {_engine_text(config)}",
        f"then {_count(updates, 'optimizer step')} x {_count(batch.max_epochs, 'epoch')}",
        _rank_line(config, ranks, "answers"),
        f"advantages: {name}, {'critic from ' + str(config.critic_source) if config.critic_source else 'no critic'}",
        f"reward: {_reward_text(config)}",
    ]
    total = _unknown(config.prompts.prompt_data) if rows is None else f"steps: {_ppo_total(config, rows)}, {IF_ALL}"
    return [*lines, *_beside(config), total, *_files(config)]


def _beside(config: PPOConfig) -> list[str]:
    """Return what else is learned from: rewards of steps, and texts."""
    found, reward, texts = [], config.reward, config.prompts.pretrain_data
    if reward.prm_pretrain:
        found.append(f"process reward: {reward.prm_pretrain} at every {reward.prm_placeholder_token}")
    if texts:
        rows = f"{config.batch.train_batch_size} texts of {texts} in every optimizer step"
        found.append(f"beside it: {rows}, times {config.algorithm.ptx_coef:g}")
    return found


def _reward_text(config: PPOConfig) -> str:
    """Return the sources of rewards in the order of their weights; ``a | b`` are replicas."""
    servers = [" | ".join(urls) for urls in config.reward.reward_servers]
    sources = [*config.model.reward_models, *config.reward.reward_files, *servers]
    if config.reward.reward_weights is None:
        return " + ".join(sources) or "of steps alone"
    weights = config.reward.weights(len(config.model.reward_models))
    return " + ".join(f"{weight:g} x {source}" for weight, source in zip(weights, sources, strict=True))


def _ppo_total(config: PPOConfig, rows: int) -> str:
    rollout = config.rollout
    steps = ceil(rows / rollout.rollout_batch_size) * rollout.num_episodes
    most = "at most " * rollout.dynamic_filtering
    return (
        f"{rows:,} prompts x {_count(rollout.num_episodes, 'episode')}: {most}{_count(steps, 'rollout step')}, "
        f"{most}{_count(config.optimizer_steps(rows), 'optimizer step')}"
    )


def count_rows(spec: str | None, most: int) -> int | None:
    """Return the rows of one local ``.jsonl`` file, at most ``most``; None for any other source."""
    if not spec or not spec.endswith(".jsonl") or not os.path.isfile(spec):
        return None
    with open(spec, "rb") as file:
        if file.read(1) == b"[":  # one JSON list, which may take any number of lines
            return None
        file.seek(0)
        rows = sum(1 for line in file if line.strip())
    return min(rows, most) or None


def _engine_text(config: PPOConfig) -> str:
    return _count(config.engines, "vLLM engine") if config.engines else "the policy itself"


def _files(config: Any) -> list[str]:
    checkpoint = config.checkpoint
    seldom = "none" if checkpoint.disable_ds_ckpt else f"only when asked to stop, in {checkpoint.ckpt_path}"
    every = f"every {_count(checkpoint.save_steps, 'step')} in {checkpoint.ckpt_path}"
    return [
        f"model in {checkpoint.save_path}, figures and report in {config.logging.run_path}",
        f"checkpoints: {every if checkpoint.saves_at_steps else seldom}",
    ]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
