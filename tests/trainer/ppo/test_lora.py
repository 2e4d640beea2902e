"""PPO that trains adapters: the reference is the policy without them, engines get merged weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openrlhf.config.groups import LoRAConfig
from openrlhf.config.ppo import AlgorithmConfig
from openrlhf.models.adapters import trained_names
from openrlhf.models.loading import load_causal_lm
from openrlhf.trainer.ppo.models import load_reward_model
from openrlhf.trainer.ppo.workers import PolicyWorker, ReferenceWorker
from tests.helpers import tiny_causal_lm
from tests.trainer.ppo.harness import (
    local_loop,
    policy_weights,
    solo_strategy,
    tiny_ppo_config,
    tiny_reward_model,
    with_algorithm,
)
from tests.trainer.ppo.test_workers import experiences, sampled

LORA = LoRAConfig(lora_rank=4)
KINDS = pytest.mark.parametrize("lora", [LORA, replace(LORA, load_in_4bit=True)], ids=["lora", "qlora"])


def trained_policy(config) -> PolicyWorker:
    """Return a policy whose adapter has learned something."""
    policy = PolicyWorker(config, solo_strategy(config), max_steps=10)
    for rollout in (1, 2):
        policy.update(experiences(policy), rollout=rollout, whiten=(0.0, 1.0))
    return policy


@KINDS
def test_the_reference_is_the_policy_without_its_adapter(tmp_path, lora):
    config = tiny_ppo_config(tmp_path, lora=lora)
    policy = trained_policy(config)
    shards = sampled(policy, parts=2)
    reference = ReferenceWorker(config, policy.strategy)
    for own, others, learned in zip(
        policy.reference_log_probs(shards), reference.log_probs(shards), policy.log_probs(shards), strict=True
    ):
        assert torch.equal(own, others)
        assert not torch.allclose(own, learned)


@KINDS
def test_engines_get_the_weights_of_the_base_with_the_adapter_merged_in(tmp_path, lora):
    config = tiny_ppo_config(tmp_path, lora=lora)
    policy = trained_policy(config)
    weights = dict(pair for bucket in policy.weight_buckets(4096) for pair in bucket)
    assert set(weights) == set(tiny_causal_lm().state_dict()) - {"lm_head.weight"}
    served = PolicyWorker(replace(config, lora=LoRAConfig()), policy.strategy, max_steps=1)
    served.actor.model.load_state_dict(weights, strict=False)
    shards = sampled(policy)
    torch.testing.assert_close(served.log_probs(shards), policy.log_probs(shards), atol=1e-5, rtol=1e-5)


def test_a_run_with_actor_and_critic_trains_adapters_and_the_head_only(tmp_path):
    algorithm = AlgorithmConfig(advantage_estimator="gae", init_kl_coef=0.1)
    loop, recorder = local_loop(tiny_ppo_config(tmp_path, lora=LORA, algorithm=algorithm))
    assert loop.roles.reference is None
    before, critic = policy_weights(loop), loop.roles.critic.worker
    values_before = {name: weight.clone() for name, weight in critic.critic.named_parameters()}
    loop.fit()
    assert recorder.steps[0]["kl"] == 0.0 and recorder.steps[1]["kl"] != 0.0
    trained = {f"model.{name}" for name in trained_names(loop.roles.policy.worker.actor.model)}
    changed = {name for name, weight in policy_weights(loop).items() if not torch.equal(weight, before[name])}
    assert changed == trained and len(trained) == 28
    moved = {name for name, weight in critic.critic.named_parameters() if not torch.equal(weight, values_before[name])}
    assert "model.score.weight" in moved
    assert all(".lora_" in name for name in moved - {"model.score.weight"})


def test_the_moving_average_is_that_of_the_adapter_and_is_exported_as_one(tmp_path):
    from peft import PeftModel

    config = with_algorithm(tiny_ppo_config(tmp_path, lora=LORA), enable_ema=True, ema_beta=0.5)
    policy = PolicyWorker(config, solo_strategy(config), max_steps=10)
    name = "model.layers.0.mlp.up_proj.lora_B.default.weight"
    policy.update(experiences(policy), rollout=1, whiten=(0.0, 1.0))
    after = policy.actor.model.state_dict()[name].clone()
    assert set(policy.average.weights) == trained_names(policy.actor.model)
    policy.export(path=str(tmp_path / "ema"))
    loaded = PeftModel.from_pretrained(load_causal_lm(config.model.pretrain, config.model), tmp_path / "ema")
    torch.testing.assert_close(loaded.state_dict()[f"base_model.model.{name}"], 0.5 * after)
    assert torch.equal(policy.actor.model.state_dict()[name], after)


@KINDS
def test_saved_adapters_go_on_bit_for_bit_and_take_little_room(tmp_path, lora):
    config = with_algorithm(tiny_ppo_config(tmp_path, lora=replace(lora, lora_dropout=0.1)), enable_ema=True)
    strategy = solo_strategy(config)
    first, second = (PolicyWorker(config, strategy, max_steps=10) for _ in range(2))
    batch = experiences(first)
    first.update(batch, rollout=1, whiten=(0.0, 1.0))
    first.save(path=str(tmp_path / "saved"))
    second.load(path=str(tmp_path / "saved"))
    for worker in (first, second):
        torch.manual_seed(7)
        worker.update(batch, rollout=2, whiten=(0.0, 1.0))
    for (name, left), (_, right) in zip(first.engine.named_weights(), second.engine.named_weights(), strict=True):
        assert torch.equal(left, right), name
    written = sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*_states.pt"))
    assert written < 2 * first.checkpoint_bytes()[0] + 16_000
    assert first.checkpoint_bytes() == (4096 * 12, 4096 * 4)


def test_a_reward_model_may_be_held_in_four_bits_beside_a_policy_that_is(tmp_path):
    config = tiny_ppo_config(tmp_path, lora=replace(LORA, load_in_4bit=True))
    path = tiny_reward_model(tmp_path / "rm")
    strategy = solo_strategy(config)
    policy = PolicyWorker(config, strategy, max_steps=1)
    model = load_reward_model(config, strategy, path, policy.tokenizer)
    assert not model.has_adapter
    assert model.model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    batch = sampled(policy)[0]
    assert model(batch.sequences, batch.attention_mask).isfinite().all()
