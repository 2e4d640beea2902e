"""What becomes of rated answers before they train a model: the best, pairs, or all with rewards told in the prompt."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from openrlhf.config.inference import CONDITIONAL_SFT, ITERATIVE_DPO, REJECTION_SAMPLING, REWARD_TEMPLATE
from openrlhf.errors import DataError

Row = dict


def processed(
    name: str | None, rows: Sequence[Row], *, normalize: bool = False, template: str | None = None
) -> Sequence[Row]:
    """Return what the post-processor ``name`` makes of ``rows``, each with ``input``, ``output`` and ``reward``.

    ``normalize`` and ``template`` are for conditional SFT. Prompts stay in the order in which they come first.

    Raises:
        DataError: rewards cannot be normalised.
    """
    if name == REJECTION_SAMPLING:
        return list(best_of_each(rows))
    if name == ITERATIVE_DPO:
        return list(pairs_of_each(rows))
    if name == CONDITIONAL_SFT:
        return list(conditioned(normalized(rows) if normalize else rows, template or REWARD_TEMPLATE))
    return rows


def best_of_each(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the answer with the highest reward to each prompt; of equal ones the first."""
    for group in _by_prompt(rows):
        best = max(group, key=_reward)
        yield {"input": best["input"], "output": best["output"], "reward": best["reward"]}


def pairs_of_each(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the answers to each prompt with the highest and the lowest reward; a single answer is both."""
    for group in _by_prompt(rows):
        best, worst = max(group, key=_reward), min(group, key=_reward)
        yield {
            "prompt": best["input"],
            "chosen": best["output"],
            "chosen_reward": best["reward"],
            "rejected": worst["output"],
            "rejected_reward": worst["reward"],
        }


def conditioned(rows: Sequence[Row], template: str) -> Iterator[Row]:
    """Yield every row with its reward, in two decimals, told in its prompt (conditional SFT, arXiv:2308.12050)."""
    for row in rows:
        told = template.replace("{reward}", f"{row['reward']:.2f}").replace("{input}", row["input"])
        yield {**row, "input": told}


def normalized(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with rewards in standard deviations (of a sample) from their mean."""
    rewards = [row["reward"] for row in rows]
    deviation = statistics.stdev(rewards) if len(rewards) > 1 else 0.0
    if not deviation:
        raise DataError(
            f"--normalize_reward: {len(rewards)} rewards, all the same, have no standard deviation; rate answers that "
            "differ, or leave the flag out"
        )
    mean = statistics.fmean(rewards)
    return [{**row, "reward": (row["reward"] - mean) / deviation} for row in rows]


def _by_prompt(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["input"], []).append(row)
    return list(groups.values())


def _reward(row: Row) -> float:
    return row["reward"]
