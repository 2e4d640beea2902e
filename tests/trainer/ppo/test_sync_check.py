"""A real PPO run with a vLLM engine: what the check of log-probs says when the engine serves something else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from openrlhf.config.groups import LoRAConfig
from openrlhf.config.ppo import PPOOptimConfig
from openrlhf.errors import InfraError
from openrlhf.rollout.vllm_engine import VLLMEngine
from openrlhf.trainer.ppo.groups import LocalGroup
from openrlhf.trainer.ppo.loop import PPOLoop
from tests.helpers import tiny_folder
from tests.strategy.ranks import run_ranks
from tests.trainer.ppo.harness import Recorder, local_loop, tiny_ppo_config, with_rollout


class WeightsInProcess:
    """A weight sync from a policy to an engine of the same process."""

    def __init__(self, policy: LocalGroup, engine: VLLMEngine):
        self.policy = policy
        self.engine = engine

    def push(self, version: int) -> None:
        """Serve the policy's present weights."""
        buckets = self.policy.worker.weight_buckets(2**20)
        self.engine.update_weights((pair for bucket in buckets for pair in bucket), version)


def loop_with(engine: VLLMEngine, config) -> tuple[PPOLoop, Recorder]:
    """Return a loop whose samples come from ``engine``."""
    loop, recorder = local_loop(config, prompts=8)
    loop.collector.engine, loop.collector.weight_sync = engine, WeightsInProcess(loop.roles.policy, engine)
    return loop, recorder


def run_with_and_without_repacking(folder: str) -> dict:
    """Train on an engine that keeps its old head after new weights, then on the same engine mended."""
    policy = tiny_folder(Path(folder) / "policy", tied=True, hidden=64)
    config = with_rollout(tiny_ppo_config(Path(folder)), num_episodes=3, rollout_batch_size=8, generate_max_len=6)
    config = replace(config, optim=PPOOptimConfig(actor_learning_rate=2e-2, lr_warmup_ratio=0.0))
    engine = VLLMEngine(policy, dtype="float32", max_model_len=64, enforce_eager=True, repack_tied_head=False)
    loop, broken = loop_with(engine, config)
    try:
        loop.fit()
        error = ""
    except InfraError as found:
        error = str(found)
    engine.repack_tied_head = True
    loop, mended = loop_with(engine, config)
    loop.fit()
    return {"error": error, "broken": len(broken.steps), "gaps": [step["sync_gap_max"] for step in mended.steps]}


def run_with_adapters(folder: str) -> dict:
    """Train adapters, on whole weights and on 4-bit ones, with samples of an engine; return the gaps of each run."""
    policy = tiny_folder(Path(folder) / "policy", tied=True, hidden=64)
    config = with_rollout(tiny_ppo_config(Path(folder)), num_episodes=3, rollout_batch_size=8, generate_max_len=6)
    config = replace(config, optim=PPOOptimConfig(actor_learning_rate=2e-2, lr_warmup_ratio=0.0))
    engine = VLLMEngine(policy, dtype="float32", max_model_len=64, enforce_eager=True)
    found = {}
    for name, four_bits in (("lora", False), ("qlora", True)):
        loop, recorder = loop_with(engine, replace(config, lora=LoRAConfig(lora_rank=4, load_in_4bit=four_bits)))
        loop.fit()
        found[name] = [(step["sync_gap_max"], step["kl"]) for step in recorder.steps]
    return found


@pytest.mark.full
@pytest.mark.timeout(300)
def test_an_engine_serves_adapters_merged_into_their_base(tmp_path):
    [result] = run_ranks(f"{__name__}:run_with_adapters", 1, fresh=True, folder=str(tmp_path))
    for steps in result.values():
        assert len(steps) == 3 and max(gap for gap, _ in steps) < 1e-5
        assert abs(steps[0][1]) < 1e-6 and abs(steps[2][1]) > 1e-6, "the policy moves away from its base"


@pytest.mark.timeout(300)
def test_a_run_stops_when_the_engine_keeps_its_old_head_and_goes_through_when_it_does_not(tmp_path):
    """In a process of its own: vLLM takes torch's process group with it when it goes."""
    [result] = run_ranks(f"{__name__}:run_with_and_without_repacking", 1, fresh=True, folder=str(tmp_path))
    assert "tied" in result["error"]
    assert result["broken"] == 1, "the first weights are those of the folder"
    assert len(result["gaps"]) == 3 and max(result["gaps"]) < 1e-5
