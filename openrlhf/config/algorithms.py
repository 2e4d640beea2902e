"""The lists of advantage estimators and of pair losses: name, function, facts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Estimator:
    """An advantage estimator.

    Attributes:
        baseline: ``module:function`` in ``openrlhf.ops``, applied to the scores ``(P * n,)`` of consecutive groups.
        needs_critic: advantages come from a trained critic (GAE); otherwise from discounted returns.
        needs_group: compares the samples of one prompt, so ``--n_samples_per_prompt`` must be above 1.
        whiten: advantages are normalised over all action tokens of the rollout batch and all ranks.
    """

    baseline: str
    needs_critic: bool
    needs_group: bool
    whiten: bool

    def load_baseline(self) -> Any:
        """Return the baseline function ``(scores, n) -> scores``."""
        return _load(self.baseline)


ESTIMATORS = {
    # Schulman et al. 2015, https://arxiv.org/abs/1506.02438
    "gae": Estimator("openrlhf.ops.advantages:none", needs_critic=True, needs_group=False, whiten=True),
    # REINFORCE++, Hu 2025, https://arxiv.org/abs/2501.03262
    "reinforce": Estimator("openrlhf.ops.advantages:none", needs_critic=False, needs_group=False, whiten=True),
    # Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
    "rloo": Estimator("openrlhf.ops.advantages:rloo", needs_critic=False, needs_group=True, whiten=True),
}


@dataclass(frozen=True)
class PairLoss:
    """A loss of ``train_dpo`` over pairs of a chosen and a rejected answer.

    Attributes:
        function: ``module:function`` in ``openrlhf.ops``, called as ``(chosen, rejected, **flags)``.
        needs_reference: it reads sums of log-ratios to a reference model; otherwise means of log-probs over tokens.
        flags: the flags that it takes by their names.
        needs_divergences: it also takes ``chosen_kl`` and ``rejected_kl``, measured over the optimizer step before it.
    """

    function: str
    needs_reference: bool
    flags: tuple[str, ...] = ("beta",)
    needs_divergences: bool = False

    def load(self) -> Any:
        """Return the loss function."""
        return _load(self.function)


PAIR_LOSSES = {
    # Rafailov et al. 2023, https://arxiv.org/abs/2305.18290; with --label_smoothing the conservative variant
    "dpo": PairLoss("openrlhf.ops.preference_loss:dpo_loss", True, ("beta", "label_smoothing")),
    # Azar et al. 2023, https://arxiv.org/abs/2310.12036
    "ipo": PairLoss("openrlhf.ops.preference_loss:ipo_loss", True),
    # Meng et al. 2024, https://arxiv.org/abs/2405.14734
    "simpo": PairLoss("openrlhf.ops.preference_loss:simpo_loss", False, ("beta", "target_margin")),
    # Hong et al. 2024, https://arxiv.org/abs/2403.07691
    "orpo": PairLoss("openrlhf.ops.preference_loss:orpo_loss", False),
    # Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, as first published for pairs
    "kto_pair": PairLoss("openrlhf.ops.preference_loss:paired_kto_loss", True, needs_divergences=True),
}


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)
