"""A checkpoint of several ranks is whole only when the driver sees the files of each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from openrlhf.config.groups import CheckpointConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import InfraError
from openrlhf.strategy.checkpoint import CheckpointManager, save_rng
from openrlhf.strategy.comm import SoloComm
from openrlhf.trainer.ppo.checkpoints import PPOCheckpointing
from openrlhf.trainer.ppo.experience import Roles


class Ranks:
    """A group whose ranks write what they must, some of them to a disk of their own."""

    def __init__(self, size: int, elsewhere: dict[int, Path]):
        self.size, self.elsewhere = size, elsewhere

    def run(self, method, *, path):
        for rank in range(self.size):
            save_rng(self.elsewhere.get(rank, Path(path)), rank)
        return []

    def get(self, futures):
        return futures


def save(tmp_path, elsewhere):
    checkpoint = CheckpointConfig(ckpt_path=str(tmp_path / "ckpt"), save_steps=1)
    roles = Roles(Ranks(2, {}), Ranks(2, elsewhere), None, [])
    callback = PPOCheckpointing(
        PPOConfig(checkpoint=checkpoint), roles, CheckpointManager(checkpoint, SoloComm(), say=lambda line: None)
    )
    callback.on_step_end(SimpleNamespace(global_step=1, state_dict=dict), {})


def test_the_files_of_every_rank_make_a_checkpoint(tmp_path):
    save(tmp_path, {})
    assert [path.name for path in (tmp_path / "ckpt").iterdir()] == ["global_step1"]


def test_a_rank_that_wrote_to_another_disk_is_an_error_and_no_checkpoint(tmp_path):
    with pytest.raises(InfraError, match="ranks 1 of the critic .* put --ckpt_path on a disk that all nodes share"):
        save(tmp_path, {1: tmp_path / "another node"})
    assert not (tmp_path / "ckpt" / "global_step1").exists()
