"""One local Ray a test file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openrlhf.config.ppo import AlgorithmConfig, PPOModelConfig
from openrlhf.config.ppo_ray import PlacementConfig, RayPPOConfig, VLLMConfig
from openrlhf.ray import cluster
from openrlhf.ray.placement import Placement

ONE_EACH = PlacementConfig(
    actor_num_gpus_per_node=1, critic_num_gpus_per_node=1, ref_num_gpus_per_node=1, reward_num_gpus_per_node=1
)


def placement_of(actors: int = 1, engines: int = 0, tensor_parallel: int = 1, **flags) -> Placement:
    """Return the placement of ``actors`` policy workers and ``engines`` engines, nothing else."""
    return Placement.from_config(
        RayPPOConfig(
            model=PPOModelConfig(pretrain="policy"),
            placement=replace(ONE_EACH, actor_num_gpus_per_node=actors, **flags),
            vllm=VLLMConfig(vllm_num_engines=engines, vllm_tensor_parallel_size=tensor_parallel),
            algorithm=AlgorithmConfig(advantage_estimator="reinforce", init_kl_coef=0.0),
        )
    )


@pytest.fixture(scope="module")
def home_of_ray(tmp_path_factory):
    """The home folder, empty at first, of whoever starts the Ray of a test file."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def local_ray(home_of_ray):
    """A Ray of this machine with four device slots; the value is what a slot is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home_of_ray))
        resource = cluster.connect(4)
    yield resource
    cluster.disconnect()
