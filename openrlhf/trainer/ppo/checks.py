"""What must hold of a rollout before anything learns from it: numbers everywhere, and an engine that agrees."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from openrlhf.config.ppo import PPOConfig
from openrlhf.errors import DataError, InfraError, NumericError
from openrlhf.rollout.types import Experience, Rollout

SYNC_TOLERANCE = {True: 0.1, False: 1e-3}
"""Largest mean gap of engine and trainer log-probs, in bf16 and in fp32."""
CHECKED = ("log_probs", "kl", "advantages", "returns")
"""What of an experience must be finite: both its name and that of its sum."""
SHOWN_PROMPTS = 16


def check_rollout(
    config: PPOConfig,
    statistics: Mapping[str, float],
    rollouts: Sequence[Rollout],
    experiences: Callable[[], list[Experience]],
) -> None:
    """Raise what keeps a rollout from being learned from.

    Args:
        config: the run.
        statistics: sums over all actions, as :func:`~openrlhf.trainer.ppo.assembly.experience_statistics` names them.
        rollouts: the samples.
        experiences: fetches what was made of them, to find the samples that are to blame.

    Raises:
        DataError: no answer has a token.
        NumericError: a log-prob, a KL, an advantage or a return is not finite.
        InfraError: the engine and the policy disagree about the log-probs.
    """
    count = statistics["actions"]
    if not count:
        asked = name_prompts(rollouts, range(len(rollouts)))
        raise DataError(f"no answer of this rollout has a token; it asked {asked}")
    if not math.isfinite(sum(statistics[name] for name in CHECKED)):
        raise _not_finite(rollouts, experiences())
    gap, tolerance = statistics["sync_gap"] / count, _sync_tolerance(config)
    if not gap <= tolerance:
        raise InfraError(_explain_gap(gap, statistics["sync_gap_max"], tolerance))


def _not_finite(rollouts: Sequence[Rollout], experiences: list[Experience]) -> NumericError:
    """Return the error that says what of an experience is not finite, in which samples."""
    wrong: dict[str, list[int]] = {name: [] for name in CHECKED}
    for part in experiences:
        for name, found in wrong.items():
            spoilt = (part.action_mask & ~getattr(part, name).isfinite()).any(dim=1)
            found += part.sample[spoilt].tolist()
    samples = sorted(set().union(*wrong.values()))
    what = " and ".join(name for name, found in wrong.items() if found)
    who = name_prompts(rollouts, samples)
    return NumericError(
        f"{what} of {len(samples)} answers are not finite; they answer {who}; the weights were not changed", samples
    )


def _sync_tolerance(config: PPOConfig) -> float:
    """Return the largest mean gap; an engine that reports log-probs of the nucleus may be off by -log(top_p)."""
    return (config.sync_tolerance or SYNC_TOLERANCE[config.model.bf16]) - math.log(config.rollout.top_p)


def name_prompts(rollouts: Sequence[Rollout], samples: Iterable[int]) -> str:
    """Return the uids of the prompts of the given samples and the beginning of the first, for a message."""
    prompts = {rollouts[sample].prompt.uid: rollouts[sample].prompt for sample in samples}
    if not prompts:
        return "no prompt"
    more = f" and {len(prompts) - SHOWN_PROMPTS} more" if len(prompts) > SHOWN_PROMPTS else ""
    uids = ", ".join(list(prompts)[:SHOWN_PROMPTS])
    return f"prompt{'s' * (len(prompts) > 1)} {uids}{more} ({next(iter(prompts.values())).text[:80]!r})"


def _explain_gap(gap: float, largest: float, tolerance: float) -> str:
    return (
        f"the engine's log-probs differ from the policy's by {gap:.3g} on average and {largest:.3g} at most, more "
        f"than --sync_tolerance {tolerance:g}. Likely causes: the engine kept an old copy of tied embeddings (the "
        "LM head after a weight sync), it runs in another dtype or at another temperature than the policy, or it "
        "serves stale weights. Nothing was trained on these samples"
    )
