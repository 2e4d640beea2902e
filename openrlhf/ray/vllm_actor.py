"""Generation on Ray: vLLM engines as actors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import ray

from openrlhf.ray.buckets import unpack
from openrlhf.ray.group import Watch, start_actor
from openrlhf.ray.slots import Slots
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.trainer.ppo.experience import deal


@ray.remote(concurrency_groups={"ping": 1})
class VLLMActor:
    """One :class:`~openrlhf.rollout.vllm_engine.VLLMEngine` in its own process; ``ping`` answers beside its work."""

    def setup(self, model_path: str, options: dict[str, Any]) -> None:
        """Load the model."""
        from openrlhf.rollout.vllm_engine import VLLMEngine

        self.engine = VLLMEngine(model_path, **options)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return the rollouts of ``prompts``."""
        return self.engine.generate(prompts, sampling)

    def update_weights(self, buckets: list[ray.ObjectRef], version: int) -> None:
        """Serve the weights that lie in the object store, reading one bucket after the other."""

        def weights() -> Iterator[tuple[str, Any]]:
            for bucket in buckets:
                yield from unpack(ray.get(bucket))

        self.engine.update_weights(weights(), version)

    def call(self, name: str) -> Any:
        """Call ``sleep``, ``wake_up`` or ``health`` of the engine."""
        return getattr(self.engine, name)()

    @ray.method(concurrency_group="ping")
    def ping(self) -> int:
        """Return the process id: this process is alive."""
        return os.getpid()


class RayEngines:
    """A :class:`~openrlhf.rollout.engine.RolloutEngine` of several vLLM actors; each gets a contiguous list."""

    def __init__(self, actors: list[Any], watch: Watch):
        self.actors = actors
        self.watch = watch
        for number, actor in enumerate(actors):
            watch.add(actor, f"vLLM engine {number}")

    @classmethod
    def start(cls, slots: Slots, watch: Watch) -> RayEngines:
        """Start one empty engine actor on each of ``slots``; load models with :meth:`setup`."""
        return cls([start_actor(VLLMActor, slots, index) for index in range(len(slots.bundles))], watch)

    def setup(self, model_path: str, **options: Any) -> list[Any]:
        """Load ``model_path`` in every engine (options of ``VLLMEngine``); return futures."""
        return [actor.setup.remote(model_path, options) for actor in self.actors]

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return ``sampling.n`` rollouts a prompt, in the order of ``prompts``."""
        shares = deal(prompts, len(self.actors))
        futures = [a.generate.remote(share, sampling) for a, share in zip(self.actors, shares, strict=True) if share]
        return [rollout for answers in self.watch.get(futures) for rollout in answers]

    def update_weights(self, buckets: list[Any], version: int) -> None:
        """Give every engine the same buckets, by reference; return when all of them serve ``version``."""
        self.watch.get([actor.update_weights.remote(buckets, version) for actor in self.actors])

    def sleep(self) -> None:
        """Give device memory back, where engines were started to do so."""
        self._all("sleep")

    def wake_up(self) -> None:
        """Undo :meth:`sleep`."""
        self._all("wake_up")

    def health(self) -> None:
        """Return when every engine has shown that it generates."""
        self._all("health")

    def _all(self, name: str) -> None:
        self.watch.get([actor.call.remote(name) for actor in self.actors])
