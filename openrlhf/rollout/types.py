"""The stages of a sample, from a prompt to an experience. The type says how far the data has come.

``B`` sequences, ``S`` padded length, ``T = S - 1``; column ``t`` of a ``(B, T)`` tensor speaks of predicting
``sequences[:, t + 1]``. Padding is on the right.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self

from openrlhf.datasets.prompts import Prompt

__all__ = ["Experience", "Prompt", "Rollout", "SamplingParams", "ScoredBatch", "SequenceBatch", "sample_seed"]


def sample_seed(run_seed: int, step: int, uid: str, index: int) -> int:
    """Return the 31-bit seed of sample ``index`` of prompt ``uid`` at ``step``: order and batching
    cannot change it.
    """
    digest = hashlib.sha256(f"{run_seed}/{step}/{uid}/{index}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class SamplingParams:
    """How to sample: ``temperature`` 0 is greedy, ``n`` answers a prompt, ``seed`` and ``step`` fix every sample.

    Scores of tokens that were there before are divided by ``repetition_penalty`` where they are positive, and
    multiplied by it elsewhere (CTRL, arXiv:1909.05858).
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    n: int = 1
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class Rollout:
    """One sampled answer.

    Attributes:
        prompt: what was asked.
        token_ids: prompt and answer, exactly as sampled (no token is ever rewritten).
        action_spans: ``(start, end)`` ranges of ``token_ids`` that the policy chose; one span in the ordinary case.
        log_probs: one per action token, at the sampling temperature, from the engine that sampled.
        finish_reason: ``"stop"`` or ``"length"``.
        policy_version: number of weight pushes the engine had seen.
        seed: what repeats this sample.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    action_spans: tuple[tuple[int, int], ...]
    log_probs: tuple[float, ...]
    finish_reason: str
    policy_version: int
    seed: int

    @property
    def response_ids(self) -> tuple[int, ...]:
        """Everything after the prompt."""
        return self.token_ids[len(self.prompt.token_ids) :]

    @property
    def num_actions(self) -> int:
        """Number of tokens that the policy chose."""
        return sum(end - start for start, end in self.action_spans)


@dataclass
class SequenceBatch:
    """Rollouts as tensors.

    Attributes:
        sequences: ``(B, S)`` int64.
        attention_mask: ``(B, S)`` bool.
        action_mask: ``(B, T)`` bool, true where the predicted token is an action.
        rollout_log_probs: ``(B, T)`` float32 from the engine, 0 elsewhere.
        sample: ``(B,)`` int64 number of the sample in its rollout step; -1 in a row that stands for none.
    """

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    rollout_log_probs: Tensor
    sample: Tensor

    def __len__(self) -> int:
        return self.sequences.shape[0]

    def to(self, device) -> Self:
        """Return the batch with every tensor on ``device``."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, rows: list[int] | Tensor) -> Self:
        """Return the given rows, cut to the longest of them (right padding nobody needs is dropped)."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        width = max(2, int(self.attention_mask[index].sum(dim=1).max())) if len(index) else 2
        picked: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)[index]
            if value.dim() == 2:
                value = value[:, : width if f.name in ("sequences", "attention_mask") else width - 1]
            picked[f.name] = value
        return type(self)(**picked)

    @classmethod
    def from_rollouts(cls, rollouts: list[Rollout], pad_id: int) -> SequenceBatch:
        """Pad ``rollouts`` on the right to the longest of them; they are the first samples of their step."""
        width = max(len(rollout.token_ids) for rollout in rollouts)
        sequences = torch.full((len(rollouts), width), pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(len(rollouts), width, dtype=torch.bool)
        action_mask = torch.zeros(len(rollouts), width - 1, dtype=torch.bool)
        log_probs = torch.zeros(len(rollouts), width - 1)
        for row, rollout in enumerate(rollouts):
            length = len(rollout.token_ids)
            sequences[row, :length] = torch.tensor(rollout.token_ids)
            attention_mask[row, :length] = True
            taken = 0
            for start, end in rollout.action_spans:
                action_mask[row, start - 1 : end - 1] = True
                log_probs[row, start - 1 : end - 1] = torch.tensor(rollout.log_probs[taken : taken + end - start])
                taken += end - start
        sample = torch.arange(len(rollouts))
        return SequenceBatch(sequences, attention_mask, action_mask, log_probs, sample)


@dataclass
class ScoredBatch(SequenceBatch):
    """Rollouts that the models have looked at.

    Attributes:
        log_probs: ``(B, T)`` of the policy before the update.
        ref_log_probs: ``(B, T)`` of the reference; equals ``log_probs`` when there is none.
        kl: ``(B, T)`` estimate of the divergence from the reference, 0 off the actions.
        scores: ``(B,)`` what the reward sources gave.
        values: ``(B, T)`` of the critic; zeros when there is none.
    """

    log_probs: Tensor
    ref_log_probs: Tensor
    kl: Tensor
    scores: Tensor
    values: Tensor


@dataclass
class Experience(ScoredBatch):
    """What the policy and the critic learn from.

    Attributes:
        advantages: ``(B, T)``, 0 off the actions.
        returns: ``(B, T)``, 0 off the actions.
    """

    advantages: Tensor
    returns: Tensor
