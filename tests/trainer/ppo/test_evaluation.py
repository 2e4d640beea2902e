"""How well the reward agrees with the true score."""

import json
from dataclasses import replace

import pytest

from openrlhf.config.ppo import EvalConfig
from openrlhf.errors import UsageError
from openrlhf.rollout.types import Prompt
from openrlhf.trainer.ppo.evaluation import pair_accuracy, pass_rates
from tests.trainer.ppo.harness import local_loop, rollout_of, tiny_ppo_config


@pytest.mark.parametrize(
    ("scores", "true_scores", "expected"),
    [
        ([3.0, 1.0, 2.0], [1.0, 0.0, 0.0], 1.0),
        ([1.5, 1.0, 2.0], [1.0, 0.0, 0.0], 0.5),
        ([1.0, 1.0], [1.0, 0.0], 0.5),
        ([0.0, 1.0, 2.0], [1.0, 0.5, 0.0], 0.0),
    ],
)
def test_pair_accuracy_counts_the_pairs_in_the_right_order(scores, true_scores, expected):
    assert pair_accuracy(scores, true_scores) == expected


def test_pair_accuracy_says_nothing_when_all_answers_are_alike():
    assert pair_accuracy([1.0, 2.0], [1.0, 1.0]) is None


def test_pass_rates_are_those_of_each_source():
    sources = ["math", "code", "math"]
    rollouts = [rollout_of(Prompt(str(n), "p", (1,), "", name), [5]) for n, name in enumerate(sources) for _ in (0, 1)]
    found = pass_rates(rollouts, [1.0, 0.0, 0.0, 0.0, 0.0, 0.5], 2)
    assert found == {
        "eval_math_pass1": 0.375,
        "eval_math_pass2": 0.75,
        "eval_code_pass1": 0.0,
        "eval_code_pass2": 0.0,
    }
    assert pass_rates(rollouts[::2], [1.0, 0.0, 0.5], 1) == {"eval_math_pass1": 0.75, "eval_code_pass1": 0.0}


def evaluated(tmp_path, **evaluation):
    config = tiny_ppo_config(tmp_path)
    config = replace(config, evaluation=EvalConfig(eval_temperature=(1.0, 0.0), **evaluation))
    config = replace(config, checkpoint=replace(config.checkpoint, save_steps=1))
    loop, recorder = local_loop(config, prompts=8, eval_prompts=3)
    loop.fit()
    return loop, recorder.evaluations[-1][1], json.loads((tmp_path / "ckpt/global_step1/manifest.json").read_text())


def test_the_best_checkpoint_goes_by_the_figure_that_is_named(tmp_path):
    _, values, manifest = evaluated(tmp_path, eval_n_samples_per_prompt=4, best_metric_key="eval_default_pass4_t0")
    assert values["eval_default_pass1"] == pytest.approx(values["reward_t1"])
    assert values["eval_default_pass4"] >= values["eval_default_pass1"]
    # Greedy answers to one prompt are all alike.
    assert values["eval_default_pass4_t0"] == pytest.approx(values["eval_default_pass1_t0"])
    assert manifest["score"] == ["eval_default_pass4_t0", values["eval_default_pass4_t0"], True]


def test_without_a_figure_no_checkpoint_is_best_and_an_unknown_one_is_refused_at_the_first_evaluation(tmp_path):
    assert evaluated(tmp_path, best_metric_key="none")[2]["score"] is None
    with pytest.raises(UsageError, match="--best_metric_key pass9: the evaluation gives eval_default_pass1, .*rew"):
        evaluated(tmp_path, best_metric_key="pass9")
