"""Generation on Ray: vLLM engines as actors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from openrlhf.ray.buckets import unpack
from openrlhf.ray.group import Watch, start_actor
from openrlhf.ray.host import DRIVER, Pulse, Sign, ray_noset_visible_devices
from openrlhf.ray.slots import Slots
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.strategy import signals
from openrlhf.trainer.ppo.groups import deal


@ray.remote(concurrency_groups={"ping": 1})
class VLLMActor:
    """One :class:`~openrlhf.rollout.vllm_engine.VLLMEngine` in its own process; ``ping`` answers beside its work."""

    def __init__(self, devices: Sequence[int] = ()) -> None:
        self.pulse = Pulse()
        self.devices = devices

    def setup(self, model_path: str, options: dict[str, Any]) -> None:
        """Load the model."""
        see_devices(self.devices)
        from openrlhf.rollout.vllm_engine import VLLMEngine

        with self.pulse.during_call():
            self.engine = VLLMEngine(model_path, **options)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return the rollouts of ``prompts``."""
        with self.pulse.during_call(lambda: self.engine.steps):
            return self.engine.generate(prompts, sampling)

    def update_weights(self, buckets: list[ray.ObjectRef], version: int) -> None:
        """Serve the weights that lie in the object store, reading one bucket after the other."""

        def weights() -> Iterator[tuple[str, Any]]:
            for bucket in buckets:
                yield from unpack(ray.get(bucket))

        with self.pulse.during_call():
            self.engine.update_weights(weights(), version)

    def call(self, name: str, *arguments: str) -> None:
        """Call ``sleep`` or ``wake_up`` of the engine."""
        with self.pulse.during_call():
            getattr(self.engine, name)(*arguments)

    @ray.method(concurrency_group="ping")
    def ping(self) -> Sign:
        """Return a sign of life."""
        return self.pulse.sign()

    @ray.method(concurrency_group="ping")
    def drop(self) -> None:
        """Give up a rollout that is under way: the run is being stopped."""
        signals.ask(DRIVER)


def see_devices(devices: Sequence[int]) -> None:
    """Show this process the GPUs ``devices``; none named, those that Ray gave it, where Ray did not do that itself.

    To be called before anything touches CUDA.
    """
    own = devices or (ray.get_gpu_ids() if ray_noset_visible_devices() else ())
    if own:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(number) for number in own)


def start_engine(slots: Slots, index: int) -> Any:
    """Start engine ``index``, empty, on its slot."""
    return start_actor(VLLMActor, slots, index, slots.devices(index))


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
        return cls([start_engine(slots, index) for index in range(len(slots.bundles))], watch)

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

    def wake_up(self, part: str) -> None:
        """Take a part of the memory back."""
        self._all("wake_up", part)

    def _all(self, name: str, *arguments: str) -> None:
        self.watch.get([actor.call.remote(name, *arguments) for actor in self.actors])
