"""A vLLM engine as an actor of Ray."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from openrlhf.ray.buckets import unpack
from openrlhf.ray.group import start_actor
from openrlhf.ray.host import DRIVER, Pulse, Sign, ray_noset_visible_devices, work_of_children
from openrlhf.ray.slots import Slots
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.strategy import signals


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

        with self.pulse.during_call(work_of_children):
            self.engine = VLLMEngine(model_path, **options)

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return the rollouts of ``prompts``."""
        with self.pulse.during_call(self._headway):
            return self.engine.generate(prompts, sampling)

    def update_weights(self, buckets: list[ray.ObjectRef], version: int) -> None:
        """Serve the weights that lie in the object store, reading one bucket after the other."""

        def weights() -> Iterator[tuple[str, Any]]:
            for bucket in buckets:
                yield from unpack(ray.get(bucket))

        with self.pulse.during_call(self._headway):
            self.engine.update_weights(weights(), version)

    def call(self, name: str, *arguments: str) -> None:
        """Call ``sleep`` or ``wake_up`` of the engine."""
        with self.pulse.during_call(self._headway):
            getattr(self.engine, name)(*arguments)

    def _headway(self) -> tuple[int, int]:
        """Return what grows while the engine works, in this process or in those that it shares a model with."""
        return self.engine.steps, work_of_children() if self.engine.tensor_parallel_size > 1 else 0

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
