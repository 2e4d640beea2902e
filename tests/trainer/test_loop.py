"""The supervised loop on a model of three numbers: the cut of a batch changes nothing, and nothing bad passes."""

import contextlib
import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from openrlhf.config.groups import BatchConfig, CheckpointConfig, DeepSpeedConfig, OptimConfig
from openrlhf.errors import DataError, NumericError, UsageError
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.alarms import Alarms, loss_alarms
from openrlhf.trainer.callbacks import Callback, Checkpointing
from openrlhf.trainer.loop import StepOutput, Trainer, total_steps


@dataclass
class Rows:
    """A batch of the toy: inputs ``(B, 3)``, weights ``(B,)``."""

    inputs: torch.Tensor
    weights: torch.Tensor

    @property
    def attention_mask(self):
        return torch.ones(len(self.inputs), 3)

    def to(self, device):
        return Rows(self.inputs.to(device), self.weights.to(device))


class ToyData:
    """Rows of three numbers, each with a weight; row ``poisoned`` is not a number."""

    def __init__(self, n_rows=10, poisoned=None, weights=None):
        self.inputs = torch.randn(n_rows, 3, generator=torch.Generator().manual_seed(0))
        self.weights = torch.arange(1.0, n_rows + 1) if weights is None else weights
        if poisoned is not None:
            self.inputs[poisoned] = float("nan")

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, row):
        return self.inputs[row], self.weights[row]

    def collate(self, rows):
        rows = rows or [(torch.ones(3), torch.tensor(1.0))]
        return Rows(torch.stack([inputs for inputs, _ in rows]), torch.stack([weight for _, weight in rows]))


class ToyTrainer(Trainer):
    """Brings a weighted mean of squares down."""

    def weight(self, batch):
        return batch.weights.sum()

    def compute_loss(self, batch):
        loss = (batch.weights * self.engine(batch.inputs).squeeze(-1).square()).sum()
        return StepOutput(loss, loss.new_zeros(()), {"loss": (loss, batch.weights.sum())})


class Recorder(Callback):
    """Keeps the metrics of every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, trainer, metrics):
        self.steps.append(metrics)


@pytest.fixture(scope="module")
def strategy():
    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=0), bf16=False, micro_batch_size=1)
    # DeepSpeed keeps the first process group it sees: it stays open for the other tests of this process.
    strategy.setup_distributed()
    return strategy


class Cut(Exception):
    """Stands for whatever ends a run early."""


class CutAfter(Callback):
    """Ends the run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, trainer, metrics):
        if trainer.global_step == self.step:
            raise Cut


def toy(strategy, data=None, micro=2, batch=4, epochs=2, eval_data=(), dropout=0.0, callbacks=()):
    data = data or ToyData()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(dropout))
    config = BatchConfig(micro_train_batch_size=micro, train_batch_size=batch, max_epochs=epochs, seed=1)
    optim = OptimConfig(learning_rate=0.1, lr_warmup_ratio=0.0)
    engine = strategy.prepare_train(model, optim, total_steps(len(data), config))
    recorder = Recorder()
    return ToyTrainer(engine, strategy, data, eval_data, config, [recorder, *callbacks]), recorder


def checkpointing(strategy, folder, **flags):
    """Return the callback that saves to ``folder``; its export writes one file."""
    config = CheckpointConfig(ckpt_path=str(folder), **flags)
    manager = CheckpointManager(config, strategy.comm, layout=strategy.layout, say=lambda line: None)

    def export(path):
        path.mkdir()
        (path / "config.json").write_text("{}")

    return Checkpointing(manager, config, export)


def weights_of(trainer):
    return torch.cat([parameter.detach().flatten() for parameter in trainer.engine.module.parameters()])


def test_a_run_takes_epochs_times_the_rounded_up_steps(strategy):
    trainer, recorder = toy(strategy)
    trainer.fit()
    assert trainer.max_steps == 6 == len(recorder.steps) == trainer.global_step
    assert trainer.position.epoch == 2
    assert trainer.position.consumed_samples == 20


