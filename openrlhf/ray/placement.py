"""Who runs where: the only reader of ``colocate_*`` and ``*_num_gpus_per_node``.

Arithmetic without Ray, so that ``--dry_run`` can print it; :mod:`openrlhf.ray.slots` asks a cluster for the devices. A
slot is one device of the cluster: a GPU, or a CPU core where there are none.
"""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf import device
from openrlhf.config.needs import ENGINES, Pool, need_lines, ppo_roles
from openrlhf.config.ppo import ACTOR, CRITIC, PROCESS, REFERENCE
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.errors import UsageError

SHARED_GPU_MEMORY = 0.4


@dataclass(frozen=True)
class Role:
    """A group of equal workers: ``nodes * per_node`` of them, on the devices of ``pool``."""

    name: str
    nodes: int
    per_node: int
    pool: str

    @property
    def workers(self) -> int:
        """Ranks of the group."""
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Placement:
    """The layout of a PPO run.

    Attributes:
        roles: worker groups, one for each of ``PPOConfig.role_names``.
        engines: vLLM engines; 0 means that the policy generates.
        tensor_parallel: devices of one engine.
        engine_pool: pool of the engines.
        gpu_memory_utilization: share of GPU memory for an engine.
        engine_sleep: whether engines give their memory back while the models train.
        notices: what was changed or ignored, one line each.
    """

    roles: tuple[Role, ...]
    engines: int
    tensor_parallel: int
    engine_pool: str
    gpu_memory_utilization: float
    engine_sleep: bool
    notices: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: RayPPOConfig) -> Placement:
        """Read the layout off the flags.

        Raises:
            UsageError: roles that share devices differ in size.
        """
        roles = _roles(config)
        shared, sizes = config.placement.colocate_all_models, config.vllm
        notices = _notices(config, {role.name for role in roles})
        memory = sizes.vllm_gpu_memory_utilization
        placement = cls(
            roles=roles,
            engines=sizes.engines,
            tensor_parallel=sizes.vllm_tensor_parallel_size,
            engine_pool=ACTOR if shared else ENGINES,
            gpu_memory_utilization=min(memory, SHARED_GPU_MEMORY) if shared and memory >= 0.9 else memory,
            engine_sleep=sizes.vllm_enable_sleep and shared,
            notices=tuple(notices),
        )
        problems = placement._problems(config)
        if problems:
            raise UsageError(problems)
        return placement

    def role(self, name: str) -> Role | None:
        """Return the role of that name, or None when the run has none."""
        return next((role for role in self.roles if role.name == name), None)

    @property
    def rewards(self) -> tuple[Role, ...]:
        """The reward groups, in the order of ``--reward_pretrain``."""
        return tuple(role for role in self.roles if role.name.startswith("reward"))

    @property
    def pools(self) -> dict[str, list[int]]:
        """Devices of each bundle of each pool; roles of one pool share its bundles."""
        pools: dict[str, list[int]] = {}
        for role in self.roles:
            pools.setdefault(role.pool, [1] * role.workers)
        if self.engines:
            pools.setdefault(self.engine_pool, [self.tensor_parallel] * self.engines)
        return pools

    @property
    def engines_share(self) -> bool:
        """Whether engines have devices of workers."""
        return bool(self.engines) and self.engine_pool != ENGINES

    @property
    def learners_share(self) -> bool:
        """Whether the critic has the devices of the actor."""
        critic = self.role(CRITIC)
        return critic is not None and critic.pool == self.role(ACTOR).pool

    @property
    def slots(self) -> int:
        """Devices wanted in all."""
        return sum(sum(bundles) for bundles in self.pools.values())

    def occupants(self, pool: str) -> list[str]:
        """Return who shares each device of ``pool``."""
        names = [role.name for role in self.roles if role.pool == pool]
        return names + [ENGINES] * bool(self.engines and self.engine_pool == pool)

    def threads(self, name: str) -> dict[str, str]:
        """Return the thread settings of one worker of role ``name`` (or of an engine, ``ENGINES``).

        Groups that work at the same time share the cores of a node: actor and critic while they train, everybody while
        rollouts are scored. Engines generate while the others wait.
        """
        if name == ENGINES:
            return device.thread_environment(max(1, self.engines * self.tensor_parallel))
        learners = (ACTOR, CRITIC)
        busy = [role for role in self.roles if name not in learners or role.name in learners]
        return device.thread_environment(sum(role.per_node for role in busy))

    def describe(self) -> list[str]:
        """Return the layout as lines for people: who shares which devices."""
        lines = [f"{self.slots} device slots"]
        sizes = {role.name: f"{role.name} x{role.workers}" for role in self.roles}
        sizes[ENGINES] = f"{ENGINES} x{self.engines}" + f" (tp {self.tensor_parallel})" * (self.tensor_parallel > 1)
        for pool, bundles in self.pools.items():
            names = self.occupants(pool)
            shared = " share" if len(names) > 1 else ""
            lines.append(f"  {sum(bundles)} slots: {', '.join(sizes[name] for name in names)}{shared}")
        if not self.engines:
            lines.append("  no vLLM engines: the policy generates")
        return lines + [f"  {notice}" for notice in self.notices]

    def memory(self, config: RayPPOConfig) -> list[str]:
        """Return what the roles need in memory, and which cards have room for those that share a device."""
        roles = ppo_roles(config, {role.name: role.workers for role in self.roles}, self.gpu_memory_utilization)
        rests = config.optimizer_rests
        pools = [Pool(self.occupants(pool), self.engine_sleep, rests) for pool in self.pools]
        return need_lines(roles, pools)

    def _problems(self, config: RayPPOConfig) -> list[str]:
        ring = config.attention.ring_attn_size
        found = [_ring_problem(role, ring) for role in self.roles if role.workers % ring]
        for pool in self.pools:
            members = [role for role in self.roles if role.pool == pool]
            for other in members[1:]:
                if (other.nodes, other.per_node) != (members[0].nodes, members[0].per_node):
                    found.append(_size_problem(config, members[0], other))
        if self.engines and config.placement.colocate_all_models:
            found += self._engine_problems()
        return list(dict.fromkeys(found))

    def _engine_problems(self) -> list[str]:
        actor, size = self.roles[0], self.tensor_parallel
        found = []
        if actor.workers != self.engines * size:
            found.append(
                f"--colocate_all_models puts engines on all devices of the actor: --vllm_num_engines is "
                f"{self.engines}, --vllm_tensor_parallel_size {size}; their product must be the {actor.workers} of "
                "--actor_num_nodes x --actor_num_gpus_per_node"
            )
        if actor.per_node % size:
            found.append(
                f"--vllm_tensor_parallel_size {size}: an engine lies on one node, so with --colocate_all_models it "
                f"must divide --actor_num_gpus_per_node {actor.per_node}"
            )
        return found


