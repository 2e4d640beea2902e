"""The arithmetic of who shares which devices; no Ray is started."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from openrlhf.config.groups import AttentionConfig, LoRAConfig
from openrlhf.config.ppo import AlgorithmConfig, PPOModelConfig
from openrlhf.config.ppo_ray import PlacementConfig, RayPPOConfig, VLLMConfig
from openrlhf.errors import UsageError
from openrlhf.ray.placement import Placement
from openrlhf.ray.slots import bundles_by_node, spans_by_node

TWO_EACH = PlacementConfig(
    actor_num_gpus_per_node=2, critic_num_gpus_per_node=2, ref_num_gpus_per_node=2, reward_num_gpus_per_node=2
)


def config_with(*, vllm: VLLMConfig | None = None, rewards: str = "rm", algorithm: dict | None = None, **flags):
    return RayPPOConfig(
        model=PPOModelConfig(pretrain="policy", reward_pretrain=rewards),
        placement=replace(TWO_EACH, **flags),
        vllm=vllm or VLLMConfig(vllm_num_engines=2),
        algorithm=AlgorithmConfig(**(algorithm or {})),
    )


def pools(placement: Placement) -> dict[str, tuple[list[str], int]]:
    return {pool: (placement.occupants(pool), sum(bundles)) for pool, bundles in placement.pools.items()}


def test_every_role_has_its_own_devices_without_colocation():
    placement = Placement.from_config(config_with())
    assert pools(placement) == {
        "actor": (["actor"], 2),
        "ref": (["ref"], 2),
        "critic": (["critic"], 2),
        "reward": (["reward"], 2),
        "vllm": (["vllm"], 2),
    }
    assert placement.slots == 10


def test_actor_and_reference_share():
    placement = Placement.from_config(config_with(colocate_actor_ref=True))
    assert placement.occupants("actor") == ["actor", "ref"]
    assert placement.slots == 8


def test_critic_and_all_reward_models_share():
    placement = Placement.from_config(config_with(colocate_critic_reward=True, rewards="rm, other"))
    assert placement.occupants("critic") == ["critic", "reward", "reward-2"]
    assert [role.name for role in placement.rewards] == ["reward", "reward-2"]
    assert placement.slots == 8


def test_all_models_and_engines_share_one_pool():
    vllm = VLLMConfig(vllm_num_engines=2, vllm_enable_sleep=True)
    placement = Placement.from_config(config_with(colocate_all_models=True, vllm=vllm))
    assert pools(placement) == {"actor": (["actor", "ref", "critic", "reward", "vllm"], 2)}
    assert placement.gpu_memory_utilization == 0.4
    assert placement.engine_sleep


def test_a_placement_knows_whether_engines_and_learners_share_their_devices():
    apart = Placement.from_config(config_with())
    together = Placement.from_config(config_with(colocate_all_models=True))
    half = Placement.from_config(config_with(colocate_all_models=True, colocate_critic_reward=True))
    without = Placement.from_config(config_with(colocate_all_models=True, vllm=VLLMConfig()))
    facts = [(each.engines_share, each.learners_share) for each in (apart, together, half, without)]
    assert facts == [(False, False), (True, True), (True, False), (False, True)]


def test_critic_and_reward_leave_the_pool_of_all_models_when_asked():
    placement = Placement.from_config(config_with(colocate_all_models=True, colocate_critic_reward=True))
    assert pools(placement) == {"actor": (["actor", "ref", "vllm"], 2), "critic": (["critic", "reward"], 2)}


def test_without_a_critic_sharing_with_it_means_nothing_and_is_said():
    placement = Placement.from_config(
        config_with(colocate_critic_reward=True, algorithm={"advantage_estimator": "reinforce"})
    )
    assert placement.role("critic") is None
    assert placement.occupants("reward") == ["reward"]
    assert any("--colocate_critic_reward" in line for line in placement.describe())


def test_there_is_no_reference_without_a_kl_penalty():
    assert Placement.from_config(config_with(algorithm={"init_kl_coef": 0.0})).role("ref") is None
    assert Placement.from_config(config_with(algorithm={"init_kl_coef": 0.0, "kl_target": 1.0})).role("ref")


def test_with_adapters_the_policy_is_its_own_reference():
    placement = Placement.from_config(replace(config_with(colocate_actor_ref=True), lora=LoRAConfig(lora_rank=8)))
    assert placement.role("ref") is None and placement.occupants("actor") == ["actor"]


def test_an_unset_number_of_engines_means_none():
    placement = Placement.from_config(config_with(vllm=VLLMConfig()))
    assert placement.engines == 0
    assert "vllm" not in placement.pools
    assert any("the policy generates" in line for line in placement.describe())


def test_sleep_without_shared_devices_is_ignored_and_said():
    placement = Placement.from_config(config_with(vllm=VLLMConfig(vllm_num_engines=1, vllm_enable_sleep=True)))
    assert not placement.engine_sleep
    assert any("--vllm_enable_sleep" in notice for notice in placement.notices)


def test_a_memory_share_set_by_hand_is_kept():
    vllm = VLLMConfig(vllm_num_engines=2, vllm_gpu_memory_utilization=0.6)
    assert Placement.from_config(config_with(colocate_all_models=True, vllm=vllm)).gpu_memory_utilization == 0.6


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"colocate_actor_ref": True, "ref_num_nodes": 3}, ("--colocate_actor_ref", "--ref_num_nodes 3")),
        (
            {"colocate_critic_reward": True, "reward_num_nodes": 2},
            ("--colocate_critic_reward", "--reward_num_nodes 2"),
        ),
        ({"colocate_all_models": True, "critic_num_nodes": 2}, ("--colocate_all_models", "--critic_num_nodes 2")),
        ({"colocate_all_models": True, "vllm": VLLMConfig(vllm_num_engines=1)}, ("--vllm_num_engines is 1",)),
        (
            {"colocate_all_models": True, "vllm": VLLMConfig(vllm_num_engines=1, vllm_gpu_memory_utilization=0.6)},
            ("--vllm_num_engines is 1",),
        ),
        (
            {"colocate_all_models": True, "vllm": VLLMConfig(vllm_num_engines=2, vllm_tensor_parallel_size=2)},
            ("--vllm_num_engines is 2", "--vllm_tensor_parallel_size 2", "must be the 2 of"),
        ),
        (
            {
                **{f"{role}_num_nodes": 2 for role in ("actor", "ref", "critic", "reward")},
                **{f"{role}_num_gpus_per_node": 3 for role in ("actor", "ref", "critic", "reward")},
                "colocate_all_models": True,
                "vllm": VLLMConfig(vllm_num_engines=3, vllm_tensor_parallel_size=2),
            },
            ("must divide --actor_num_gpus_per_node 3",),
        ),
    ],
)
def test_what_cannot_be_placed_is_refused_by_flag(flags, named):
    with pytest.raises(UsageError) as refused:
        Placement.from_config(config_with(**flags))
    for part in named:
        assert part in str(refused.value)


def test_tensor_parallel_engines_take_whole_bundles():
    vllm = VLLMConfig(vllm_num_engines=2, vllm_tensor_parallel_size=2)
    placement = Placement.from_config(config_with(vllm=vllm))
    assert placement.pools["vllm"] == [2, 2]
    assert placement.slots == 12


def test_an_engine_over_several_devices_shares_them_with_the_models():
    vllm = VLLMConfig(vllm_num_engines=1, vllm_tensor_parallel_size=2)
    placement = Placement.from_config(config_with(colocate_all_models=True, vllm=vllm))
    assert pools(placement) == {"actor": (["actor", "ref", "critic", "reward", "vllm"], 2)}


def test_such_an_engine_never_lies_on_two_nodes():
    nodes = {0: "b", 1: "a", 2: "b", 3: "a", 4: "b", 5: "a"}
    assert bundles_by_node(nodes) == (1, 3, 5, 0, 2, 4)
    assert spans_by_node(nodes, 2) == ((1, 3), (0, 2))
    assert spans_by_node(nodes, 3) == ((1, 3, 5), (0, 2, 4))


def test_groups_that_work_together_share_the_cores(monkeypatch):
    monkeypatch.setattr("openrlhf.device.cores", lambda: 16)
    placement = Placement.from_config(config_with())
    names = ("actor", "critic", "ref", "reward", "vllm")
    threads = {name: placement.threads(name)["OMP_NUM_THREADS"] for name in names}
    assert threads == {"actor": "4", "critic": "4", "ref": "2", "reward": "2", "vllm": "8"}


def test_the_description_names_every_role_and_its_size():
    lines = Placement.from_config(config_with(colocate_actor_ref=True)).describe()
    assert lines[0] == "8 device slots"
    assert "  2 slots: actor x2, ref x2 share" in lines
    assert "  2 slots: vllm x2" in lines


def test_planning_imports_neither_ray_nor_torch():
    code = "import sys, openrlhf.ray.placement; sys.exit(any(name in sys.modules for name in ('ray', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_role_must_be_dealt_to_rings():
    config = replace(config_with(critic_num_gpus_per_node=3), attention=AttentionConfig(ring_attn_size=2))
    with pytest.raises(UsageError, match="--ring_attn_size 2: the 3 ranks of the critic") as caught:
        Placement.from_config(config)
    assert len(caught.value.problems) == 1
    assert Placement.from_config(replace(config, placement=TWO_EACH)).role("critic").workers == 2
