"""A checkpoint of PPO holds all roles at one step, and is whole only when the driver sees the files of each rank."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openrlhf.config.ppo import AlgorithmConfig, EvalConfig, PPOConfig
from openrlhf.errors import InfraError
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm
from openrlhf.trainer.ppo.checkpoints import PPOCheckpointing
from openrlhf.trainer.ppo.experience import ExperienceMaker
from openrlhf.trainer.ppo.groups import LocalGroup
from openrlhf.trainer.ppo.loop import PPOLoop
from tests.trainer.ppo.harness import local_loop, local_roles, reward_file, tiny_ppo_config


class RankElsewhere(LocalGroup):
    """A group of two ranks of which one writes to a disk that the driver does not see."""

    size = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The configuration of a run with actor and critic, and its roles."""
    config = tiny_ppo_config(tmp_path_factory.mktemp("roles"), algorithm=AlgorithmConfig(advantage_estimator="gae"))
    return config, local_roles(config, 16)


def save(made, folder, **roles):
    config, own = made
    config = replace(config, checkpoint=replace(config.checkpoint, ckpt_path=str(folder), save_steps=1))
    own = replace(own, **roles)
    manager = CheckpointManager(config.checkpoint, SoloComm(), say=lambda line: None)
    callback = PPOCheckpointing(config, own, manager)
    manager.save(1, callback.savers(None))
    return callback


def test_the_files_of_every_rank_make_a_checkpoint(made, tmp_path):
    save(made, tmp_path)
    assert {path.name for path in (tmp_path / "global_step1").iterdir()} == {"actor", "critic", "rng", "manifest.json"}


def test_a_rank_that_wrote_to_another_disk_is_an_error_and_no_checkpoint(made, tmp_path):
    elsewhere = RankElsewhere(made[1].critic.worker)
    with pytest.raises(InfraError, match="ranks 1 of the critic .* put --ckpt_path on a disk that all nodes share"):
        save(made, tmp_path, critic=elsewhere)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scored", "metric"), [(True, "true_score_t0.5"), (False, "reward_t0.5")])
def test_the_best_step_is_that_of_the_true_score_if_there_is_one(scored, metric, tmp_path):
    path = reward_file(tmp_path) if scored else None
    config = PPOConfig(evaluation=EvalConfig(eval_reward_func=path, eval_temperature=(0.5, 1.0)))
    loop = PPOLoop(config, None, None, None, ExperienceMaker(config, None, None), [0], None)
    assert loop.best_metric == (metric, True)


def test_the_best_step_of_a_run_is_kept_and_the_estimate_covers_all_roles(tmp_path):
    config = tiny_ppo_config(tmp_path, algorithm=AlgorithmConfig(advantage_estimator="gae"))
    config = replace(config, logging=replace(config.logging, eval_steps=1))
    config = replace(config, checkpoint=replace(config.checkpoint, save_steps=1, max_ckpt_num=1))
    config = replace(config, rollout=replace(config.rollout, num_episodes=2))
    loop, recorder = local_loop(config, prompts=16, eval_prompts=4)
    loop.fit()
    scores = {step: values["reward_t1"] for step, values in recorder.evaluations if step}
    best = max(scores, key=scores.get)
    kept = {path.name for path in (tmp_path / "ckpt").iterdir()}
    assert kept == {f"global_step{best}", f"global_step{loop.max_steps}"}
    written = sum(path.stat().st_size for path in (tmp_path / "ckpt" / f"global_step{best}").rglob("*_states.pt"))
    manager = CheckpointManager(config.checkpoint, SoloComm(), say=lambda line: None)
    assert written == pytest.approx(PPOCheckpointing(config, loop.roles, manager).sizes(loop)[0], rel=0.15)
