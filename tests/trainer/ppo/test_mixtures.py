"""PPO on a mixture of experts: the load-balancing loss joins those of the policy and the critic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openrlhf.config.ppo import AlgorithmConfig, PPOModelConfig
from openrlhf.trainer.ppo.buffer import blank_experience
from openrlhf.trainer.ppo.workers import CriticWorker, PolicyWorker
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import local_loop, solo_strategy, tiny_ppo_config
from tests.trainer.ppo.test_workers import experiences

COEF = 0.25


def mixture_config(folder, coef=COEF):
    path = folder / "policy"
    if not path.is_dir():
        tiny_folder(path, "mixtral", num_local_experts=4, num_experts_per_tok=2)
    model = PPOModelConfig(pretrain=str(path), aux_loss_coef=coef)
    return tiny_ppo_config(folder, model=model, algorithm=AlgorithmConfig(advantage_estimator="gae"))


@pytest.mark.parametrize("worker_class", [PolicyWorker, CriticWorker])
def test_the_loss_of_a_micro_batch_holds_its_share_of_balancing(tmp_path, worker_class):
    config = mixture_config(tmp_path)
    strategy = solo_strategy(config)
    [batch] = experiences(PolicyWorker(config, strategy, max_steps=1))
    with_aux, without = (
        worker_class(replace(config, model=replace(config.model, aux_loss_coef=coef)), strategy, max_steps=1)
        for coef in (COEF, 0.0)
    )
    own = with_aux.loss(batch, None)
    plain = without.loss(batch, None)
    torch.testing.assert_close(own.loss_sum, plain.loss_sum)
    assert plain.aux_loss == 0 and own.aux_loss > COEF
    loss, metrics = with_aux._whole_loss(batch, None, 3.0)
    torch.testing.assert_close(loss, own.loss_sum + 3.0 * own.aux_loss)
    assert metrics["aux_loss"][1] == 1
    blank, counted = with_aux._whole_loss(blank_experience(), None, 3.0)
    assert blank == 0 and counted["aux_loss"] == (0, 0)


def test_a_run_logs_the_balance_of_both_models(tmp_path):
    loop, recorder = local_loop(mixture_config(tmp_path), prompts=8)
    loop.fit()
    assert recorder.steps[0]["actor_aux_loss"] > COEF and recorder.steps[0]["critic_aux_loss"] > COEF
