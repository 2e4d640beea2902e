"""Whole runs in one process: learning, evaluation, KL control, resume."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch

from openrlhf.config.groups import CheckpointConfig, LoggingConfig
from openrlhf.config.ppo import EvalConfig, PPOModelConfig, PPOOptimConfig, RewardConfig
from openrlhf.device import seed_everything
from openrlhf.errors import DataError, NumericError, Preempted, UsageError
from openrlhf.rollout.types import SamplingParams
from openrlhf.strategy import signals
from openrlhf.trainer.alarms import PPO_ALARMS, Alarms
from openrlhf.trainer.callbacks import Callbacks
from openrlhf.trainer.ppo.experience import build_kl_controller
from openrlhf.trainer.ppo.groups import LocalGroup
from openrlhf.trainer.ppo.loop import steps_per_episode
from tests.trainer.ppo.harness import (
    NOISY_COUNT,
    local_loop,
    policy_weights,
    reward_file,
    tiny_ppo_config,
    tiny_reward_model,
    with_algorithm,
    with_batch,
    with_rollout,
)


def learning_config(tmp_path, estimator: str, **rollout):
    config = with_rollout(
        tiny_ppo_config(tmp_path), num_episodes=15, rollout_batch_size=32, generate_max_len=8, **rollout
    )
    optim = PPOOptimConfig(actor_learning_rate=1e-2, critic_learning_rate=1e-2)
    config = with_batch(replace(config, optim=optim), train_batch_size=32, micro_train_batch_size=16)
    return with_algorithm(config, advantage_estimator=estimator, lambd=0.95, init_kl_coef=0.001)


GRPO = {"use_kl_loss": True, "kl_estimator": "k3"}
LEARNING = [
    ("gae", 1, {}),
    pytest.param("reinforce", 1, {}, marks=pytest.mark.full),
    pytest.param("reinforce_baseline", 2, {}, marks=pytest.mark.full),
    pytest.param("rloo", 2, {}, marks=pytest.mark.full),
    pytest.param("group_norm", 2, GRPO, marks=pytest.mark.full),
    ("dr_grpo", 2, {"policy_loss_type": "cispo", "loss_reduction": "sequence", "entropy_loss_coef": 0.001}),
    ("group_norm", 2, {"policy_loss_type": "gspo", **GRPO}),
    ("remax", 2, {}),
]


@pytest.mark.parametrize(("estimator", "samples", "flags"), LEARNING)
def test_the_reward_rises(tmp_path, estimator, samples, flags):
    config = with_algorithm(learning_config(tmp_path, estimator, n_samples_per_prompt=samples), **flags)
    loop, recorder = local_loop(config, prompts=32)
    loop.fit()
    rewards = [step["reward"] for step in recorder.steps]
    assert len(rewards) == 15
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.75
    assert all(step["sync_gap_max"] < 1e-4 for step in recorder.steps)
    wanted = {"policy_loss", "actor_lr", "kl", "reward", "return", "response_length", "total_length", "clip_fraction"}
    times = {f"time/{phase}" for phase in ("generate", "make_experience", "train", "sync", "step")}
    critic = {"critic_loss", "values", "critic_lr"} if estimator == "gae" else set()
    groups = {"zero_variance_groups"} if loop.config.algorithm.estimator.needs_group else set()
    parts = {"kl_loss"} if "use_kl_loss" in flags else set()
    parts |= {"policy_entropy"} if "entropy_loss_coef" in flags else set()
    assert wanted | times | critic | groups | parts <= set(recorder.steps[0])


def test_a_learned_reward_is_the_sum_on_the_last_token_less_the_kl(tmp_path):
    config = tiny_ppo_config(tmp_path)
    model = PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=tiny_reward_model(tmp_path / "rm"))
    config = replace(with_algorithm(config, advantage_estimator="gae", init_kl_coef=0.5), model=model)
    loop, recorder = local_loop(with_rollout(replace(config, reward=RewardConfig()), num_episodes=2))
    loop.fit()
    for step in recorder.steps:
        per_sample = step["kl"] * step["response_length"]
        assert step["return"] == pytest.approx(step["reward"] - 0.5 * per_sample, abs=1e-5)
    assert recorder.steps[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert recorder.steps[-1]["kl"] != 0.0


def test_the_adaptive_coefficient_follows_the_measured_kl_once_a_rollout(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), init_kl_coef=0.1, kl_target=0.05)
    loop, recorder = local_loop(with_rollout(config, num_episodes=3))
    loop.fit()
    expected = 0.1
    for step in recorder.steps:
        assert step["kl_coef"] == pytest.approx(expected)
        expected *= 1 + min(max(step["kl"] / 0.05 - 1, -0.2), 0.2) * 8 / 10000
    assert loop.maker.kl_controller.value == pytest.approx(expected)
    assert build_kl_controller(with_algorithm(config, kl_target=None)).value == 0.1


def test_the_actor_waits_while_it_is_frozen(tmp_path):
    config = with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae", freezing_actor_steps=1)
    loop, recorder = local_loop(config)
    loop.fit()
    first, second = recorder.steps
    assert "policy_loss" not in first and "critic_loss" in first
    assert "policy_loss" in second
    assert second["kl"] == pytest.approx(0.0, abs=1e-6)


def test_without_a_critic_nothing_is_frozen(tmp_path):
    loop, recorder = local_loop(with_algorithm(tiny_ppo_config(tmp_path), freezing_actor_steps=5), prompts=8)
    loop.fit()
    assert ["policy_loss" in step for step in recorder.steps] == [True]


def test_evaluation_before_and_after_leaves_figures_and_samples(tmp_path):
    config = tiny_ppo_config(tmp_path)
    evaluation = EvalConfig(eval_temperature=(1.0, 0.0), eval_reward_func=reward_file(tmp_path))
    loop, recorder = local_loop(replace(config, evaluation=evaluation), eval_prompts=3)
    loop.fit()
    assert [step for step, _ in recorder.evaluations] == [0, 2]
    assert {"true_score_t1", "true_score_t0", "reward_t1", "reward_t0"} <= set(recorder.evaluations[0][1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["when"] for line in lines] == ["before"] * 6 + ["train"] * 16 + ["after"] * 6
    before, after = ([line["prompt"] for line in lines if line["when"] == when] for when in ("before", "after"))
    assert before == after
    assert all(line["true_score"] == line["reward"] for line in lines)
    assert "true_score" in recorder.steps[0]


def test_the_true_score_is_never_trained_on(tmp_path):
    config = tiny_ppo_config(tmp_path)
    plain, _ = local_loop(config)
    plain.fit()
    watched, _ = local_loop(replace(config, evaluation=EvalConfig(eval_reward_func=config.reward.remote_rm_url)))
    watched.fit()
    for name, weight in policy_weights(plain).items():
        assert torch.equal(weight, policy_weights(watched)[name])


@pytest.mark.parametrize(("estimator", "flags"), [("gae", {}), ("reinforce", {}), ("group_norm", GRPO)])
def test_a_resumed_run_repeats_what_was_cut_off(tmp_path, estimator, flags):
    config = with_rollout(tiny_ppo_config(tmp_path), num_episodes=2, n_samples_per_prompt=2)
    config = with_algorithm(config, advantage_estimator=estimator, kl_target=0.05, **flags)
    whole, recorder = local_loop(config)
    whole.fit()

    config = replace(config, checkpoint=replace(config.checkpoint, save_steps=2))
    broken, first = local_loop(config, stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        broken.fit()
    resumed = replace(config, checkpoint=replace(config.checkpoint, load_checkpoint=True))
    loop, second = local_loop(resumed)
    loop.fit()

    assert [step["step"] for step in second.steps] == [3, 4]
    timed = {name for name in recorder.steps[0] if name.startswith("time/")}
    for one, other in zip(recorder.steps, [*first.steps[:2], *second.steps], strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}
    for name, weight in policy_weights(whole).items():
        assert torch.equal(weight, policy_weights(loop)[name])
    lines = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [step for step in (1, 2, 3, 4) for _ in range(16)]


class AskingEngine:
    """The engine of a loop; the run is asked to stop when it generates for the ``asked_at``-th time."""

    def __init__(self, engine, asked_at: int):
        self.engine, self.asked_at, self.calls = engine, asked_at, 0

    def generate(self, prompts, sampling):
        self.calls += 1
        if self.calls == self.asked_at:
            signals.ask("SIGTERM")
        return self.engine.generate(prompts, sampling)

    def sleep(self):
        self.engine.sleep()

    def wake_up(self, part):
        self.engine.wake_up(part)


# The 1st generation is the evaluation before, then come step 1, its evaluation, step 2 and so on.
@pytest.mark.parametrize(("asked_at", "done"), [(2, 0), (3, 1), (6, 2), (9, 4)])
def test_asked_to_stop_it_drops_the_rollout_and_goes_on_bit_for_bit(tmp_path, monkeypatch, asked_at, done):
    config = with_rollout(tiny_ppo_config(tmp_path), num_episodes=2)
    evaluation = EvalConfig(eval_temperature=(1.0,))
    config = replace(config, evaluation=evaluation, logging=replace(config.logging, eval_steps=1))
    whole, recorder = local_loop(config, eval_prompts=4)
    whole.fit()
    lines = (tmp_path / "run" / "samples.jsonl").read_text()

    monkeypatch.setattr(signals, "_state", signals._State())
    stopped, first = local_loop(config, eval_prompts=4)
    stopped.collector.engine = stopped.evaluator.engine = AskingEngine(stopped.collector.engine, asked_at)
    with pytest.raises(Preempted, match=f"stopped by SIGTERM after step {done}; "):
        stopped.fit()
    monkeypatch.setattr(signals, "_state", signals._State())
    resumed = replace(config, checkpoint=replace(config.checkpoint, load_checkpoint=True))
    loop, second = local_loop(resumed, eval_prompts=4)
    loop.fit()

    assert (len(second.steps), loop.global_step) == (4 - done, 4)
    evaluated = dict(first.evaluations + second.evaluations)
    assert evaluated == dict(recorder.evaluations)
    for name, weight in policy_weights(whole).items():
        assert torch.equal(weight, policy_weights(loop)[name])
    assert (tmp_path / "run" / "samples.jsonl").read_text() == lines


class AskingReward:
    """The reward function of a loop; a signal interrupts it when it has scored for the ``asked_at``-th time."""

    def __init__(self, function, asked_at: int):
        self.function, self.asked_at, self.calls = function, asked_at, 0

    def score(self, *columns, **named):
        result = self.function.score(*columns, **named)
        self.calls += 1
        if self.calls == self.asked_at:
            signals.ask("SIGTERM")
            raise KeyboardInterrupt
        return result


def kept_steps(folder):
    """Return the state and the score of every checkpoint in ``folder``, and whose exports are there."""
    found = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/manifest.json")}
    steps = {name: (manifest["state"], manifest["score"]) for name, manifest in found.items()}
    return steps, {path.name for path in folder.glob("*_hf")}


# Each evaluation scores at two temperatures: calls 1-2 before, 3 step 1, 4-5 its evaluation, 6 step 2 and so on.
@pytest.mark.parametrize(("asked_at", "every"), [(4, 1), (6, 2)], ids=["evaluation", "rollout"])
def test_a_reward_function_draws_the_same_random_numbers_again_when_what_it_scored_was_dropped(
    tmp_path, monkeypatch, asked_at, every
):
    config = replace(
        with_rollout(tiny_ppo_config(tmp_path), num_episodes=1),
        reward=RewardConfig(remote_rm_url=reward_file(tmp_path, NOISY_COUNT)),
        evaluation=EvalConfig(eval_temperature=(1.0, 0.5)),
        logging=LoggingConfig(run_path=str(tmp_path / "run"), eval_steps=1),
    )
    files = replace(config.checkpoint, save_steps=every, save_hf_ckpt=True)

    def loop_in(name, **flags):
        monkeypatch.setattr(signals, "_state", signals._State())
        seed_everything(1)
        place = replace(files, ckpt_path=str(tmp_path / name), **flags)
        return local_loop(replace(config, checkpoint=place), eval_prompts=4)

    whole, recorder = loop_in("whole")
    whole.fit()
    stopped, first = loop_in("part")
    stopped.maker.rater.reward_function = AskingReward(stopped.maker.rater.reward_function, asked_at)
    with pytest.raises(Preempted, match="after step 1; "):
        stopped.fit()
    random.seed(99)
    loop, second = loop_in("part", load_checkpoint=True)
    loop.fit()

    rewards = [[step["reward"] for step in steps] for steps in (recorder.steps, second.steps)]
    assert rewards[1] == rewards[0][1:] and len(rewards[0]) == 2
    assert dict(first.evaluations + second.evaluations) == dict(recorder.evaluations)
    (steps, exports), (expected, wanted) = kept_steps(tmp_path / "part"), kept_steps(tmp_path / "whole")
    assert {name: steps[name] for name in expected} == expected and exports == wanted


def test_a_checkpoint_of_other_prompts_is_refused(tmp_path):
    config = tiny_ppo_config(tmp_path)
    config = replace(config, checkpoint=replace(config.checkpoint, save_steps=1))
    loop, _ = local_loop(config)
    loop.fit()
    resumed = replace(config, checkpoint=replace(config.checkpoint, load_checkpoint=True))
    with pytest.raises(UsageError, match="--prompt_data.*16 rows then, 24 now"):
        local_loop(resumed, prompts=24)[0].fit()


def test_a_checkpoint_may_carry_a_model_folder(tmp_path):
    from transformers import AutoModelForCausalLM

    paths = {"save_path": str(tmp_path / "out"), "ckpt_path": str(tmp_path / "ckpt")}
    checkpoint = CheckpointConfig(**paths, save_steps=2, save_hf_ckpt=True, disable_ds_ckpt=True)
    loop, _ = local_loop(replace(tiny_ppo_config(tmp_path), checkpoint=checkpoint))
    loop.fit()
    assert not (tmp_path / "ckpt" / "global_step2").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "ckpt" / "global_step2_hf", dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(saved.state_dict()[name], policy_weights(loop)[f"model.{name}"])


def test_two_runs_with_one_seed_are_equal_and_with_another_are_not(tmp_path):
    config = tiny_ppo_config(tmp_path)
    runs = []
    for seed in (1, 1, 2):
        loop, recorder = local_loop(with_batch(config, seed=seed))
        loop.fit()
        runs.append([(step["reward"], step["policy_loss"]) for step in recorder.steps])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_every_prompt_comes_once_an_episode_and_a_short_step_is_kept(tmp_path):
    config = with_rollout(tiny_ppo_config(tmp_path), num_episodes=2, rollout_batch_size=6)
    loop, _ = local_loop(config, prompts=16)
    seen = []
    for prompts in loop.prompt_batches():
        seen.append([prompt.uid for prompt in prompts])
        assert loop.max_steps == 6 - len(seen) + 1
        loop.stream.position += len(prompts)
    assert [len(step) for step in seen] == [6, 6, 4] * 2
    episodes = [sum(seen[:3], []), sum(seen[3:], [])]
    assert sorted(episodes[0]) == sorted(episodes[1]) == sorted(str(number) for number in range(16))
    assert episodes[0] != episodes[1]
    assert steps_per_episode(config, 16) == 3
    # 2 episodes x (6 + 6 + 4 answers in steps of at most 8).
    assert config.optimizer_steps(16) == 2 * 3
    assert with_batch(config, train_batch_size=4, max_epochs=3).optimizer_steps(16) == 2 * (2 + 2 + 1) * 3


def test_several_passes_over_a_rollout_reuse_its_samples(tmp_path):
    config = with_batch(tiny_ppo_config(tmp_path), max_epochs=3, train_batch_size=4)
    loop, recorder = local_loop(config)
    loop.fit()
    assert recorder.steps[0]["approx_kl"] > 0
    assert all(math.isfinite(step["policy_loss"]) for step in recorder.steps)


@pytest.mark.parametrize("role", ["actor", "critic"])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_change_and_names_the_prompts(tmp_path, role):
    loop, _ = local_loop(with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae"))
    worker = {"actor": loop.roles.policy, "critic": loop.roles.critic}[role].worker
    made = loop.maker.make(*loop.collector.generate(list(loop.prompts[:8]), 0))
    before = {name: weight.clone() for name, weight in worker.engine.named_weights()}
    column = made.shards[0].advantages if role == "actor" else made.shards[0].returns
    column[5] = float("inf")
    with pytest.raises(
        NumericError, match=rf"rollout step 1, {role}, optimizer step 1: the loss is not finite.*prompts .*5"
    ) as caught:
        loop.update(made)
    assert 5 in caught.value.rows
    for name, weight in worker.engine.named_weights():
        assert torch.equal(weight, before[name])


def test_a_step_that_may_be_left_out_is_counted_and_the_run_goes_on(tmp_path):
    config = with_batch(tiny_ppo_config(tmp_path), max_skipped_steps=1, train_batch_size=4, max_epochs=2)
    loop, _ = local_loop(config)
    made = loop.maker.make(*loop.collector.generate(list(loop.prompts[:8]), 0))
    before = policy_weights(loop)
    made.shards[0].advantages[5] = float("inf")
    metrics = loop.update(made)
    # Two passes of two steps: the one with sample 5 is left out in each.
    assert metrics["actor_skipped_steps"] == 2.0
    assert math.isfinite(metrics["policy_loss"]) and math.isfinite(metrics["actor_grad_norm"])
    after = policy_weights(loop)
    assert all(weight.isfinite().all() for weight in after.values())
    assert any(not torch.equal(after[name], before[name]) for name in after)
    made.shards[0].advantages[:] = float("nan")
    with pytest.raises(NumericError, match="after 1 steps that --max_skipped_steps left out"):
        loop.update(made)


def test_a_run_remembers_its_alarms_when_it_is_resumed(tmp_path):
    config = tiny_ppo_config(tmp_path)
    checkpoint = replace(config.checkpoint, save_steps=1)
    loop, _ = local_loop(replace(config, checkpoint=checkpoint))
    lines: list[str] = []
    loop.callbacks = Callbacks([Alarms(PPO_ALARMS, lines.append), loop.callbacks])
    loop.fit()
    resumed, _ = local_loop(replace(config, checkpoint=replace(checkpoint, load_checkpoint=True)))
    alarms = Alarms(PPO_ALARMS, lines.append)
    resumed.callbacks = Callbacks([alarms, resumed.callbacks])
    resumed.callbacks.restore(resumed)
    assert alarms.state_dict()["series"]["reward"][0] != []
    assert alarms.state_dict() == loop.state_dict()["callbacks"]["Alarms"]


def test_evaluation_may_come_more_often(tmp_path):
    logging = LoggingConfig(run_path=str(tmp_path / "run"), eval_steps=1)
    loop, recorder = local_loop(replace(tiny_ppo_config(tmp_path), logging=logging), eval_prompts=2)
    loop.fit()
    assert [step for step, _ in recorder.evaluations] == [0, 1, 2]


def test_no_prompts_are_an_error(tmp_path):
    with pytest.raises(DataError, match="no prompts"):
        local_loop(tiny_ppo_config(tmp_path), prompts=0)


class Waited(LocalGroup):
    """A group that writes down when its workers are called and when they are waited for."""

    def __init__(self, worker, name, journal):
        super().__init__(worker)
        self.name, self.journal = name, journal

    def run(self, method, *columns, **common):
        self.journal.append(f"{self.name} {method.__name__}")
        return super().run(method, *columns, **common)

    def get(self, futures):
        self.journal.append(f"{self.name} awaited")
        return super().get(futures)


@pytest.mark.parametrize("shared", [True, False])
def test_actor_and_critic_learn_one_after_the_other_where_they_share_devices(tmp_path, shared):
    loop, _ = local_loop(with_algorithm(tiny_ppo_config(tmp_path), advantage_estimator="gae"), prompts=8)
    experiences = loop.maker.make(loop.collector.engine.generate(loop.prompts, SamplingParams(max_new_tokens=4)))
    journal, roles = [], loop.roles
    loop.roles = replace(
        roles,
        policy=Waited(roles.policy.worker, "actor", journal),
        critic=Waited(roles.critic.worker, "critic", journal),
        shared=shared,
    )
    loop.update(experiences)
    second = "critic awaited" if shared else "actor update"
    assert journal[:2] == ["critic update", second]
