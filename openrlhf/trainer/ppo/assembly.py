"""From log-probs, values and scores to experiences, on one rank: KL, token rewards, advantages, and their sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from openrlhf.config.ppo import AlgorithmConfig, PPOConfig
from openrlhf.ops.advantages import discounted_returns, gae
from openrlhf.ops.kl import approx_kl
from openrlhf.ops.length_penalty import overlong_penalty, stop_properly
from openrlhf.ops.masking import masked_sum
from openrlhf.ops.token_rewards import token_rewards
from openrlhf.rollout.types import Experience, Rollout, SequenceBatch


def scoring_temperature(config: PPOConfig) -> float:
    """Return the temperature of all log-probs: that of the rollouts; 1 where those are greedy."""
    return config.rollout.temperature or 1.0


def close_with_eos(sequences: Tensor, attention_mask: Tensor, eos_id: int) -> tuple[Tensor, Tensor]:
    """Return copies ``(B, S + 1)`` in which every row ends with ``eos_id``: what a reward model was trained to read.

    Rows that end with it already stay as they are. The sampled tokens themselves are never changed.
    """
    rows = torch.arange(len(sequences), device=sequences.device)
    lengths = attention_mask.sum(dim=1)
    cut = sequences[rows, lengths - 1] != eos_id
    sequences = torch.nn.functional.pad(sequences, (0, 1))
    attention_mask = torch.nn.functional.pad(attention_mask, (0, 1))
    sequences[rows[cut], lengths[cut]] = eos_id
    attention_mask[rows[cut], lengths[cut]] = True
    return sequences, attention_mask


def make_experience(
    algorithm: AlgorithmConfig,
    batch: SequenceBatch,
    log_probs: Tensor,
    ref_log_probs: Tensor,
    values: Tensor | None,
    scores: Tensor,
    shaped: Tensor,
    *,
    kl_coef: float,
    steps: Tensor | None = None,
) -> Experience:
    """Return the experience of one shard.

    Args:
        algorithm: the estimator and its constants.
        batch: the sequences.
        log_probs: ``(B, T)`` of the policy.
        ref_log_probs: ``(B, T)`` of the reference.
        values: ``(B, T)`` of the critic, or None: then advantages and returns are both the discounted returns.
        scores: ``(B,)`` what the reward sources gave.
        shaped: ``(B,)`` the clipped scores after the group baseline, rewards of steps included.
        kl_coef: weight of the KL in the token rewards; 0 where it is part of the loss.
        steps: ``(B, T)`` rewards of the ends of steps; what is left of ``shaped`` goes to the last action.
    """
    mask = batch.action_mask
    nothing = torch.zeros(())
    kl = approx_kl(log_probs - ref_log_probs, algorithm.kl)
    kl = torch.where(mask, kl, nothing)
    if steps is None:
        rewards = token_rewards(shaped, kl, mask, kl_coef=kl_coef)
    else:
        rewards = steps + token_rewards(shaped - steps.sum(dim=1), kl, mask, kl_coef=kl_coef)
    if values is None:
        values = torch.zeros_like(log_probs)
        returns = discounted_returns(rewards, mask, algorithm.discount)
        advantages = returns
    else:
        advantages, returns = gae(values, rewards, mask, algorithm.discount, algorithm.lambd)
    return Experience(**vars(batch), log_probs=log_probs, ref_log_probs=ref_log_probs, kl=kl, scores=scores,
                      values=values, advantages=advantages, returns=returns)  # fmt: skip


def token_columns(
    experience: Experience,
    starts: Mapping[int, int],
    most: int,
    *,
    whiten: tuple[float, float] | None,
    reference: bool,
) -> dict[int, dict[str, list[float]]]:
    """Return of some samples what was learned from their tokens: lists by name, one figure a token, 0 off the actions.

    Args:
        experience: of a shard; samples that it has not are left out.
        starts: by the number of a sample, its first token to look at.
        most: tokens of a sample to look at.
        whiten: mean and 1 / standard deviation that the advantages are taken with.
        reference: whether there is a reference.
    """
    mean, scale = whiten or (0.0, 1.0)
    columns = {"log_prob": experience.log_probs, "advantage": (experience.advantages - mean) * scale}
    if reference:
        columns["ref_log_prob"] = experience.ref_log_probs
    found = {}
    for row, sample in enumerate(experience.sample.tolist()):
        if sample not in starts:
            continue
        end = int(experience.attention_mask[row].sum())
        span = slice(starts[sample] - 1, min(end, starts[sample] + most) - 1)
        mask = experience.action_mask[row, span]
        found[sample] = {
            name: torch.where(mask, values[row, span].float(), 0.0).tolist() for name, values in columns.items()
        }
    return found


SUMS = ("actions", "kl", "log_probs", "advantages", "squared_advantages", "returns", "squared_returns", "sync_gap")


def experience_statistics(experience: Experience) -> dict[str, float]:
    """Return sums over the actions of one shard in double precision, and ``sync_gap_max``, a maximum.

    ``sync_gap`` is the absolute difference between the log-probs of the engine that sampled and of the policy.
    """
    mask = experience.action_mask
    gap = torch.where(mask, (experience.rollout_log_probs - experience.log_probs).double().abs(), 0.0)
    advantages, returns = experience.advantages.double(), experience.returns.double()
    sums = {
        "actions": mask,
        "kl": experience.kl.double(),
        "log_probs": experience.log_probs.double(),
        "advantages": advantages,
        "squared_advantages": advantages.square(),
        "returns": returns,
        "squared_returns": returns.square(),
        "sync_gap": gap,
    }
    found = {name: float(masked_sum(value, mask)) for name, value in sums.items()}
    return {**found, "sync_gap_max": float(gap.max()) if gap.numel() else 0.0}


def add_statistics(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Return the statistics of several shards, or of several ranks, as those of one."""
    parts = list(parts)
    sums = {name: sum(part[name] for part in parts) for name in SUMS}
    # A NaN must survive: max() would drop it.
    gaps = torch.tensor([part["sync_gap_max"] for part in parts] or [0.0], dtype=torch.float64)
    return {**sums, "sync_gap_max": float(gaps.max())}


