"""The pair loss on a tiny model, and the scale of its rewards that goes into the config."""

import pytest
import torch

from openrlhf.config.groups import (
    BatchConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
)
from openrlhf.datasets.reward import PreferenceDataset
from openrlhf.models.value_head import ValueModel, load_value_model
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.checkpointing import Checkpointing
from openrlhf.trainer.metrics import Mean
from openrlhf.trainer.reward_model import RewardModelTrainer, reward_scale
from tests.cli.supervised import pairs
from tests.helpers import tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def strategy():
    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=0), bf16=False, micro_batch_size=4)
    # DeepSpeed keeps the first process group it sees: it stays open for the other tests of this process.
    strategy.setup_distributed()
    return strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{**row, "margin": 0.5 * (i % 3)} for i, row in enumerate(pairs(11))]
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return PreferenceDataset(rows, tokenizer, PreferenceDataConfig(prompt_key="prompt"))


def trainer_of(strategy, folder, data, eval_data=(), **flags):
    model = ValueModel(load_value_model(folder, ModelConfig(pretrain=folder)))
    batch = BatchConfig(micro_train_batch_size=4, train_batch_size=8)
    return RewardModelTrainer(
        strategy.prepare_train(model, OptimConfig(), 2), strategy, data, eval_data, batch, **flags
    )


def rewards_of(trainer, data):
    batch = data.collate([data[i] for i in range(len(data))])
    with torch.no_grad():
        return trainer.engine(batch.sequences, batch.attention_mask, read="last").double(), batch.margin.double()


@pytest.mark.parametrize(
    ("flags", "loss_of"),
    [
        ({}, lambda gap, margin: -torch.nn.functional.logsigmoid(gap)),
        ({"margin_loss": True}, lambda gap, margin: -torch.nn.functional.logsigmoid(gap - margin)),
        ({"loss": "logexp", "margin_loss": True}, lambda gap, margin: torch.log1p(torch.exp(-gap))),
    ],
)
def test_the_loss_is_the_mean_over_pairs_of_the_chosen_formula(strategy, folder, data, flags, loss_of):
    trainer = trainer_of(strategy, folder, data, eval_data=data, **flags)
    rewards, margin = rewards_of(trainer, data)
    gap = rewards[: len(data)] - rewards[len(data) :]
    values = trainer.evaluate()
    assert values["eval_loss"] == pytest.approx(loss_of(gap, margin).mean().item(), rel=1e-5)
    assert values["acc_mean"] == pytest.approx((gap > 0).double().mean().item())


def test_evaluation_writes_the_scale_of_all_rewards_into_the_config(strategy, folder, data):
    trainer = trainer_of(strategy, folder, data, eval_data=data)
    rewards, _ = rewards_of(trainer, data)
    values = trainer.evaluate()
    config = trainer.engine.module.config
    assert (config.mean, config.std) == (values["reward_mean"], values["reward_std"])
    assert config.mean == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert config.std == pytest.approx(rewards.std().item(), rel=1e-5)


def test_without_evaluation_rows_the_scale_comes_from_training_pairs(strategy, folder, data):
    trainer = trainer_of(strategy, folder, data)
    trainer.fit()
    rewards, _ = rewards_of(trainer, data)
    assert trainer.engine.module.config.mean == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert trainer.engine.module.config.std == pytest.approx(rewards.std().item(), rel=1e-5)


def test_equal_rewards_have_a_scale_of_one():
    totals = {"chosen_reward": Mean(2.0, 1), "reject_reward": Mean(2.0, 1), "reward_square": Mean(8.0, 2)}
    assert reward_scale(totals) == (2.0, 1.0)


@pytest.mark.parametrize("with_eval", [True, False])
def test_a_run_resumed_after_its_last_step_measures_the_scale(strategy, folder, data, with_eval):
    trainer = trainer_of(strategy, folder, data, eval_data=data if with_eval else ())
    trainer.position.epoch = trainer.batch.max_epochs
    trainer.fit()
    rewards, _ = rewards_of(trainer, data)
    assert trainer.engine.module.config.mean == pytest.approx(rewards.mean().item(), rel=1e-5)
    assert trainer.engine.module.config.std == pytest.approx(rewards.std().item(), rel=1e-5)


def test_an_export_beside_a_checkpoint_has_the_scale_of_its_own_weights(strategy, folder, data, tmp_path):
    config = CheckpointConfig(ckpt_path=str(tmp_path), save_steps=1, save_hf_ckpt=True, disable_ds_ckpt=True)
    scales = []

    def export(path):
        path.mkdir()
        scales.append((trainer.engine.module.config.mean, rewards_of(trainer, data)[0].mean().item()))

    manager = CheckpointManager(config, strategy.comm)
    trainer = trainer_of(strategy, folder, data, data, callbacks=[Checkpointing(manager, config, export)])
    trainer.fit()
    assert len(scales) == 2
    for stored, measured in scales:
        assert stored == pytest.approx(measured, rel=1e-4)
