"""PPO-ptx: texts that are learned in the steps of the policy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from openrlhf.config.ppo import PromptDataConfig
from openrlhf.errors import NumericError, UsageError
from openrlhf.trainer.ppo.texts import PretrainTexts, load_texts
from openrlhf.trainer.ppo.workers import PolicyWorker
from tests.helpers import tiny_tokenizer
from tests.trainer.ppo.harness import (
    local_loop,
    policy_weights,
    solo_strategy,
    tiny_ppo_config,
    with_algorithm,
    with_batch,
    with_rollout,
)
from tests.trainer.ppo.test_workers import experiences

TEXTS = [f"Natalia sold {number} clips" + " in May" * number for number in range(6)]


def config_with_texts(folder, column: str = "text", **flags):
    config = with_batch(tiny_ppo_config(folder), train_batch_size=4, micro_train_batch_size=2)
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in TEXTS), encoding="utf-8")
    return replace(config, prompts=PromptDataConfig(pretrain_data=str(path), **flags))


def resumed(config):
    return replace(config, checkpoint=replace(config.checkpoint, load_checkpoint=True))


def broken_off(config, steps: int) -> None:
    """Run so many steps of ``config`` and save them."""
    config = replace(config, checkpoint=replace(config.checkpoint, save_steps=steps))
    with pytest.raises(KeyboardInterrupt):
        local_loop(config, stop_after=steps)[0].fit()


def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_texts(tmp_path):
    config = with_batch(config_with_texts(tmp_path), train_batch_size=6)
    policy = PolicyWorker(config, solo_strategy(config), max_steps=10)
    model = AutoModelForCausalLM.from_pretrained(config.model.pretrain, dtype=torch.float32)
    losses = []
    for text in TEXTS:
        tokens = torch.tensor(policy.tokenizer.encode(text, add_special_tokens=False))
        losses.append(-model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).flatten())
    found = policy.update(experiences(policy), rollout=1)
    assert found["ptx_loss"] == pytest.approx(float(torch.cat(losses).detach().mean()), rel=1e-5)


def test_every_pass_over_the_texts_reads_each_once_and_the_next_in_another_order(tmp_path):
    config = config_with_texts(tmp_path)
    strategy = solo_strategy(config)
    texts = PretrainTexts(config, strategy, load_texts(config, tiny_tokenizer(tmp_path / "tokenizer")))
    passes = [[row for _ in range(2) for micro in next(texts._coming) for row in micro] for _ in range(2)]
    assert [sorted(rows) for rows in passes] == [list(range(6))] * 2
    assert passes[0] != passes[1]


def test_the_column_text_is_read_or_else_the_one_that_is_named(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    for column, flags in (("text", {"input_key": "prompt"}), ("words", {"input_key": "words"})):
        rows = load_texts(config_with_texts(tmp_path, column, **flags), tokenizer)
        assert [row.text for row in rows] == TEXTS
        assert all(all(row.loss_mask) for row in rows)


def test_a_resumed_run_reads_the_texts_on_where_it_was(tmp_path):
    config = with_rollout(config_with_texts(tmp_path), num_episodes=2)
    whole, recorder = local_loop(config)
    whole.fit()
    broken_off(config, steps=3)
    loop, second = local_loop(resumed(config))
    loop.fit()
    assert [step["ptx_loss"] for step in second.steps] == [step["ptx_loss"] for step in recorder.steps[3:]]
    for name, weight in policy_weights(whole).items():
        assert torch.equal(weight, policy_weights(loop)[name])


def test_texts_keep_what_the_policy_loss_alone_does_not(tmp_path):
    losses = {}
    for coef in (0.0, 5.0):
        config = with_rollout(with_algorithm(config_with_texts(tmp_path), ptx_coef=coef), num_episodes=3)
        loop, recorder = local_loop(config)
        loop.fit()
        losses[coef] = [step["ptx_loss"] for step in recorder.steps]
    assert losses[5.0][-1] < losses[5.0][0] - 0.5
    assert losses[5.0][-1] < losses[0.0][-1] - 0.5


@pytest.mark.parametrize(("before", "now"), [(True, False), (False, True)])
def test_texts_that_come_or_go_at_a_resume_are_said(tmp_path, before, now):
    with_texts = with_rollout(config_with_texts(tmp_path), num_episodes=2)
    without = replace(with_texts, prompts=PromptDataConfig())
    broken_off(with_texts if before else without, steps=1)
    other = resumed(with_texts if now else without)
    with pytest.raises(UsageError, match="--pretrain_data: .* was written with"):
        local_loop(other)[0].fit()
    local_loop(replace(other, checkpoint=replace(other.checkpoint, allow_config_change=True)))[0].fit()


def test_other_texts_at_a_resume_are_refused(tmp_path):
    config = with_rollout(config_with_texts(tmp_path), num_episodes=2)
    broken_off(config, steps=1)
    path = tmp_path / "texts.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("May", "June"), encoding="utf-8")
    with pytest.raises(UsageError, match="--pretrain_data: the rows are not those of the checkpoint"):
        local_loop(resumed(config))[0].fit()


def test_a_text_without_a_finite_loss_is_named(tmp_path):
    config = config_with_texts(tmp_path)
    policy = PolicyWorker(config, solo_strategy(config), max_steps=10)
    made = experiences(policy)
    with torch.no_grad():
        policy.actor.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NumericError, match=r"the loss is not finite on rows \[\d, \d, \d, \d\] of --pretrain_data"):
        policy.update(made, rollout=1)
