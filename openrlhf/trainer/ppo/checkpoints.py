"""Checkpoints of PPO: all roles and the driver's position in one manifest, saved and loaded between rollout steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import InfraError
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.rng import rng_file
from openrlhf.trainer.checkpointing import Checkpointing
from openrlhf.trainer.ppo.groups import WorkerGroup
from openrlhf.trainer.ppo.roles import Roles
from openrlhf.trainer.ppo.worker_base import TrainedWorker
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker


def checkpoint_layout(config: PPOConfig, roles: Roles) -> dict[str, Any]:
    """Return what the files of a checkpoint depend on: they load only into the same layout."""
    return {
        "actor_ranks": roles.policy.size,
        "critic_ranks": roles.critic.size if roles.critic else 0,
        "zero_stage": config.deepspeed.zero_stage,
        "bf16": config.model.bf16,
        "adam_offload": config.deepspeed.adam_offload,
    }


class PPOCheckpointing(Checkpointing):
    """Saves every ``--save_steps`` rollout steps all roles that learn, and with it a Hugging Face folder if asked."""

    def __init__(self, config: PPOConfig, roles: Roles, manager: CheckpointManager):
        super().__init__(manager, config.checkpoint, _calls(roles.policy, PolicyWorker.export))
        self._roles = roles

    def savers(self, trainer: Any) -> dict[str, Callable[[Path], None]]:
        """Return what saves each role and then looks whether the files of all its ranks are here."""
        savers = self._each_role(PolicyWorker.save, CriticWorker.save)
        if self._roles.comm.world_size > 1:
            return savers  # the ranks save together, and the manager compares what they see
        sizes = {"actor": self._roles.policy.size, "critic": self._roles.critic.size if self._roles.critic else 0}
        return {name: partial(_save_and_look, saver, sizes[name]) for name, saver in savers.items()}

    def loaders(self, trainer: Any) -> dict[str, Callable[[Path], None]]:
        """Return what loads each role."""
        return self._each_role(PolicyWorker.load, CriticWorker.load)

    def sizes(self, trainer: Any) -> tuple[int, int]:
        """Return the bytes of one checkpoint, all roles together, and of one export of the policy."""
        groups = [group for group in (self._roles.policy, self._roles.critic) if group]
        found = [group.get(group.run(TrainedWorker.checkpoint_bytes))[0] for group in groups]
        return sum(checkpoint for checkpoint, _ in found), found[0][1]

    def _each_role(self, actor: Callable, critic: Callable) -> dict[str, Callable[[Path], None]]:
        """Return what saves or loads each role that learns, by the name of its folder."""
        found = {"actor": _calls(self._roles.policy, actor)}
        if self._roles.critic:
            found["critic"] = _calls(self._roles.critic, critic)
        return found


def _save_and_look(saver: Callable[[Path], None], ranks: int, path: Path) -> None:
    """Save a role to ``path``. Raises InfraError when a rank wrote to a disk that this process does not see."""
    saver(path)
    absent = [rank for rank in range(ranks) if not rng_file(path, rank).is_file()]
    if absent:
        raise InfraError(
            f"ranks {', '.join(map(str, absent))} of the {path.name} wrote their part of {path} elsewhere: "
            "put --ckpt_path on a disk that all nodes share"
        )


def _calls(group: WorkerGroup, method: Callable) -> Callable[[Path], None]:
    """Return a function that calls ``method`` with an absolute path on every worker and waits for all."""

    def call(path: Path) -> None:
        group.get(group.run(method, path=str(Path(path).absolute())))

    return call
