"""Figures on held-out prompts, before, during and after training."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from openrlhf.config.ppo import PPOConfig
from openrlhf.config.ppo_rollout import NO_BEST
from openrlhf.errors import UsageError
from openrlhf.rollout.engine import RolloutEngine
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams
from openrlhf.trainer.ppo.rating import Rater
from openrlhf.trainer.ppo.sample_log import SampleLog, Scored


def pair_accuracy(scores: Sequence[float], true_scores: Sequence[float]) -> float | None:
    """Return how often the answer of two with the higher true score has the higher score; equal scores count half.

    With right and wrong answers it is the area under the ROC curve. None when all true scores are equal.
    """
    score, truth = (torch.tensor(list(column), dtype=torch.float64) for column in (scores, true_scores))
    better = truth[:, None] > truth[None, :]
    pairs = int(better.sum())
    won = (score[:, None] > score[None, :]).double() + 0.5 * (score[:, None] == score[None, :]).double()
    return float(won[better].sum()) / pairs if pairs else None


def pass_rates(rollouts: Sequence[Rollout], scores: Sequence[float], samples: int) -> dict[str, float]:
    """Return ``eval_{source}_pass1`` and, with several answers to a prompt, ``eval_{source}_pass{samples}``.

    The first is the mean of the scores of a data source, the second the mean over its prompts of their best score: of
    right and wrong answers, how often one of ``samples`` is right. Answers to one prompt are next to each other.
    """
    sources: dict[str, list[int]] = {}
    for first in range(0, len(rollouts), samples):
        sources.setdefault(rollouts[first].prompt.source, []).append(first)
    values: dict[str, float] = {}
    for source, firsts in sources.items():
        groups = [scores[first : first + samples] for first in firsts]
        values[f"eval_{source}_pass1"] = sum(map(sum, groups)) / (samples * len(groups))
        if samples > 1:
            values[f"eval_{source}_pass{samples}"] = sum(map(max, groups)) / len(groups)
    return values


class Evaluator:
    """Answers the evaluation prompts at every ``--eval_temperature`` and scores the answers.

    The seeds do not depend on the step, so that two evaluations differ by the weights alone.

    Args:
        config: the run.
        prompts: the evaluation prompts; none is fine, then nothing is evaluated.
        engine: who samples.
        rater: who scores.
        samples: where some answers are kept.
    """

    def __init__(
        self,
        config: PPOConfig,
        prompts: Sequence[Prompt],
        engine: RolloutEngine,
        rater: Rater,
        samples: SampleLog,
    ):
        self.config = config
        self.prompts = list(prompts)
        self.engine = engine
        self.rater = rater
        self.samples = samples

    def evaluate(self, step: int, when: str) -> dict[str, float]:
        """Return ``reward_t1``, ``true_score_t1``, ... for each temperature; keep some answers if ``when`` says so.

        The engine, awake with the weights to look at, has answered everything before a model scores, and sleeps then.

        ``reward_auc_t1`` is how often the reward puts a better answer above a worse one (:func:`pair_accuracy`).
        :func:`pass_rates` go by the true score, else by the scores that a reward function gives beside its rewards,
        else by the rewards; but for the first temperature their names end as the others, in ``_t0``.

        Raises:
            UsageError: ``--best_metric_key`` names none of these figures.
        """
        values: dict[str, float] = {}
        answers = []
        settings = self.config.evaluation
        samples, temperatures = settings.eval_n_samples_per_prompt, settings.eval_temperature
        sampled = [self.engine.generate(self.prompts, self._sampling(temperature)) for temperature in temperatures]
        self.engine.sleep()
        for temperature, rollouts in zip(temperatures, sampled, strict=True):
            rated, true_scores = self.rater.score(rollouts)
            scores = rated.scores.tolist()
            suffix = f"_t{temperature:g}" if answers else ""
            passed = pass_rates(rollouts, rated.judged if true_scores is None else true_scores, samples)
            values |= {f"{figure}{suffix}": value for figure, value in passed.items()}
            rows, name = len(rollouts), f"t{temperature:g}"
            values[f"reward_{name}"] = sum(scores) / rows
            values[f"response_length_{name}"] = sum(rollout.num_actions for rollout in rollouts) / rows
            values[f"truncated_rate_{name}"] = sum(rollout.finish_reason == "length" for rollout in rollouts) / rows
            if true_scores is not None:
                values[f"true_score_{name}"] = sum(true_scores) / rows
                agreement = pair_accuracy(scores, true_scores)
                values |= {} if agreement is None else {f"reward_auc_{name}": agreement}
            answers.append(Scored(rollouts, scores, true_scores, rated.all_parts, temperature, samples))
        wanted = settings.best_metric_key
        if wanted not in ("", NO_BEST, *values):
            raise UsageError(f"--best_metric_key {wanted}: the evaluation gives {', '.join(values)}; name one of them")
        # Only now: an evaluation that is broken off and repeated leaves nothing behind.
        for scored in answers if when else ():
            self.samples.write(when, step, scored)
        return values

    def _sampling(self, temperature: float) -> SamplingParams:
        rollout = self.config.rollout
        return SamplingParams(
            max_new_tokens=rollout.generate_max_len,
            temperature=temperature,
            top_p=rollout.top_p,
            n=self.config.evaluation.eval_n_samples_per_prompt,
            seed=self.config.batch.seed,
            step=0,
        )
