"""Checkpoints of PPO: all roles and the driver's position in one manifest, saved and loaded between rollout steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import InfraError
from openrlhf.strategy.checkpoint import CheckpointManager, rng_file
from openrlhf.trainer.callbacks import Callback, due, how_to_resume
from openrlhf.trainer.console import OURS
from openrlhf.trainer.ppo.experience import Roles
from openrlhf.trainer.ppo.groups import WorkerGroup
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


class PPOCheckpointing(Callback):
    """Saves every ``--save_steps`` rollout steps what resumes the run, and with it a Hugging Face folder if asked."""

    def __init__(self, config: PPOConfig, roles: Roles, manager: CheckpointManager):
        self._config = config.checkpoint
        self._roles = roles
        self._manager = manager
        self._on_disk = 0

    def restore(self, trainer: Any) -> None:
        """Load the newest checkpoint under ``--load_checkpoint``; else set older ones aside."""
        checkpoint = self._manager.start()
        if checkpoint is not None:
            trainer.load_state_dict(checkpoint.state)
            self._manager.load(checkpoint, self._each_role(PolicyWorker.load, CriticWorker.load))
            self._on_disk = checkpoint.step

    def on_step_end(self, trainer: Any, metrics: Mapping[str, float]) -> None:
        """Save when the step is due."""
        step = trainer.global_step
        if not due(step, self._config.save_steps):
            return
        if self._config.save_hf_ckpt:
            self._manager.export(step, _calls(self._roles.policy, PolicyWorker.export))
        if not self._config.disable_ds_ckpt:
            self._save(trainer)

    def on_stop(self, trainer: Any) -> str:
        """Save the present step, whatever the cadence, unless that is done already."""
        if trainer.global_step and trainer.global_step != self._on_disk and not self._config.disable_ds_ckpt:
            self._save(trainer)
        return how_to_resume(self._config, trainer.global_step, self._on_disk)

    def _save(self, trainer: Any) -> None:
        OURS.debug("phase: save step %d", trainer.global_step)
        self._manager.save(trainer.global_step, self._savers(), trainer.state_dict())
        self._on_disk = trainer.global_step

    def _each_role(self, actor: Callable, critic: Callable) -> dict[str, Callable[[Path], None]]:
        """Return what saves or loads each role that learns, by the name of its folder."""
        found = {"actor": _calls(self._roles.policy, actor)}
        if self._roles.critic:
            found["critic"] = _calls(self._roles.critic, critic)
        return found

    def _savers(self) -> dict[str, Callable[[Path], None]]:
        """Return what saves each role and then looks whether the files of all its ranks are here."""
        sizes = {"actor": self._roles.policy.size, "critic": self._roles.critic.size if self._roles.critic else 0}
        savers = self._each_role(PolicyWorker.save, CriticWorker.save)
        return {name: partial(_save_and_look, saver, sizes[name]) for name, saver in savers.items()}


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
