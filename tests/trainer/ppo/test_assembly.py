"""KL, token rewards, advantages and their statistics on one rank."""

from __future__ import annotations

import pytest
import torch

from openrlhf.config.ppo import AlgorithmConfig
from openrlhf.rollout.types import Experience, SequenceBatch
from openrlhf.trainer.ppo.assembly import (
    add_statistics,
    close_with_eos,
    experience_statistics,
    make_experience,
    whitening,
)

EOS = 2


def batch_of(action_mask: list[list[int]]) -> SequenceBatch:
    mask = torch.tensor(action_mask, dtype=torch.bool)
    attended = torch.ones(len(mask), mask.shape[1] + 1, dtype=torch.bool)
    return SequenceBatch(attended.long(), attended, mask, torch.zeros(mask.shape), torch.arange(len(mask)))


def made(algorithm: AlgorithmConfig, *, values=None, shaped=1.0, kl_coef=0.1) -> Experience:
    batch = batch_of([[0, 1, 1, 1]])
    log_probs = torch.tensor([[9.0, -1.0, -2.0, -3.0]])
    reference = torch.tensor([[0.0, -1.1, -2.2, -3.0]])
    score = torch.tensor([5.0])
    return make_experience(
        algorithm, batch, log_probs, reference, values, score, torch.tensor([shaped]), kl_coef=kl_coef
    )


def test_without_a_critic_advantages_are_the_discounted_returns():
    experience = made(AlgorithmConfig(advantage_estimator="reinforce"))
    assert experience.kl[0].tolist() == pytest.approx([0.0, 0.1, 0.2, 0.0])
    # Token rewards -.01, -.02 and 1, as in the worked numbers of the advantage tests.
    assert experience.returns[0].tolist() == pytest.approx([0.0, 0.97, 0.98, 1.0])
    assert torch.equal(experience.advantages, experience.returns)
    assert experience.scores.tolist() == [5.0]


def test_with_a_critic_advantages_are_gae():
    values = torch.tensor([[7.0, 0.5, 0.4, 0.3]])
    experience = made(AlgorithmConfig(lambd=0.95), values=values)
    assert experience.advantages[0].tolist() == pytest.approx([0.0, 0.40775, 0.545, 0.70])
    assert experience.returns[0].tolist() == pytest.approx([0.0, 0.90775, 0.945, 1.0])


def test_the_k3_estimate_takes_the_place_of_k1():
    experience = made(AlgorithmConfig(advantage_estimator="reinforce", use_kl_estimator_k3=True))
    expected = torch.exp(torch.tensor(-0.2)) - 1 + 0.2
    assert float(experience.kl[0, 2]) == pytest.approx(float(expected), abs=1e-6)


def test_whitening_equals_the_definition_over_all_shards():
    torch.manual_seed(0)
    shards = []
    for rows, width in ((3, 5), (2, 9), (4, 3)):
        mask = torch.rand(rows, width) > 0.3
        advantages = torch.where(mask, 3 + 2 * torch.randn(rows, width), 0.0)
        zeros = torch.zeros(rows, width)
        batch = batch_of(mask.int().tolist())
        parts = dict.fromkeys(("log_probs", "ref_log_probs", "kl", "values", "returns"), zeros)
        shards.append(Experience(**vars(batch), **parts, scores=torch.zeros(rows), advantages=advantages))
    mean, rstd = whitening(add_statistics(experience_statistics(shard) for shard in shards))
    everything = torch.cat([shard.advantages[shard.action_mask] for shard in shards]).double()
    assert mean == pytest.approx(float(everything.mean()), abs=1e-6)
    assert 1 / rstd == pytest.approx(float(everything.std(unbiased=False)), rel=1e-6)


def test_equal_advantages_are_not_divided_by_zero():
    assert whitening({"actions": 4, "advantages": 8.0, "squared_advantages": 16.0}) == (2.0, pytest.approx(1e4))


def test_the_sync_gap_counts_actions_only():
    batch = batch_of([[0, 1, 1]])
    batch.rollout_log_probs = torch.tensor([[5.0, -1.0, -2.0]])
    zeros = dict.fromkeys(("ref_log_probs", "kl", "values", "returns", "advantages"), torch.zeros(1, 3))
    experience = Experience(
        **vars(batch), **zeros, scores=torch.zeros(1), log_probs=torch.tensor([[0.0, -1.25, -2.0]])
    )
    statistics = experience_statistics(experience)
    assert statistics["sync_gap"] == pytest.approx(0.25)
    assert statistics["sync_gap_max"] == pytest.approx(0.25)
    assert statistics["actions"] == 2


def test_a_cut_answer_is_read_with_an_end_of_sequence_and_a_finished_one_as_it_is():
    sequences = torch.tensor([[5, 6, 7], [5, 6, EOS], [5, EOS, 0]])
    attended = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
    closed, mask = close_with_eos(sequences, attended, EOS)
    rows = [row[keep].tolist() for row, keep in zip(closed, mask, strict=True)]
    assert rows == [[5, 6, 7, EOS], [5, 6, EOS], [5, EOS]]
    assert sequences.tolist() == [[5, 6, 7], [5, 6, EOS], [5, EOS, 0]]
