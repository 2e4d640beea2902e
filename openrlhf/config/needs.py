"""What the models of a command need in memory, role by role and phase by phase, and which cards have so much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from openrlhf.config.groups import LoRAConfig
from openrlhf.config.memory import Memory, Sharding, backward, forward, frozen, key_values, trained
from openrlhf.config.ppo import ACTOR, CRITIC, PROCESS, REFERENCE, PPOConfig
from openrlhf.config.shapes import Shape, shape_of

GIB = 2**30
ENGINES = "vllm"
"""The role of the vLLM engines."""
CARDS = {"24 GB": 23.6, "40 GB": 39.4, "48 GB": 47.4, "80 GB": 79.2, "141 GB": 139.8}
"""GiB that a card of that name has."""
RESERVED = 1.5 * GIB
"""What CUDA, its libraries and the buffers of NCCL take of a card."""
COLUMNS = ("weights", "gradients", "optimizer", "gathered", "activations", "logits", "cache", "device")


@dataclass(frozen=True)
class RoleMemory:
    """What one rank of a role needs.

    Attributes:
        name: of the role.
        held: what stays in every phase.
        phases: what each phase adds.
        share: of a card that the role takes while it generates, whatever it needs; only a vLLM engine does.
    """

    name: str
    held: Memory
    phases: Mapping[str, Memory] = field(default_factory=dict)
    share: float = 0.0


@dataclass(frozen=True)
class Pool:
    """Roles that share each of some devices.

    Attributes:
        roles: their names.
        engine_sleeps: whether an engine gives its memory back while the others work.
        optimizer_rests: whether states of optimizers lie in main memory but during updates.
        at_once: whether different roles score at the same time.
    """

    roles: Sequence[str]
    engine_sleeps: bool = False
    optimizer_rests: bool = False
    at_once: bool = True


def supervised_roles(config: Any, ranks: int) -> list[RoleMemory] | str:
    """Return what the models of a supervised command need; or the name of one whose size is not known here."""
    tokens = _train_tokens(config, config.data.max_len * (2 if hasattr(config.data, "chosen_key") else 1))
    sharding = sharding_of(config, ranks)
    scalar = config.run_prefix == "rm"
    beside = _beside(config)
    shape = shape_of(config.model.pretrain)
    other = shape_of(beside[1]) if beside else None
    if shape is None or (beside and other is None):
        return str(beside[1] if shape else config.model.pretrain)
    roles = [_learner("model", shape.with_scalar_head if scalar else shape, config, tokens, sharding)]
    if beside and other:
        name, _, offload = beside
        held = frozen(other.parameters, frozen_sharding(config, ranks, offload))
        roles.append(RoleMemory(name, held, {"score": forward(other, tokens, sharding)}))
    return roles


def ppo_roles(config: PPOConfig, ranks: Mapping[str, int], share: float = 0.0) -> list[RoleMemory] | str:
    """Return what the roles of a PPO run need; or the name of a model whose size is not known here.

    Args:
        config: the run.
        ranks: of every role that the run has, see ``PPOConfig.role_names``.
        share: of a card that a vLLM engine takes.
    """
    longest, models = config.rollout.max_model_len, config.model
    sources = {ACTOR: models.pretrain, REFERENCE: models.pretrain, CRITIC: config.critic_source}
    sources |= dict(zip(models.reward_names, models.reward_models, strict=True)) | {
        PROCESS: config.reward.prm_pretrain
    }
    shapes = {name: shape_of(sources[name]) for name in ranks}
    unknown = next((str(sources[name]) for name, shape in shapes.items() if shape is None), None)
    if unknown is not None:
        return unknown
    scored = _rank_tokens(config, config.rollout.micro_rollout_batch_size, config.scoring_budget, longest)
    roles = []
    for name, count in ranks.items():
        shape, sharding = shapes[name], sharding_of(config, count)
        if name in (ACTOR, CRITIC):
            shape = shape.with_scalar_head if name == CRITIC else shape
            role = _learner(name, shape, config, _train_tokens(config, longest), sharding)
            role.phases["score"] = forward(shape, scored, sharding)
        else:
            shape = shape if name in (REFERENCE, PROCESS) else shape.with_scalar_head
            held = frozen(shape.parameters, frozen_sharding(config, count, config.reward.ref_reward_offload))
            role = RoleMemory(name, held, {"score": forward(shape, scored, sharding)})
        roles.append(role)
    return roles + _generation(config, roles, shapes[ACTOR], share)


def _generation(config: PPOConfig, roles: list[RoleMemory], shape: Shape, share: float) -> list[RoleMemory]:
    """Return the role of a vLLM engine; without one give the actor a phase of generation."""
    width, longest = 2 if config.model.bf16 else 4, config.rollout.max_model_len
    if not config.engines:
        rows = config.rollout.micro_rollout_batch_size
        cache = key_values(shape, rows * longest, width)
        roles[0].phases["generate"] = Memory(cache=cache, logits=rows * shape.vocabulary * 8)
        return []
    parts = config.vllm.vllm_tensor_parallel_size
    held = Memory(weights=shape.parameters * width / parts)
    return [RoleMemory(ENGINES, held, {"generate": Memory(cache=key_values(shape, longest, width) / parts)}, share)]


def need_lines(roles: list[RoleMemory] | str, pools: Sequence[Pool]) -> list[str]:
    """Return the table of what a rank of every role needs in every phase, and which cards have room for it."""
    if isinstance(roles, str):
        return [f"not known: {roles} is no folder here, and its name does not tell its size"]
    lines = ["".join(f"{name:>12}" for name in ("role", "phase", *COLUMNS))]
    for role in roles:
        for phase, added in role.phases.items():
            whole = role.held + added
            cells = [f"{getattr(whole, name) / GIB:.2f}" for name in COLUMNS]
            lines.append("".join(f"{cell:>12}" for cell in (role.name, phase, *cells)))
    by_name = {role.name: role for role in roles}
    for pool in pools:
        lines += _pool_lines(pool, [by_name[name] for name in pool.roles if name in by_name])
    for role in roles:
        if role.held.host:
            lines.append(f"{role.name}: {role.held.host / GIB:.2f} GiB of main memory a rank on top")
    return lines


def _pool_lines(pool: Pool, roles: list[RoleMemory]) -> list[str]:
    """Return which cards can hold ``roles`` together, and in which phase they need the most."""
    fits = [card for card, size in CARDS.items() if _fits(pool, roles, size * GIB - RESERVED)]
    needs = phase_needs(pool, roles, 0.0)
    phase = max(needs, key=needs.get)
    who = ", ".join(role.name for role in roles)
    room = f"fits cards of {fits[0]} and more" if fits else f"fits no card: the largest, {[*CARDS][-1]}, is too small"
    own = any(role.share for role in roles)
    text = f"{who}: {needs[phase] / GIB:.2f} GiB a device ({phase}); {room}"
    return [text + (", where an engine fills the rest of its share with its cache" if own else "")]


def _fits(pool: Pool, roles: list[RoleMemory], room: float) -> bool:
    engines = [role for role in roles if role.share]
    if any(role.held.device + role.phases["generate"].device > role.share * room for role in engines):
        return False
    return max(phase_needs(pool, roles, room).values()) <= room


def phase_needs(pool: Pool, roles: Sequence[RoleMemory], room: float) -> dict[str, float]:
    """Return the bytes on one device in every phase; an engine takes its share of ``room``, and what it must have."""
    needs = {}
    for phase in ("generate", "score", *(f"train {role.name}" for role in roles if "train" in role.phases)):
        kind, _, who = phase.partition(" ")
        total, working = 0.0, [0.0]
        for role in roles:
            if role.share:
                awake = kind == "generate" or not pool.engine_sleeps
                least = role.held.device + role.phases["generate"].device
                total += max(role.share * room, least) if awake else 0.0
                continue
            rests = pool.optimizer_rests and who != role.name
            total += role.held.held - (role.held.optimizer if rests else 0.0)
            if kind in role.phases and (kind != "train" or who == role.name):
                working.append(role.phases[kind].working)
        needs[phase] = total + (sum(working) if pool.at_once else max(working))
    return needs


def _learner(name: str, shape: Shape, config: Any, tokens: int, sharding: Sharding) -> RoleMemory:
    added = adapter_parameters(shape, config.lora)
    learning, total = added or shape.parameters, shape.parameters + added
    checkpointing = config.model.gradient_checkpointing
    working = backward(shape, tokens, learning, sharding, checkpointing=checkpointing)
    return RoleMemory(name, trained(total, learning, sharding), {"train": working})


def adapter_parameters(shape: Shape, lora: LoRAConfig) -> int:
    """Return the parameters of adapters on every linear layer; 0 without adapters."""
    attention = 2 * (2 * shape.hidden + shape.queries + shape.keys)
    feed_forward = shape.experts * (3 if shape.gated else 2) * (shape.hidden + shape.inner)
    return lora.lora_rank * shape.layers * (attention + feed_forward)


def _train_tokens(config: Any, length: int) -> int:
    """Return the tokens of a micro-batch of training on one rank, at most."""
    return _rank_tokens(config, config.batch.micro_train_batch_size, config.batch.max_tokens_per_gpu, length)


def _rank_tokens(config: Any, rows: int, budget: int | None, length: int) -> int:
    """Return the tokens on one rank of ``rows`` rows of ``length`` tokens, or what a token budget makes of them.

    A ring deals each row over its ranks; a row that is longer than the budget is alone.
    """
    ring = config.attention.ring_attn_size
    return rows * length // ring if budget is None else max(budget, length // ring)


def sharding_of(config: Any, ranks: int) -> Sharding:
    """Return how the flags hold a model that is trained on ``ranks``."""
    flags = config.deepspeed
    return Sharding(flags.zero_stage, ranks, config.model.bf16, config.lora.load_in_4bit, flags.adam_offload)


def frozen_sharding(config: Any, ranks: int, offload: bool) -> Sharding:
    """Return how the flags hold a model that is only read, whose shards may lie in main memory."""
    return Sharding(config.deepspeed.zero_stage, ranks, config.model.bf16, config.lora.load_in_4bit, offload)


def _beside(config: Any) -> tuple[str, str, bool] | None:
    """Return name, source and offloading of the model that a supervised command keeps beside the one it trains."""
    if config.run_prefix == "kd":
        return "teacher", config.teacher_model, config.teacher_offload
    if config.run_prefix not in ("dpo", "kto") or config.precompute_ref_log_probs:
        return None
    source = config.reference if config.run_prefix == "dpo" else config.model.pretrain
    own = config.lora.lora_rank and getattr(config, "ref_pretrain", None) in (None, config.model.pretrain)
    return None if source is None or own else ("reference", source, config.ref_offload)
