"""Carries the policy's weights to the vLLM engines, in buckets through Ray's object store."""

from __future__ import annotations

from typing import Any

from openrlhf.ray.engines import RayEngines
from openrlhf.ray.group import RayGroup
from openrlhf.rollout.weights import BUCKET_BYTES


class RayWeightSync:
    """A :class:`~openrlhf.rollout.engine.WeightSync` from a policy group to vLLM engines.

    Args:
        policy: its workers have ``weight_buckets(bucket_bytes)``; all ranks take part, rank 0 has the whole weights.
        engines: who receives them.
        bucket_bytes: size of a bucket, give or take one parameter.
    """

    def __init__(self, policy: RayGroup, engines: RayEngines, bucket_bytes: int = BUCKET_BYTES):
        self.policy = policy
        self.engines = engines
        self.bucket_bytes = bucket_bytes
        engines.take_weights_from(lambda: self._publish()[0])

    def push(self, version: int) -> None:
        """Return when every engine serves the policy's present weights under ``version``."""
        buckets = self.policy.get(self._publish())[0]
        self.engines.update_weights(buckets, version)

    def _publish(self) -> list[Any]:
        """Have all ranks put the weights in the object store; return a future a rank, the first has the buckets."""
        return [host.publish_weights.remote(self.bucket_bytes) for host in self.policy.hosts]
