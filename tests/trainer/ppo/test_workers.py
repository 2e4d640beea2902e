"""The models of PPO on one rank, against plain torch and against other ways to cut the batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from openrlhf.config.ppo import PPOModelConfig, RewardConfig
from openrlhf.errors import DataError
from openrlhf.rollout.types import SequenceBatch
from openrlhf.trainer.ppo.shards import shard
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker, ReferenceWorker, RewardWorker
from tests.helpers import tiny_causal_lm
from tests.trainer.ppo.harness import (
    rollout_of,
    solo_strategy,
    tiny_ppo_config,
    tiny_prompts,
    tiny_reward_model,
    with_algorithm,
    with_batch,
    with_rollout,
)

EOS = 2


def sampled(worker: PolicyWorker, count: int = 6, parts: int = 1) -> list[SequenceBatch]:
    """Return shards of made-up answers of different length."""
    prompts = tiny_prompts(worker.tokenizer, count)
    answers = [[10 + row, 20, 30 + row, EOS][row % 3 :] for row in range(count)]
    rollouts = [rollout_of(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    return shard(rollouts, parts, worker.tokenizer.pad_token_id)


def experiences(worker: PolicyWorker, parts: int = 1, values=None):
    """Return the experiences of made-up answers with made-up scores; row ``i`` is the same for every ``parts``."""
    shards = sampled(worker, parts=parts)
    log_probs = worker.log_probs(shards)
    scores = torch.linspace(-1, 2, 6).split([len(part) for part in shards])
    values = values or [None] * parts
    return worker.assemble(shards, log_probs, log_probs, values, scores, scores, kl_coef=0.0)


def plain_log_probs(model, batch: SequenceBatch, temperature: float = 1.0) -> torch.Tensor:
    """Return log-probs ``(B, T)`` row by row without padding, from the full logits."""
    rows = []
    for row in range(len(batch)):
        tokens = batch.sequences[row, : int(batch.attention_mask[row].sum())]
        logits = model(tokens[None]).logits[0, :-1].float() / temperature
        chosen = torch.log_softmax(logits, dim=-1).gather(1, tokens[1:, None]).squeeze(1)
        rows.append(torch.nn.functional.pad(chosen, (0, batch.sequences.shape[1] - len(tokens))))
    return torch.stack(rows)


def test_log_probs_equal_plain_torch_at_the_rollout_temperature(tmp_path):
    config = with_rollout(tiny_ppo_config(tmp_path), temperature=0.7, micro_rollout_batch_size=4)
    strategy = solo_strategy(config)
    policy = PolicyWorker(config, strategy, max_steps=1)
    shards = sampled(policy, parts=2)
    model = AutoModelForCausalLM.from_pretrained(config.model.pretrain, dtype=torch.float32)
    reference = ReferenceWorker(config, strategy)
    with torch.no_grad():
        expected = [plain_log_probs(model, part, 0.7) for part in shards]
    for part, want, ours, theirs in zip(
        shards, expected, policy.log_probs(shards), reference.log_probs(shards), strict=True
    ):
        torch.testing.assert_close(ours[part.action_mask], want[part.action_mask], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs[part.action_mask], want[part.action_mask], atol=1e-5, rtol=1e-5)


def test_one_optimizer_step_of_the_policy_equals_plain_torch(tmp_path):
    config = with_batch(tiny_ppo_config(tmp_path), train_batch_size=6, micro_train_batch_size=2)
    policy = PolicyWorker(config, solo_strategy(config), max_steps=10)
    (experience,) = experiences(policy)
    model = AutoModelForCausalLM.from_pretrained(config.model.pretrain, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=policy.engine.lr, betas=(0.9, 0.95), weight_decay=0.0)
    mask = experience.action_mask
    ratio = torch.exp(plain_log_probs(model, experience) - experience.log_probs)
    advantages = (experience.advantages - 0.3) * 1.5
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)[mask].mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()

    metrics = policy.update([experience], rollout=1, whiten=(0.3, 1.5))

    assert metrics["policy_loss"] == pytest.approx(float(loss.detach()), abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    trained = dict(policy.engine.named_weights(root=policy.actor.model))
    for name, weight in model.state_dict().items():
        if name in trained:
            torch.testing.assert_close(trained[name], weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("micro", [1, 4])
def test_before_the_first_update_the_ratio_of_new_and_old_policy_is_one(tmp_path, micro):
    config = with_rollout(tiny_ppo_config(tmp_path), temperature=0.7, micro_rollout_batch_size=3)
    policy = PolicyWorker(config, solo_strategy(config), max_steps=1)
    (experience,) = experiences(policy)
    policy.engine.train()
    for start in range(0, len(experience), micro):
        part = experience.select(list(range(start, min(start + micro, len(experience)))))
        ratio = (policy._action_log_probs(part).detach() - part.log_probs).exp()[part.action_mask]
        assert float((ratio - 1).abs().max()) <= 1e-6


def test_one_optimizer_step_of_the_critic_equals_plain_torch(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae")
    config = with_batch(config, train_batch_size=6, micro_train_batch_size=4)
    strategy = solo_strategy(config)
    policy, critic = (worker(config, strategy, max_steps=10) for worker in (PolicyWorker, CriticWorker))
    (values,) = critic.values(sampled(policy))
    (experience,) = experiences(policy, values=[values])
    critic.export(path=str(tmp_path / "critic"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic", dtype=torch.float32)
    states = model.model(experience.sequences, experience.attention_mask.long()).last_hidden_state
    predicted = model.score(states).squeeze(-1)[:, :-1]
    mask = experience.action_mask
    expected = (0.5 * (predicted - experience.returns).square())[mask].mean()
    torch.testing.assert_close(values[mask], predicted.detach()[mask], atol=1e-5, rtol=1e-4)
    expected.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    metrics = critic.update([experience], rollout=1)
    assert metrics["critic_loss"] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-3)


@pytest.mark.parametrize(("micro", "parts"), [(1, 1), (4, 1), (2, 2), (3, 4)])
def test_the_gradient_does_not_depend_on_how_the_batch_was_cut(tmp_path, micro, parts):
    def update(micro: int, parts: int) -> tuple[float, dict]:
        config = with_batch(tiny_ppo_config(tmp_path), train_batch_size=6, micro_train_batch_size=micro)
        policy = PolicyWorker(config, solo_strategy(config), max_steps=10)
        metrics = policy.update(experiences(policy, parts), rollout=1, whiten=(0.3, 1.5))
        return metrics["grad_norm"], dict(policy.engine.named_weights())

    norm, weights = update(6, 1)
    other_norm, other_weights = update(micro, parts)
    assert other_norm == pytest.approx(norm, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_scoring_within_a_budget_of_tokens_keeps_the_order_of_the_rows(tmp_path, budget):
    by_rows = tiny_ppo_config(tmp_path)
    by_tokens = with_rollout(with_batch(by_rows, use_dynamic_batch=True), rollout_max_tokens_per_gpu=budget)
    policies = [PolicyWorker(config, solo_strategy(config), max_steps=1) for config in (by_rows, by_tokens)]
    shards = sampled(policies[0], parts=2)
    for one, other in zip(*(policy.log_probs(shards) for policy in policies), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_budget_of_scoring_is_that_of_training_unless_it_has_its_own(tmp_path):
    config = tiny_ppo_config(tmp_path)
    assert config.scoring_budget is None
    config = with_batch(config, use_dynamic_batch=True, train_max_tokens_per_gpu=77)
    assert config.scoring_budget == 77
    assert with_rollout(config, rollout_max_tokens_per_gpu=99).scoring_budget == 99


def test_a_shard_without_rows_is_fine(tmp_path):
    policy = PolicyWorker(tiny_ppo_config(tmp_path), solo_strategy(tiny_ppo_config(tmp_path)), max_steps=10)
    shards = [*sampled(policy), *shard([], 1, 0)]
    full, empty = policy.log_probs(shards)
    assert full.shape == shards[0].action_mask.shape
    assert len(empty) == 0


def test_the_moving_average_follows_each_step_and_is_what_is_exported(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), enable_ema=True)
    policy = PolicyWorker(config, solo_strategy(config), max_steps=10)
    start = dict(policy.engine.named_weights(root=policy.actor.model))
    policy.update(experiences(policy), rollout=1, whiten=(0.0, 1.0))
    end = dict(policy.engine.named_weights(root=policy.actor.model))
    policy.export(path=str(tmp_path / "ema"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ema", dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(start[name], end[name])
    torch.testing.assert_close(saved[name], 0.992 * start[name] + 0.008 * end[name])
    for name, weight in policy.engine.named_weights(root=policy.actor.model):
        assert torch.equal(weight, end[name])
    assert list(policy.engine.named_weights(wanted=False)) == []


def test_saved_training_goes_on_bit_for_bit(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), enable_ema=True)
    strategy = solo_strategy(config)
    first, second = (PolicyWorker(config, strategy, max_steps=10) for _ in range(2))
    batch = experiences(first)
    first.update(batch, rollout=1, whiten=(0.0, 1.0))
    first.save(path=str(tmp_path / "saved"))
    second.load(path=str(tmp_path / "saved"))
    for worker in (first, second):
        worker.update(batch, rollout=2, whiten=(0.0, 1.0))
    for (name, left), (_, right) in zip(first.engine.named_weights(), second.engine.named_weights(), strict=True):
        assert torch.equal(left, right), name
    for name, weight in first.average.weights.items():
        assert torch.equal(weight, second.average.weights[name])


def test_weight_buckets_hold_every_weight_once_under_its_own_name(tmp_path):
    config = tiny_ppo_config(tmp_path)
    policy = PolicyWorker(config, solo_strategy(config), max_steps=1)
    buckets = list(policy.weight_buckets(4096))
    names = [name for bucket in buckets for name, _ in bucket]
    assert len(buckets) > 3
    assert len(names) == len(set(names))
    assert set(names) == set(tiny_causal_lm().state_dict()) - {"lm_head.weight"}


def test_the_reward_model_reads_a_cut_answer_with_an_end_of_sequence(tmp_path):
    path = tiny_reward_model(tmp_path / "rm")
    config = tiny_ppo_config(tmp_path)
    strategy = solo_strategy(config)
    worker = RewardWorker(config, strategy, path=path)
    (prompt,) = tiny_prompts(worker.tokenizer, 1)
    cut, whole = (rollout_of(prompt, answer) for answer in ([11, 12, 13], [11, 12, 13, EOS]))
    scores = worker.score(shard([cut, whole], 1, 0))[0]
    assert float(scores[0]) == pytest.approx(float(scores[1]), abs=1e-6)
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([whole.token_ids])).logits[0, 0]
    assert float(scores[1]) == pytest.approx(float(expected), abs=1e-5)


def test_rewards_are_normalised_with_the_figures_of_the_reward_model(tmp_path):
    path = tiny_reward_model(tmp_path / "rm", mean=0.25, std=2.0)
    raw = tiny_ppo_config(tmp_path)
    normalised = replace(raw, reward=RewardConfig(normalize_reward=True))
    strategy = solo_strategy(raw)
    workers = [RewardWorker(config, strategy, path=path) for config in (raw, normalised)]
    batch = shard([rollout_of(tiny_prompts(workers[0].tokenizer, 1)[0], [11, EOS])], 1, 0)
    plain, scaled = (float(worker.score(batch)[0]) for worker in workers)
    assert scaled == pytest.approx((plain - 0.25) / 2.0, abs=1e-6)


def test_normalisation_without_figures_is_an_error(tmp_path):
    path = tiny_reward_model(tmp_path / "rm")
    config = replace(tiny_ppo_config(tmp_path), reward=RewardConfig(normalize_reward=True))
    with pytest.raises(DataError, match="normalize_reward"):
        RewardWorker(config, solo_strategy(config), path=path)


def test_a_reward_model_with_another_vocabulary_is_refused(tmp_path):
    path = tiny_reward_model(tmp_path / "rm")
    file = Path(path, "tokenizer.json")
    tokenizer = json.loads(file.read_text())
    first, second = list(tokenizer["model"]["vocab"])[-2:]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    config = tiny_ppo_config(tmp_path)
    with pytest.raises(DataError, match="one tokenizer"):
        RewardWorker(config, solo_strategy(config), path=path)


def test_the_critic_starts_from_the_policy_with_a_fresh_head(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae")
    assert config.critic_source == config.model.pretrain
    strategy = solo_strategy(config)
    policy, critic = (worker(config, strategy, max_steps=1) for worker in (PolicyWorker, CriticWorker))
    theirs = dict(policy.actor.model.model.named_parameters())
    for name, weight in critic.critic.backbone.named_parameters():
        assert torch.equal(weight, theirs[name]), name
    head = critic.critic.head.weight
    assert head.shape == (1, policy.actor.config.hidden_size) and 0 < float(head.detach().abs().max()) < 0.1


def test_a_named_critic_goes_before_the_reward_model(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae")
    named, other = (tiny_reward_model(tmp_path / name, mean=mean) for name, mean in (("critic", 1.0), ("rm", 2.0)))
    model = PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=other, critic_pretrain=named)
    config = replace(config, model=model, reward=RewardConfig())
    critic = CriticWorker(config, solo_strategy(config), max_steps=1)
    assert config.critic_source == named and critic.critic.config.mean == 1.0


def test_the_critic_starts_from_the_reward_model_with_its_head(tmp_path):
    path = tiny_reward_model(tmp_path / "rm")
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae")
    model = PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=path)
    config = replace(config, model=model, reward=RewardConfig())
    critic = CriticWorker(config, solo_strategy(config), max_steps=1)
    head = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1).score.weight
    torch.testing.assert_close(critic.critic.head.weight.detach(), head.detach())
    critic.export(path=str(tmp_path / "critic"))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic", num_labels=1)
    torch.testing.assert_close(saved.score.weight, head)
