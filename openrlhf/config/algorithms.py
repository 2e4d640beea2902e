"""The lists of advantage estimators, policy losses and pair losses: name, function, facts. Imports no torch."""

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
        needs_greedy: the baseline also takes the scores ``(P,)`` of one greedy answer to each prompt.
        rescales: the baseline divides scores too, so the rewards of single steps could not be compared with them.
        whiten: advantages are normalised over all action tokens of the rollout batch and all ranks.
    """

    baseline: str
    needs_critic: bool = False
    needs_group: bool = False
    needs_greedy: bool = False
    rescales: bool = False
    whiten: bool = False

    @property
    def of_whole_answers(self) -> bool:
        """Whether whole answers are compared, so that there is no discount."""
        return self.needs_group or self.needs_greedy

    def load_baseline(self) -> Any:
        """Return the baseline function ``(scores, n) -> scores``, with the greedy scores as a third argument."""
        return _load(self.baseline)


_ADVANTAGES = "openrlhf.ops.advantages"
ESTIMATORS = {
    # PPO, Schulman et al. 2015, https://arxiv.org/abs/1506.02438
    "gae": Estimator(f"{_ADVANTAGES}:none", needs_critic=True, whiten=True),
    # REINFORCE++, Hu 2025, https://arxiv.org/abs/2501.03262
    "reinforce": Estimator(f"{_ADVANTAGES}:none", whiten=True),
    "reinforce_baseline": Estimator(f"{_ADVANTAGES}:group_mean", needs_group=True, whiten=True),
    # Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
    "rloo": Estimator(f"{_ADVANTAGES}:rloo", needs_group=True, whiten=True),
    # GRPO, Shao et al. 2024, https://arxiv.org/abs/2402.03300
    "group_norm": Estimator(f"{_ADVANTAGES}:group_norm", needs_group=True, rescales=True),
    # Liu et al. 2025, https://arxiv.org/abs/2503.20783
    "dr_grpo": Estimator(f"{_ADVANTAGES}:group_mean", needs_group=True),
    # Li et al. 2023, https://arxiv.org/abs/2310.10505
    "remax": Estimator(f"{_ADVANTAGES}:remax", needs_greedy=True),
}


@dataclass(frozen=True)
class PolicyLoss:
    """A loss of the policy in PPO.

    Attributes:
        function: ``module:function`` in ``openrlhf.ops``, ``(log_probs, old_log_probs, advantages, mask, clip)``.
        of_sequences: one ratio a sequence, so the loss is a mean over sequences, and with a correction of the rollout
            the ratio is taken against the engine.
        dual_clip: whether ``--dual_clip`` counts.
    """

    function: str
    of_sequences: bool = False
    dual_clip: bool = True

    def load(self) -> Any:
        """Return the loss function."""
        return _load(self.function)


POLICY_LOSSES = {
    # Schulman et al. 2017, https://arxiv.org/abs/1707.06347
    "ppo": PolicyLoss("openrlhf.ops.policy_loss:ppo"),
    # Zheng et al. 2025, https://arxiv.org/abs/2507.18071
    "gspo": PolicyLoss("openrlhf.ops.policy_loss:gspo", of_sequences=True),
    # MiniMax 2025, https://arxiv.org/abs/2506.13585
    "cispo": PolicyLoss("openrlhf.ops.policy_loss:cispo", dual_clip=False),
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