def _roles(config: RayPPOConfig) -> tuple[Role, ...]:
    """Return the groups that the flags ask for; the pool is named after the first role in it."""
    return tuple(Role(name, *_size(config, name), _pool(config, name)) for name in config.role_names)


def _size(config: RayPPOConfig, name: str) -> tuple[int, int]:
    """Return the nodes of a role, and its ranks on each."""
    flags, kind = config.placement, _flag_name(name)
    return getattr(flags, f"{kind}_num_nodes"), getattr(flags, f"{kind}_num_gpus_per_node")


def _pool(config: RayPPOConfig, name: str) -> str:
    """Return whose devices a role has; models of rewards, also of processes, may have those of the critic."""
    flags = config.placement
    with_critic = flags.colocate_critic_reward and CRITIC in config.role_names
    if with_critic and name not in (ACTOR, REFERENCE):
        return CRITIC
    shared = flags.colocate_all_models or (name == REFERENCE and flags.colocate_actor_ref)
    return ACTOR if shared else name


def _notices(config: RayPPOConfig, names: set[str]) -> list[str]:
    flags, sizes, found = config.placement, config.vllm, []
    if flags.colocate_critic_reward and CRITIC not in names:
        found.append("--colocate_critic_reward has no effect: there is no critic")
    if sizes.vllm_enable_sleep and not flags.colocate_all_models:
        found.append("--vllm_enable_sleep has no effect without --colocate_all_models: engines keep their devices")
    if flags.colocate_all_models and sizes.engines and sizes.vllm_gpu_memory_utilization >= 0.9:
        found.append(f"--vllm_gpu_memory_utilization is {SHARED_GPU_MEMORY}: engines share devices with the models")
    return found


def _ring_problem(role: Role, ring: int) -> str:
    name = _flag_name(role.name)
    return (
        f"--ring_attn_size {ring}: the {role.workers} ranks of the {name} model cannot be dealt to rings of {ring}: "
        f"change --{name}_num_nodes or --{name}_num_gpus_per_node, or lower the flag"
    )


def _flag_name(name: str) -> str:
    """Return what the flags for the size of the role ``name`` begin with."""
    return "reward" if name == PROCESS else name.split("-")[0]


def _size_problem(config: RayPPOConfig, first: Role, other: Role) -> str:
    flags = config.placement
    if flags.colocate_all_models and not (first.pool == CRITIC and flags.colocate_critic_reward):
        cause = "--colocate_all_models"
    else:
        cause = "--colocate_actor_ref" if first.name == ACTOR else "--colocate_critic_reward"
    one, two = _flag_name(first.name), _flag_name(other.name)
    return (
        f"{cause} shares devices between {one} and {two}: --{one}_num_nodes {first.nodes} --{one}_num_gpus_per_node "
        f"{first.per_node} must equal --{two}_num_nodes {other.nodes} --{two}_num_gpus_per_node {other.per_node}"
    )
