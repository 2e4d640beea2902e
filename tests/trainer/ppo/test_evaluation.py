"""How well the reward agrees with the true score."""

import json
from dataclasses import replace

import pytest

from openrlhf.config.ppo import EvalConfig
from openrlhf.errors import UsageError
from openrlhf.rollout.types import Prompt
from openrlhf.trainer.ppo.evaluation import SampleLog, pair_accuracy, pass_rates
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


@pytest.mark.parametrize(("resumed_at", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2])])
def test_the_samples_of_an_interrupted_run_do_not_come_twice(tmp_path, resumed_at, kept):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(3)) + '{"step": 1, "wh')
    SampleLog(path, None).start(resumed_at)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept


def test_pair_accuracy_says_nothing_when_all_answers_are_alike():
    assert pair_accuracy([1.0, 2.0], [1.0, 1.0]) is None


def test_a_disk_that_refuses_the_samples_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    log = SampleLog(tmp_path / "missing" / "samples.jsonl", None)
    log.start(0)
    for step in (1, 2):
        log.write("train", step, [], [], None, 4, 1.0)
    assert log.failures == 3
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{log.path} cannot be written"]


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
