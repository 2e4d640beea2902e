"""Alarms on the metrics of real runs: silent on healthy ones, one line an episode on those that went wrong.

``data/runs.json`` holds steps of PPO runs on the task of the quickstart (``healthy and bold`` has five times its
learning rate and a tenth of its KL coefficient; ``hacked`` has no KL penalty and twenty times its learning rate) and
of its fine-tuning.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from openrlhf.trainer.alarms import PPO_ALARMS, QUIET_AFTER, WINDOW, Alarms, loss_alarms

RUNS = json.loads((Path(__file__).parents[1] / "data" / "runs.json").read_text(encoding="utf-8"))


class Loop:
    """What an alarm asks a loop."""

    def __init__(self, global_step: int = 0):
        self.global_step = global_step


def watch(alarms, run: dict[str, list[float]], callback: Alarms | None = None) -> tuple[list[dict], list[str]]:
    """Return the metrics with the alarms added, and the lines that were said."""
    lines: list[str] = []
    callback = callback or Alarms(alarms, lines.append)
    steps = [dict(zip(run, values, strict=True)) for values in zip(*run.values(), strict=True)]
    for number, step in enumerate(steps, start=1):
        callback.on_step_end(Loop(number), step)
    return steps, lines


def raised(steps: list[dict], name: str) -> list[int]:
    return [number for number, step in enumerate(steps, start=1) if step.get(f"alarm/{name}")]


@pytest.mark.parametrize("name", ["healthy", "healthy and bold"])
def test_a_healthy_run_raises_no_alarm(name):
    steps, lines = watch(PPO_ALARMS, RUNS[name])
    assert lines == []
    assert all(not any(value for key, value in step.items() if key.startswith("alarm/")) for step in steps)
    assert {"alarm/reward_hacking", "alarm/kl", "alarm/entropy_collapse", "alarm/truncated"} <= set(steps[0])


def test_a_reward_that_rises_while_the_true_score_falls_is_said_once_with_the_knob():
    steps, lines = watch(PPO_ALARMS, RUNS["hacked"])
    assert len(lines) == 1
    assert lines[0].startswith("alarm at step 24, reward_hacking:") and "--init_kl_coef" in lines[0]
    assert 24 in raised(steps, "reward_hacking")


def test_without_a_true_score_there_is_no_word_about_hacking():
    run = {name: values for name, values in RUNS["hacked"].items() if name != "true_score"}
    steps, lines = watch(PPO_ALARMS, run)
    assert lines == [] and "alarm/reward_hacking" not in steps[-1]


def test_a_policy_that_forgets_to_stop_raises_the_length_and_the_kl():
    # Measured in a run with a reward model that liked length: from 29 to 65 nats and from 8 to 12 tokens of 12 in ten
    # steps, every answer cut at the limit. Here it follows the healthy run.
    kl = [*RUNS["healthy"]["kl"], *(3.6 + 0.18 * step for step in range(10))]
    cut = [*RUNS["healthy"]["truncated_rate"], *(min(1.0, 0.1 + 0.1 * step) for step in range(10))]
    steps, lines = watch(PPO_ALARMS, {"kl": kl, "truncated_rate": cut})
    # The mean of five steps passes 0.5 nats with the first step, and a quarter of the answers with the fifth.
    assert raised(steps, "kl") == list(range(41, 51))
    assert raised(steps, "truncated") == list(range(45, 51))
    assert [line.split(",")[1].split(":")[0].strip() for line in lines] == ["kl", "truncated"]
    assert "--generate_max_len" in lines[1]


def test_an_entropy_far_below_that_of_the_start_is_a_collapse():
    entropy = RUNS["healthy"]["entropy"] + [0.004] * 6
    steps, lines = watch(PPO_ALARMS, {"entropy": entropy})
    assert raised(steps, "entropy_collapse") == [45, 46]
    assert len(lines) == 1 and "--actor_learning_rate" in lines[0]


@pytest.mark.parametrize(("name", "metric", "bad"), [
    ("zero_variance_groups", "zero_variance_groups", 0.9),
    ("critic", "explained_variance", -0.8),
])  # fmt: skip
def test_groups_that_teach_nothing_and_a_critic_that_misleads_are_said(name, metric, bad):
    steps, lines = watch(PPO_ALARMS, {metric: [bad] * WINDOW})
    assert raised(steps, name)[-1] == WINDOW and len(lines) == 1


def test_the_loss_of_a_fine_tuning_that_works_raises_no_alarm_and_one_that_rises_does():
    losses = RUNS["sft"]["gpt_loss"]
    assert watch(loss_alarms("gpt_loss"), {"gpt_loss": losses})[1] == []
    steps, lines = watch(loss_alarms("gpt_loss"), {"gpt_loss": losses[::-1]})
    assert raised(steps, "loss_rising")[-1] == len(losses)
    assert len(lines) == 1 and "--learning_rate" in lines[0]


def test_a_condition_that_comes_back_soon_is_the_same_episode_and_later_a_new_one():
    high, low = [0.9] * 5, [0.0]
    _, lines = watch(PPO_ALARMS, {"truncated_rate": high + low * 8 + high})
    assert len(lines) == 1
    _, lines = watch(PPO_ALARMS, {"truncated_rate": high + low * (QUIET_AFTER + 8) + high})
    assert len(lines) == 2


def test_a_step_without_the_metric_or_with_one_that_is_not_finite_is_passed_over():
    lines: list[str] = []
    callback = Alarms(PPO_ALARMS, lines.append)
    for step in range(10):
        metrics = {"kl": float("nan")} if step % 2 else {}
        callback.on_step_end(Loop(step), metrics)
        assert metrics.get("alarm/kl", 0.0) == 0.0
    assert lines == []


@pytest.mark.parametrize("cut", [5, 23, 30])
def test_a_resumed_run_raises_what_the_whole_run_raises(cut):
    whole, lines = watch(PPO_ALARMS, RUNS["hacked"])
    halves = [
        {name: values[part] for name, values in RUNS["hacked"].items()} for part in (slice(cut), slice(cut, None))
    ]
    said: list[str] = []
    first = Alarms(PPO_ALARMS, said.append)
    steps, _ = watch(PPO_ALARMS, halves[0], first)
    second = Alarms(PPO_ALARMS, said.append)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    more, _ = watch(PPO_ALARMS, halves[1], second)
    assert steps + more == whole
    assert len(said) == len(lines) == 1