def whitening(statistics: dict[str, float]) -> tuple[float, float]:
    """Return mean and 1 / standard deviation (population, variance at least 1e-8) of the advantages of all actions."""
    mean, variance = mean_and_variance(statistics, "advantages")
    return mean, max(variance, 1e-8) ** -0.5


def shape_scores(config: PPOConfig, scores: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
    """Return the scores ``(N,)`` after the clip and then the penalties for length: before any baseline.

    A clip afterwards would hide the penalties of answers with high scores.
    """
    reward = config.reward
    shaped = scores.clamp(*reward.reward_clip_range)
    if reward.stop_properly_penalty_coef is not None:
        truncated = torch.tensor([rollout.finish_reason == "length" for rollout in rollouts])
        shaped = stop_properly(shaped, truncated, reward.stop_properly_penalty_coef)
    if reward.overlong_buffer_len is not None:
        lengths = torch.tensor([rollout.num_actions for rollout in rollouts])
        limit = config.rollout.generate_max_len
        shaped = shaped + overlong_penalty(lengths, limit, reward.overlong_buffer_len, reward.overlong_penalty_factor)
    return shaped


def explained_variance(statistics: dict[str, float]) -> float:
    """Return ``1 - var(return - value) / var(return)`` over all actions; with GAE the difference is the advantage.

    1 is a perfect critic; 0 one as good as a constant, or returns that are all equal.
    """
    _, left = mean_and_variance(statistics, "advantages")
    _, whole = mean_and_variance(statistics, "returns")
    return 1.0 - left / whole if whole > 1e-8 else 0.0


def mean_and_variance(statistics: dict[str, float], name: str) -> tuple[float, float]:
    """Return the mean and the population variance of a quantity over all actions."""
    count = max(1.0, statistics["actions"])
    mean = statistics[name] / count
    return mean, max(0.0, statistics[f"squared_{name}"] / count - mean * mean)
