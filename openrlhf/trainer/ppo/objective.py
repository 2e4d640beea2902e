"""What the policy minimises: its loss, the correction of the rollout, the divergence, and the entropy bonus."""

from __future__ import annotations

import torch
from torch import Tensor

from openrlhf.config.ppo import PPOConfig
from openrlhf.models.actor import ActorOutput
from openrlhf.ops.kl import approx_kl
from openrlhf.ops.masking import masked_sum, masked_whiten
from openrlhf.ops.policy_loss import Clip, Metrics, reduced, weight
from openrlhf.ops.rollout_correction import rollout_correction
from openrlhf.rollout.types import Experience


class PolicyObjective:
    """The loss of the policy as the flags put it together; all its parts are reduced alike."""

    def __init__(self, config: PPOConfig):
        self._algorithm = config.algorithm
        self._surrogate = self._algorithm.policy_loss.load()
        self._clip = Clip(*self._algorithm.clip_range, self._algorithm.dual_clip)
        self.reduction = self._algorithm.policy_reduction

    @property
    def reads_entropy(self) -> bool:
        """Whether the forward must give the entropy of the distributions."""
        return self._algorithm.entropy_loss_coef is not None

    def loss(
        self, batch: Experience, output: ActorOutput, whiten: tuple[float, float] | None, kl_coef: float
    ) -> tuple[Tensor, Metrics]:
        """Return the loss of a micro-batch, reduced to a sum, and its metrics as (sum, count) pairs.

        Args:
            batch: what is learned from.
            output: of the policy on ``batch``.
            whiten: mean and 1 / standard deviation of the advantages, or None to take them as they are.
            kl_coef: weight of the divergence from the reference in the loss.
        """
        mask, log_probs = batch.action_mask, output.log_probs
        advantages = batch.advantages if whiten is None else masked_whiten(batch.advantages, mask, *whiten)
        old, weights, metrics = self._corrected(batch)
        surrogate = self._surrogate(log_probs, old, advantages, mask, self._clip)
        loss = self._reduced(surrogate.loss if weights is None else surrogate.loss * weights, mask)
        metrics |= {"policy_loss": (loss.detach(), weight(mask, self.reduction)), **surrogate.metrics(mask)}
        if kl_coef > 0:
            divergence = torch.where(mask, log_probs - batch.ref_log_probs, 0.0)
            kl_loss = self._reduced(approx_kl(divergence, self._algorithm.kl), mask)
            loss = loss + kl_coef * kl_loss
            metrics["kl_loss"] = (kl_loss.detach(), weight(mask, self.reduction))
        if output.entropy is not None:
            metrics["policy_entropy"] = (masked_sum(output.entropy.detach(), mask), mask.sum())
            if self._algorithm.entropy_loss_coef:
                loss = loss - self._algorithm.entropy_loss_coef * self._reduced(output.entropy, mask)
        return loss, metrics

    def _reduced(self, loss: Tensor, mask: Tensor) -> Tensor:
        return reduced(loss, mask, self.reduction)

    def _corrected(self, batch: Experience) -> tuple[Tensor, Tensor | None, Metrics]:
        """Return the log-probs to take the ratio against, and weights of the actions or None, and metrics.

        A loss with one ratio a sequence takes it against the engine at once, so it needs no weights.
        """
        if not self._algorithm.enable_vllm_is_correction:
            return batch.log_probs, None, {}
        low, high = self._algorithm.correction_range
        kind = self._algorithm.vllm_is_correction_type
        found = rollout_correction(
            batch.log_probs, batch.rollout_log_probs, batch.action_mask, kind=kind, low=low, high=high
        )
        if self._algorithm.policy_loss.of_sequences:
            return batch.rollout_log_probs, None, {"vllm_kl": found.metrics["vllm_kl"]}
        return batch.log_probs, found.weights, dict(found.metrics)
