"""PPO on Ray: every model in a group of DeepSpeed workers of its own, vLLM engines beside them or none.

    python -m openrlhf.cli.train_ppo_ray --pretrain SFT --reward_pretrain RM --prompt_data FILE --input_key prompt \\
        --actor_num_gpus_per_node 1 --critic_num_gpus_per_node 1 --ref_num_gpus_per_node 1 --reward_num_gpus_per_node 1

Joins the Ray cluster that is there, else starts one on this machine. Writes the policy to ``--save_path``, and
metrics, samples, report and log to ``--run_path``. The loop is in ``openrlhf/trainer/ppo``; here is only the wiring.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from openrlhf.cli.common import run
from openrlhf.config.needs import ENGINES
from openrlhf.config.plan import plan_lines
from openrlhf.config.ppo import ACTOR, CRITIC, PROCESS, REFERENCE
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.errors import UsageError
from openrlhf.ray.placement import Placement
from openrlhf.strategy import signals
from openrlhf.trainer.setup import Run, open_run

RESERVE_S = 600.0
"""How long to wait for devices that others use, or that an autoscaler of the cluster is fetching."""


def plan(config: RayPPOConfig, _: int) -> list[str]:
    """Return the plan of a run; the ranks are those of the placement, not of a launcher."""
    placement = Placement.from_config(config)
    ranks = placement.role(ACTOR).workers
    return plan_lines(config, ranks, placement=placement.describe(), memory=placement.memory(config))


def placement_problems(config: RayPPOConfig) -> list[str]:
    """Return why the roles cannot be placed as ``config`` asks."""
    try:
        Placement.from_config(config)
    except UsageError as error:
        return error.problems
    return []


def prompts(config: RayPPOConfig) -> Any:
    """Return the training prompts, before any model."""
    from openrlhf.trainer.ppo.program import Inputs

    return Inputs(config).prompts


def train(config: RayPPOConfig) -> None:
    """Train as ``config`` says. Raises the errors of :mod:`openrlhf.errors`."""
    placement = Placement.from_config(config)
    with open_run(config, "train_ppo_ray") as opened:
        _train(config, placement, opened)


def _train(config: RayPPOConfig, placement: Placement, opened: Run) -> None:
    from openrlhf.ray.cluster import connect, disconnect
    from openrlhf.trainer.ppo.program import Inputs, build_loop, finish_run, start_up_lines

    opened.phase("data preparation")
    inputs = Inputs(config)
    try:
        opened.phase("ray")
        resource = connect(placement.slots)
        signals.install()  # Ray took the handler of SIGTERM
        opened.say("starting the workers")
        roles, engine, weight_sync = _start(config, placement, resource, inputs.optimizer_steps)
        opened.say(*start_up_lines(config, opened, inputs, roles, placement.describe()))
        loop = build_loop(config, opened, inputs, roles, engine, weight_sync)
        with signals.held():
            loop.fit()
            finish_run(config, opened, loop)
    finally:
        disconnect()


def _start(config: RayPPOConfig, placement: Placement, resource: str, max_steps: int) -> tuple[Any, Any, Any]:
    """Start all workers and engines and return the roles, the engine and the weight sync.

    All load at once; but an engine that shares devices loads first, because it measures what memory is free.
    """
    from openrlhf.ray.group import RayGroup, Watch
    from openrlhf.ray.slots import reserve
    from openrlhf.ray.weight_sync import RayWeightSync
    from openrlhf.trainer.ppo.policy_engine import PolicyEngine
    from openrlhf.trainer.ppo.process import ProcessRewardWorker
    from openrlhf.trainer.ppo.roles import Roles
    from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker

    slots = reserve(placement, resource, RESERVE_S)
    watch = Watch(config.deepspeed.collective_timeout)
    groups = {role.name: RayGroup.start(role.name, slots[role.name], watch) for role in placement.roles}
    engines, pending = None, []
    if placement.engines:
        engines, pending = _start_engines(config, placement, slots[ENGINES], watch)
    if placement.engines_share:
        watch.get(pending)
        engines.sleep()  # until the first weights come: the models need room to load
    remote = _for_workers(config)
    pending += groups[ACTOR].setup(PolicyWorker, remote, max_steps=max_steps)
    if CRITIC in groups:
        pending += groups[CRITIC].setup(CriticWorker, remote, max_steps=max_steps)
    if REFERENCE in groups:
        pending += groups[REFERENCE].setup(ReferenceWorker, remote)
    for role, path in zip(placement.rewards, remote.model.reward_models, strict=True):
        pending += groups[role.name].setup(RewardWorker, remote, path=path)
    if PROCESS in groups:
        pending += groups[PROCESS].setup(ProcessRewardWorker, remote)
    rewards = [groups[role.name] for role in placement.rewards]
    critic, reference = groups.get(CRITIC), groups.get(REFERENCE)
    process, shared = groups.get(PROCESS), placement.learners_share
    roles = Roles(groups[ACTOR], critic, reference, rewards, process, shared=shared, watched=watch.beside)
    watch.get(pending)
    if engines is None:
        engine = PolicyEngine(roles.policy)
        return roles, engine, engine
    return roles, engines, RayWeightSync(roles.policy, engines)


def _start_engines(config: RayPPOConfig, placement: Placement, slots: Any, watch: Any) -> tuple[Any, list[Any]]:
    """Start the vLLM engines; return them and the futures of their loading."""
    from openrlhf.ray.engines import RayEngines

    engines = RayEngines(slots, watch)
    loading = engines.setup(
        _absolute(config.model.pretrain),
        dtype="bfloat16" if config.model.bf16 else "float32",
        seed=config.batch.seed,
        max_model_len=config.rollout.max_model_len,
        enable_prefix_caching=config.vllm.enable_prefix_caching,
        enforce_eager=config.vllm.enforce_eager,
        gpu_memory_utilization=placement.gpu_memory_utilization,
        tensor_parallel_size=placement.tensor_parallel,
        trust_remote_code=config.model.trust_remote_code,
        sleep=placement.engine_sleep,
    )
    return engines, loading


def _for_workers(config: RayPPOConfig) -> RayPPOConfig:
    """Return the configuration as processes elsewhere need it: absolute folders, and no key of a logging service."""
    model = config.model
    rewards = ",".join(_absolute(path) for path in model.reward_models) or None
    critic = model.critic_pretrain and _absolute(model.critic_pretrain)
    placed = replace(model, pretrain=_absolute(model.pretrain), reward_pretrain=rewards, critic_pretrain=critic)
    texts = config.prompts.pretrain_data
    prompts = replace(config.prompts, pretrain_data=texts and ",".join(map(_absolute_data, texts.split(","))))
    logging = replace(config.logging, use_wandb=None, run_path=str(Path(config.logging.run_path).absolute()))
    reward = replace(config.reward, prm_pretrain=config.reward.prm_pretrain and _absolute(config.reward.prm_pretrain))
    return replace(config, model=placed, prompts=prompts, reward=reward, logging=logging)


def _absolute(path: str) -> str:
    """Return what is on this disk as an absolute path, and a name of the hub as it is."""
    local = Path(path).expanduser()
    return str(local.absolute()) if local.exists() else path


def _absolute_data(entry: str) -> str:
    """Return a source of data with its path made absolute, which stands alone or on one side of an ``@``."""
    name, at, inside = entry.strip().partition("@")
    placed = _absolute(name)
    return placed + at + (inside if placed != name or not inside else _absolute(inside))


if __name__ == "__main__":
    run(RayPPOConfig, train, "train_ppo_ray", plan, problems=placement_problems, data=prompts)
