"""Weights from policy workers to vLLM engines, all of them real Ray actors."""

from __future__ import annotations

import time

import pytest
import torch

from openrlhf.ray.buckets import pack, unpack
from openrlhf.ray.engines import RayEngines
from openrlhf.ray.group import RayGroup, Watch
from openrlhf.ray.slots import reserve
from openrlhf.ray.weight_sync import RayWeightSync
from openrlhf.rollout.engine import CACHE, WEIGHTS
from openrlhf.rollout.types import Prompt, SamplingParams
from openrlhf.rollout.weights import in_buckets
from tests.helpers import tiny_causal_lm, tiny_folder
from tests.ray.conftest import placement_of
from tests.rollout.test_vllm_engine import gap

pytestmark = pytest.mark.timeout(300)
SAMPLING = SamplingParams(max_new_tokens=8, temperature=0.7, n=2, seed=3)
PROMPTS = [Prompt(uid=str(row), text="", token_ids=tuple(range(5 + row, 12 + 2 * row))) for row in range(5)]


class TinyPolicy:
    """A policy worker that learns by taking another seed."""

    def __init__(self):
        self.model = model_of(0)

    def learn(self, seed: int) -> None:
        self.model = model_of(seed)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def weight_buckets(self, bucket_bytes: int):
        yield from in_buckets(self.model.named_parameters(), bucket_bytes)


def model_of(seed: int):
    return tiny_causal_lm(seed=seed, tied=True, hidden=64)


@pytest.fixture(scope="module")
def fleet(local_ray, tmp_path_factory):
    """Two policy ranks and two engines."""
    slots = reserve(placement_of(actors=2, engines=2), local_ray, timeout_s=30)
    watch = Watch(timeout_s=120, look_every_s=1)
    policy = RayGroup.start("actor", slots["actor"], watch)
    engines = RayEngines(slots["vllm"], watch)
    folder = tiny_folder(tmp_path_factory.mktemp("policy"), tied=True, hidden=64, seed=0)
    options = {"dtype": "float32", "max_model_len": 64, "enable_prefix_caching": True}
    watch.get(policy.build(TinyPolicy) + engines.setup(folder, **options))
    return policy, engines


def test_every_engine_serves_the_new_weights_after_a_push(fleet):
    policy, engines = fleet
    for version, seed in enumerate((4, 5), start=1):
        policy.get(policy.run(TinyPolicy.learn, seed=seed))
        RayWeightSync(policy, engines, bucket_bytes=20_000).push(version)
        rollouts = engines.generate(PROMPTS, SAMPLING)
        assert [rollout.prompt.uid for rollout in rollouts] == [uid for uid in "01234" for _ in range(2)]
        assert {rollout.policy_version for rollout in rollouts} == {version}
        assert gap(model_of(seed), rollouts) < 5e-6


def test_a_sample_is_the_same_whichever_engine_draws_it(fleet):
    _, engines = fleet
    alone = engines.generate(PROMPTS[4:], SAMPLING)
    assert [r.token_ids for r in alone] == [r.token_ids for r in engines.generate(PROMPTS, SAMPLING)[8:]]


def test_sleeping_and_waking_reach_every_engine(fleet):
    _, engines = fleet
    engines.sleep()
    engines.wake_up(WEIGHTS)
    engines.wake_up(CACHE)


def test_buckets_keep_names_shapes_types_and_bits():
    weights = [
        ("half", torch.randn(3, 5).to(torch.bfloat16)),
        ("transposed", torch.randn(4, 6).t()),
        ("scalar", torch.tensor(2.5)),
        ("empty", torch.zeros(0, 7)),
        ("whole", torch.arange(9)),
    ]
    found = list(unpack(pack(weights)))
    assert [name for name, _ in found] == [name for name, _ in weights]
    for (_, expected), (_, tensor) in zip(weights, found, strict=True):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
