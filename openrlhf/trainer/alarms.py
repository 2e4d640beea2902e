"""Alarms: what a run looks like when it goes wrong while every number is still finite.

An alarm looks at the first and the last steps of a few metrics. While its condition holds, the metric
``alarm/<name>`` is 1; when a condition begins, one line says what is seen and which knob to turn. Bounds come from
small PPO runs whose true score was known: healthy ones stayed well inside, collapsed ones went far beyond.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance
from typing import Any

from openrlhf.trainer.callbacks import Callback

WINDOW = 20
"""Steps kept of the beginning and of the end of a metric."""
SETTLED = 5
"""Steps whose mean counts as what a noisy rate is now."""
SIGNIFICANT = 3.0
"""Standard errors by which two means must differ."""
QUIET_AFTER = 10
"""Steps without the condition after which its return is a new episode."""

MOST_TRUNCATED = 0.25
"""Healthy runs cut 0-1 % of the answers; one whose policy no longer stops cuts all of them."""
MOST_KL = 0.5
"""Nats a token. Healthy runs stayed under 0.14 with a learned reward and under 0.28 with a true one; hacked ones
came to 3-5."""
LEAST_ENTROPY = 0.05
"""Share of the entropy at the start. Healthy runs kept 12-30 %."""
MOST_EQUAL_GROUPS = 0.8
"""Share of groups without a difference: the step then learns from a fifth of its samples."""
LEAST_EXPLAINED = -0.5
"""0 is a critic as good as a constant; below, its errors add half of the variance of the returns, or more."""
LOSS_RISE = 1.05
"""Loss over the loss at the start."""


@dataclass
class Series:
    """The first and the last steps of a metric."""

    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Add a step."""
        if len(self.first) < WINDOW:
            self.first.append(value)
        self.last = [*self.last, value][-WINDOW:]

    @property
    def now(self) -> float:
        """The mean of the last few steps; NaN before there are as many."""
        return fmean(self.last[-SETTLED:]) if len(self.last) >= SETTLED else math.nan

    @property
    def start(self) -> float:
        """The mean of the first few steps."""
        return fmean(self.first[:SETTLED])

    @property
    def trend(self) -> float:
        """By how many standard errors the newer half of the last steps lies above the older; 0 for few steps."""
        half = len(self.last) // 2
        return distance(self.last[-2 * half : -half], self.last[-half:]) if half >= SETTLED else 0.0


def distance(before: Sequence[float], after: Sequence[float]) -> float:
    """Return by how many standard errors the mean of ``after`` lies above that of ``before`` (Welch's t)."""
    difference = fmean(after) - fmean(before)
    error = math.sqrt(variance(before) / len(before) + variance(after) / len(after))
    return difference / max(error, 1e-9)


@dataclass(frozen=True)
class Alarm:
    """A condition on metrics.

    Attributes:
        name: of its metric, after ``alarm/``.
        metrics: what it looks at; without one of them it is silent.
        condition: takes a Series of each and returns what is seen, in words, or None.
        advice: the knob to turn.
    """

    name: str
    metrics: tuple[str, ...]
    condition: Callable[..., str | None]
    advice: str


def _hacked(reward: Series, true_score: Series) -> str | None:
    if reward.trend < SIGNIFICANT or true_score.trend > -SIGNIFICANT:
        return None
    return (
        f"over the last {len(reward.last)} steps the reward rises (now {reward.now:.3g}) while the true score "
        f"falls (now {true_score.now:.3g})"
    )


def _sure_of_itself(entropy: Series) -> str | None:
    if not entropy.now < LEAST_ENTROPY * entropy.start:
        return None
    return f"the entropy fell to {entropy.now:.3g} nats a token, from {entropy.start:.3g} at the start"


def _cut(truncated: Series) -> str | None:
    return (
        f"{truncated.now:.0%} of the answers are cut at the length limit" if truncated.now > MOST_TRUNCATED else None
    )


def _far_away(kl: Series) -> str | None:
    return f"the policy is {kl.now:.2g} nats a token away from the reference" if kl.now > MOST_KL else None


