"""A cluster of two nodes, both on this machine: who lies on which node, and a whole run over both."""

from __future__ import annotations

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group

from openrlhf.errors import InfraError
from openrlhf.ray import cluster
from openrlhf.ray.group import RayGroup, Watch
from openrlhf.ray.slots import Slots, reserve
from tests.cli.test_train_ppo_ray import data, metrics, ppo
from tests.ray.conftest import placement_of
from tests.trainer.ppo.harness import reward_file

pytestmark = [pytest.mark.full, pytest.mark.timeout(300)]
NODE = {"num_cpus": 8, "num_gpus": 2, "object_store_memory": 200 * 2**20}


class Place:
    """A worker that knows where it is."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.fixture(scope="module")
def two_nodes():
    """The address of a cluster of two nodes with two device slots each; this process has joined it."""
    both = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    both.add_node(**NODE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", both.address)
        assert cluster.connect(4) == "GPU" and not cluster.is_ours()
        yield both.address
        cluster.disconnect()
    both.shutdown()


def node_of(slots: Slots, bundle: int) -> str:
    return placement_group_table(slots.group)["bundles_to_node_id"][bundle]


def test_ranks_of_one_node_are_neighbours(two_nodes):
    slots = reserve(placement_of(actors=4), "GPU", timeout_s=30)["actor"]
    group = RayGroup.start("actor", slots, Watch(timeout_s=60))
    group.get(group.build(Place))
    first, second, third, fourth = group.get(group.run(Place.node))
    assert first == second != third == fourth
    remove_placement_group(slots.group)


def test_an_engine_over_two_devices_lies_on_one_node_beside_two_ranks(two_nodes):
    placement = placement_of(actors=4, engines=2, tensor_parallel=2, colocate_all_models=True)
    both = reserve(placement, "GPU", timeout_s=30)
    slots = both["vllm"]
    assert len({node_of(slots, bundle) for bundle in slots.bundles}) == 2
    for index, span in enumerate(slots.spans):
        assert len({node_of(slots, bundle) for bundle in span}) == 1
        assert both["actor"].bundles[2 * index : 2 * index + 2] == span
        assert sorted(slots.devices(index)) == [0, 1]
    remove_placement_group(slots.group)


def test_an_engine_that_would_lie_on_two_nodes_is_refused(two_nodes):
    placement = placement_of(actors=3, engines=1, tensor_parallel=3, colocate_all_models=True)
    with pytest.raises(InfraError, match="--vllm_tensor_parallel_size 3: as the devices lie.* only 0 of 1 engines"):
        reserve(placement, "GPU", timeout_s=30)
    kept = reserve(placement_of(actors=4), "GPU", timeout_s=30)["actor"]
    assert len(kept.bundles) == 4  # all four are free again
    remove_placement_group(kept.group)


def test_a_run_spans_both_nodes(two_nodes, tmp_path):
    pytest.importorskip("vllm")
    flags = [*data(tmp_path), "--remote_rm_url", reward_file(tmp_path), "--advantage_estimator", "reinforce"]
    flags += ["--actor_num_nodes", "2", "--actor_num_gpus_per_node", "1", "--ref_num_nodes", "2"]
    flags += ["--ref_num_gpus_per_node", "1", "--vllm_num_engines", "2", "--train_batch_size", "8"]
    done = ppo(*flags, "--colocate_actor_ref", "--zero_stage", "3", cwd=tmp_path, cluster=two_nodes)
    assert done.returncode == 0, done.stderr
    assert all(step["sync_gap_max"] < 1e-5 for step in metrics(tmp_path / "out_run"))
