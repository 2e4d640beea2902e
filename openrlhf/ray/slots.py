"""Reserves the devices of a placement on the connected Ray cluster, or says what is missing."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from openrlhf.config.needs import ENGINES
from openrlhf.errors import InfraError
from openrlhf.ray.cluster import is_ours, worker_environment
from openrlhf.ray.placement import Placement

LOG = logging.getLogger(__name__)
SHARE = 0.2
LOOK_S = 120.0
"""How long to wait until a process in a bundle has told which GPUs it is."""
HINT = "Lower *_num_gpus_per_node or --vllm_num_engines, or share devices with --colocate_all_models."


@dataclass(frozen=True)
class Slots:
    """Reserved devices of one role.

    Attributes:
        group: Ray placement group.
        bundles: index of each worker's bundle; workers of one node are neighbours.
        amount: how much of ``resource`` one worker takes.
        resource: ``"GPU"`` or ``"CPU"``.
        environment: variables of every worker, its number of threads among them.
        spans: all bundles of each worker, where it has several: an engine over devices that it shares with others.
    """

    group: Any
    bundles: tuple[int, ...]
    amount: float
    resource: str
    environment: dict[str, str]
    spans: tuple[tuple[int, ...], ...] = ()

    def options(self, index: int) -> dict[str, Any]:
        """Return the Ray options of worker ``index``."""
        runtime_env = {"env_vars": {**worker_environment(), **self.environment}}
        return {**self._place(self.bundles[index]), "runtime_env": runtime_env}

    def devices(self, index: int, timeout_s: float = LOOK_S) -> tuple[int, ...]:
        """Return the GPUs of worker ``index`` where Ray gives it only one of them; to be asked before it starts.

        Raises:
            InfraError: not all bundles had told theirs after ``timeout_s`` seconds.
        """
        if not self.spans or self.resource != "GPU":
            return ()
        looks = [_gpus.options(**self._place(bundle)).remote() for bundle in self.spans[index]]
        try:
            return tuple(int(gpu) for gpus in ray.get(looks, timeout=timeout_s) for gpu in gpus)
        except GetTimeoutError:
            for look in looks:
                ray.cancel(look, force=True)
            devices = ", ".join(map(str, self.spans[index]))
            raise InfraError(
                f"No answer within {timeout_s:.0f} s from devices {devices} of the run, on which a vLLM engine is "
                "to start: others hold them, or their node is lost."
            ) from None

    def _place(self, bundle: int) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=bundle)
        cpus = self.amount if self.resource == "CPU" else min(self.amount, SHARE)
        return {
            "num_cpus": cpus,
            "num_gpus": self.amount if self.resource == "GPU" else 0,
            "scheduling_strategy": strategy,
        }


@ray.remote
def _gpus() -> list[int]:
    """Return the GPUs of the bundle that this runs in."""
    return ray.get_gpu_ids()


def reserve(placement: Placement, resource: str, timeout_s: float) -> dict[str, Slots]:
    """Return the slots of every role of ``placement``, and of ``"vllm"`` when it has engines.

    Args:
        placement: who shares which devices.
        resource: what a slot is, ``"GPU"`` or ``"CPU"``; see :func:`openrlhf.ray.cluster.connect`.
        timeout_s: how long to wait until all of them are free.

    Raises:
        InfraError: the cluster does not have them, or they were not free in time; the message is a table of wanted
            and available.
    """
    lacking = _lacking(placement, resource)
    if lacking and is_ours():
        raise InfraError(f"This machine has fewer devices than the run wants.\n{_shortage(placement, resource)}")
    if lacking:
        table = _shortage(placement, resource)
        LOG.warning("waiting %.0f s at most for more devices to join the cluster\n%s", timeout_s, table)
    groups = {}
    for pool, bundles in placement.pools.items():
        wanted = [{resource: size, **({"CPU": 1} if resource == "GPU" else {})} for size in bundles]
        groups[pool] = placement_group(wanted, strategy="PACK")
    names = [(role.name, role.pool) for role in placement.roles]
    names += [(ENGINES, placement.engine_pool)] * bool(placement.engines)
    try:
        if not _are_ready(groups.values(), timeout_s):
            table = _shortage(placement, resource)
            raise InfraError(f"The cluster could not place the run within {timeout_s:.0f} s.\n{table}")
        return {name: _slots(placement, name, pool, groups[pool], resource) for name, pool in names}
    except InfraError:
        for group in groups.values():
            remove_placement_group(group)
        raise


def _are_ready(groups: Iterable[Any], timeout_s: float) -> bool:
    """Return whether all placement groups had their devices within ``timeout_s`` seconds."""
    deadline = time.monotonic() + timeout_s
    return all(ray.wait([group.ready()], timeout=max(0.1, deadline - time.monotonic()))[0] for group in groups)


def _slots(placement: Placement, name: str, pool: str, group: Any, resource: str) -> Slots:
    """Return the slots of one role; those who share a device take equal parts of it, a fifth at most."""
    occupants, size = len(placement.occupants(pool)), placement.tensor_parallel if name == ENGINES else 1
    nodes, environment = placement_group_table(group)["bundles_to_node_id"], placement.threads(name)
    if occupants == 1:
        return Slots(group, bundles_by_node(nodes), size, resource, environment)
    amount = min(SHARE, math.floor(1e4 / occupants) / 1e4)
    if size == 1:
        return Slots(group, bundles_by_node(nodes), amount, resource, environment)
    spans = spans_by_node(nodes, size)
    if len(spans) < placement.engines:
        raise InfraError(
            f"--vllm_tensor_parallel_size {size}: as the devices lie on the nodes of the cluster, only {len(spans)} "
            f"of {placement.engines} engines have {size} on one node. Take a size that divides the devices of a node."
        )
    return Slots(group, tuple(span[0] for span in spans), amount, resource, environment, spans)


def bundles_by_node(nodes: Mapping[int, str]) -> tuple[int, ...]:
    """Return the bundles of a placed group, those of one node next to each other; ``nodes`` is the node of each."""
    return tuple(sorted(nodes, key=lambda index: (nodes[index], index)))


def spans_by_node(nodes: Mapping[int, str], size: int) -> tuple[tuple[int, ...], ...]:
    """Return the bundles in lists of ``size``, each on one node; what is left over on a node is in none."""
    spans: list[tuple[int, ...]] = []
    for _, own in groupby(bundles_by_node(nodes), key=nodes.__getitem__):
        bundles = tuple(own)
        spans += [bundles[start : start + size] for start in range(0, len(bundles) - size + 1, size)]
    return tuple(spans)


def _shortage(placement: Placement, resource: str) -> str:
    """Return the table of what is wanted, what the cluster has, and what of it is free."""
    has, free = ray.cluster_resources(), ray.available_resources()
    wanted = _wanted(placement, resource)
    rows = [("resource", "wanted", "in cluster", "free")]
    rows += [(name, f"{count:g}", f"{has.get(name, 0):g}", f"{free.get(name, 0):g}") for name, count in wanted.items()]
    table = ["  " + "".join(f"{cell:>12}" for cell in row) for row in rows]
    return "\n".join([*placement.describe(), *table, HINT])


def _wanted(placement: Placement, resource: str) -> dict[str, int]:
    """Return how much of each resource the whole placement takes."""
    cpus = {"CPU": sum(len(bundles) for bundles in placement.pools.values())} if resource == "GPU" else {}
    return {resource: placement.slots, **cpus}


def _lacking(placement: Placement, resource: str) -> bool:
    """Return whether the cluster as it is could not hold the placement even if nobody else used it."""
    has = ray.cluster_resources()
    return any(has.get(name, 0) < count for name, count in _wanted(placement, resource).items())
