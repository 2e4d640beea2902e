"""The one list of advantage estimators: name, where its function lives, and its facts. Imports no torch."""

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
        module, _, name = self.baseline.partition(":")
        return getattr(import_module(module), name)


ESTIMATORS = {
    # Schulman et al. 2015, https://arxiv.org/abs/1506.02438
    "gae": Estimator("openrlhf.ops.advantages:none", needs_critic=True, needs_group=False, whiten=True),
    # REINFORCE++, Hu 2025, https://arxiv.org/abs/2501.03262
    "reinforce": Estimator("openrlhf.ops.advantages:none", needs_critic=False, needs_group=False, whiten=True),
    # Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740
    "rloo": Estimator("openrlhf.ops.advantages:rloo", needs_critic=False, needs_group=True, whiten=True),
}