def test_the_loss_goes_down(strategy):
    trainer, recorder = toy(strategy, batch=10, epochs=10)
    trainer.fit()
    assert recorder.steps[-1]["loss"] < 0.5 * recorder.steps[0]["loss"]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_the_cut_into_micro_batches_does_not_change_the_run(strategy, micro):
    whole, expected = toy(strategy, micro=4)
    cut, recorder = toy(strategy, micro=micro)
    whole.fit()
    cut.fit()
    torch.testing.assert_close(weights_of(cut), weights_of(whole), rtol=1e-5, atol=1e-6)
    for step, other in zip(recorder.steps, expected.steps, strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


def test_the_first_step_equals_plain_torch(strategy):
    trainer, recorder = toy(strategy, batch=10, micro=3, epochs=1)
    before = weights_of(trainer).clone().requires_grad_()
    data = trainer.train_data
    loss = (data.weights * (data.inputs @ before[:3] + before[3]).square()).sum() / data.weights.sum()
    loss.backward()
    trainer.fit()
    assert recorder.steps[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert recorder.steps[0]["grad_norm"] == pytest.approx(before.grad.norm().item(), rel=1e-5)


def test_a_step_logs_its_rate_and_its_speed(strategy):
    trainer, recorder = toy(strategy)
    trainer.fit()
    assert set(recorder.steps[0]) == {"loss", "loss_mean", "lr", "grad_norm", "tokens_per_second", "time/step"}
    assert recorder.steps[0]["lr"] == pytest.approx(0.1)
    assert recorder.steps[0]["tokens_per_second"] > 0


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(strategy):
    trainer, _ = toy(strategy, ToyData(poisoned=7), micro=1, batch=10)
    before = weights_of(trainer).clone()
    with pytest.raises(NumericError, match=r"step 1: .* rows \[7\]"):
        trainer.fit()
    assert torch.equal(weights_of(trainer), before)


def test_a_step_without_anything_to_learn_is_an_error(strategy):
    trainer, _ = toy(strategy, ToyData(weights=torch.zeros(10)))
    with pytest.raises(DataError, match="step 1"):
        trainer.fit()


def test_evaluation_covers_every_row_once_and_leaves_training_mode_on(strategy):
    trainer, _ = toy(strategy, eval_data=ToyData(7), micro=2, dropout=0.5)
    trainer.engine.train()
    data, weights = trainer.eval_data, weights_of(trainer)
    squares = (data.inputs @ weights[:3] + weights[3]).square()
    expected = (data.weights * squares).sum() / data.weights.sum()
    assert trainer.evaluate() == {"eval_loss": pytest.approx(expected.item(), rel=1e-5)}
    assert trainer.engine.module.training


def test_a_run_that_is_taken_up_again_does_the_steps_that_are_left(strategy):
    whole, all_steps = toy(strategy)
    whole.fit()
    first, _ = toy(strategy)
    state = {**first.state_dict(), "position": {"epoch": 1, "step": 1, "global_step": 4, "consumed_samples": 14}}
    first.load_state_dict(state)
    first.fit()
    assert first.global_step == 6
    assert first.state_dict()["position"] == whole.state_dict()["position"]


@pytest.mark.parametrize("cut", [3, 4, 5])
def test_a_run_cut_anywhere_and_taken_up_twice_is_the_whole_run_bit_for_bit(strategy, tmp_path, cut):
    whole, _ = toy(strategy, dropout=0.5, epochs=3)
    whole.fit()
    for last, load in ((cut, False), (cut + 3, True), (None, True)):
        saving = checkpointing(strategy, tmp_path, save_steps=2, load_checkpoint=load)
        part, recorder = toy(strategy, dropout=0.5, epochs=3, callbacks=[saving, CutAfter(last)])
        with contextlib.suppress(Cut):
            part.fit()
    assert part.global_step == whole.global_step == 9
    assert len(recorder.steps) == 9 - (cut + 3) // 2 * 2
    assert torch.equal(weights_of(part), weights_of(whole))


def test_checkpoints_and_exports_come_at_their_cadence_and_old_ones_go(strategy, tmp_path):
    saving = checkpointing(strategy, tmp_path, save_steps=2, save_hf_ckpt=True, max_ckpt_num=2)
    toy(strategy, callbacks=[saving])[0].fit()
    kept = {"global_step4", "global_step4_hf", "global_step6", "global_step6_hf"}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_only_the_export_is_written_when_the_other_part_is_switched_off(strategy, tmp_path):
    saving = checkpointing(strategy, tmp_path, save_steps=6, save_hf_ckpt=True, disable_ds_ckpt=True)
    toy(strategy, callbacks=[saving])[0].fit()
    assert [path.name for path in tmp_path.iterdir()] == ["global_step6_hf"]


def test_nothing_is_saved_without_a_cadence(strategy, tmp_path):
    toy(strategy, callbacks=[checkpointing(strategy, tmp_path, save_steps=-1, save_hf_ckpt=True)])[0].fit()
    assert list(tmp_path.iterdir()) == []


def test_alarms_of_a_resumed_run_remember_what_came_before(strategy):
    alarms = [Alarms(loss_alarms("loss"), print) for _ in range(2)]
    first, _ = toy(strategy, callbacks=[alarms[0]])
    first.fit()
    second, _ = toy(strategy, callbacks=[alarms[1]])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert alarms[1].state_dict() == alarms[0].state_dict()
    assert len(alarms[1].state_dict()["series"]["loss"][0]) == 6


def test_a_position_in_other_data_or_batches_is_refused(strategy):
    trainer, _ = toy(strategy)
    other, _ = toy(strategy, ToyData(11), batch=5)
    with pytest.raises(UsageError) as error:
        other.load_state_dict(trainer.state_dict())
    rows, batch = error.value.problems
    assert "with rows 10, this run has 11" in rows
    assert "with train_batch_size 4, this run has 5" in batch