def _all_alike(groups: Series) -> str | None:
    if not groups.now > MOST_EQUAL_GROUPS:
        return None
    return f"in {groups.now:.0%} of the groups all answers have one reward, so they teach nothing"


def _blind_critic(explained: Series) -> str | None:
    # A fresh critic begins blind; a full window gives it time.
    if len(explained.last) < WINDOW or not fmean(explained.last[-WINDOW // 2 :]) < LEAST_EXPLAINED:
        return None
    return f"the critic explains {explained.now:.2g} of the variance of the returns; a constant explains 0"


def _rising(loss: Series) -> str | None:
    if len(loss.last) < WINDOW or fmean(loss.last) <= LOSS_RISE * fmean(loss.first):
        return None
    if distance(loss.first, loss.last) < SIGNIFICANT:
        return None
    return f"the loss is {fmean(loss.last):.4g} over the last {WINDOW} steps; it began at {fmean(loss.first):.4g}"


PPO_ALARMS = (
    Alarm(
        "reward_hacking", ("reward", "true_score"), _hacked,
        "raise --init_kl_coef or stop here and take an earlier checkpoint; the reward model needs such answers",
    ),
    Alarm(
        "entropy_collapse", ("entropy",), _sure_of_itself,
        "lower --actor_learning_rate, or raise --init_kl_coef or --temperature",
    ),
    Alarm(
        "truncated", ("truncated_rate",), _cut,
        "raise --generate_max_len, or --init_kl_coef if the policy has forgotten how to stop",
    ),
    Alarm(
        "kl", ("kl",), _far_away,
        "raise --init_kl_coef, set --kl_target, or lower --actor_learning_rate",
    ),
    Alarm(
        "zero_variance_groups", ("zero_variance_groups",), _all_alike,
        "raise --n_samples_per_prompt, or use prompts that are neither too easy nor too hard",
    ),
    Alarm(
        "critic", ("explained_variance",), _blind_critic,
        "raise --critic_learning_rate, give it a start with --freezing_actor_steps, or lower --lambd towards 0.95",
    ),
)  # fmt: skip


def loss_alarms(metric: str) -> tuple[Alarm, ...]:
    """Return the alarms of a supervised command whose loss is called ``metric``."""
    advice = "lower --learning_rate, raise --lr_warmup_ratio, or look at the data"
    return (Alarm("loss_rising", (metric,), _rising, advice),)


class Alarms(Callback):
    """Watches the metrics of each step and adds ``alarm/<name>`` to them: it stands before what logs them."""

    def __init__(self, alarms: Sequence[Alarm], say: Callable[[str], None]):
        """``say`` writes a line for the person at the terminal."""
        self._alarms, self._say = alarms, say
        self._series: dict[str, Series] = {name: Series() for alarm in alarms for name in alarm.metrics}
        self._silence: dict[str, int] = {}

    def on_step_end(self, trainer: Any, metrics: dict[str, float]) -> None:
        """Look at the step."""
        for name, series in self._series.items():
            if math.isfinite(metrics.get(name, math.nan)):
                series.add(metrics[name])
        for alarm in self._alarms:
            if all(name in metrics for name in alarm.metrics):
                seen = alarm.condition(*(self._series[name] for name in alarm.metrics))
                metrics[f"alarm/{alarm.name}"] = float(seen is not None)
                self._tell(alarm, seen, trainer.global_step)

    def _tell(self, alarm: Alarm, seen: str | None, step: int) -> None:
        """Say it where an episode begins."""
        if seen is None:
            self._silence[alarm.name] = self._silence.get(alarm.name, QUIET_AFTER) + 1
            return
        if self._silence.get(alarm.name, QUIET_AFTER) >= QUIET_AFTER:
            self._say(f"alarm at step {step}, {alarm.name}: {seen}. {alarm.advice[0].upper()}{alarm.advice[1:]}.")
        self._silence[alarm.name] = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must remember, for JSON."""
        series = {name: [one.first, one.last] for name, one in self._series.items()}
        return {"series": series, "silence": dict(self._silence)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; alarms that it does not know begin anew."""
        for name, (first, last) in state["series"].items():
            if name in self._series:
                self._series[name] = Series(list(first), list(last))
        self._silence = dict(state["silence"])
