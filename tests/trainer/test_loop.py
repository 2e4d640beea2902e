"""The supervised loop on a model of three numbers: the cut of a batch changes nothing, and nothing bad passes."""

import contextlib
import json
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from openrlhf.config.groups import BatchConfig, CheckpointConfig, DeepSpeedConfig, OptimConfig
from openrlhf.errors import DataError, InfraError, NumericError, Preempted, UsageError
from openrlhf.strategy import signals
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer import loop as loop_file
from openrlhf.trainer.alarms import Alarms, loss_alarms
from openrlhf.trainer.callbacks import Callback, Evaluation
from openrlhf.trainer.checkpointing import Checkpointing
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
    """Brings a weighted mean of squares down; the run is asked to stop in the forward of number ``asked_at``."""

    asked_at, forwards = None, 0

    def weight(self, batch):
        return batch.weights.sum()

    def compute_loss(self, batch):
        self.forwards += 1
        if self.forwards == self.asked_at:
            signals.ask("SIGTERM")
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


def checkpointing(strategy, folder, said=None, **flags):
    """Return the callback that saves to ``folder``; its export writes one file."""
    config = CheckpointConfig(ckpt_path=str(folder), **flags)
    say = (said if said is not None else []).append
    manager = CheckpointManager(config, strategy.comm, layout=strategy.layout, say=say)

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


def test_nothing_is_saved_where_both_parts_are_switched_off(strategy, tmp_path):
    toy(strategy, callbacks=[checkpointing(strategy, tmp_path, save_steps=1, disable_ds_ckpt=True)])[0].fit()
    assert list(tmp_path.iterdir()) == []


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


def test_a_position_in_other_data_is_refused(strategy):
    trainer, _ = toy(strategy)
    other, _ = toy(strategy, ToyData(11))
    with pytest.raises(UsageError, match="^--dataset: .*10 rows then, 11 now.*--allow_config_change"):
        other.load_state_dict(trainer.state_dict())


@pytest.fixture
def unasked(monkeypatch):
    """Nobody has asked this process to stop, and nobody will have after the test."""
    monkeypatch.setattr(signals, "_state", signals._State())
    return lambda: monkeypatch.setattr(signals, "_state", signals._State())


# Forwards 1-5 are step 1, 6-10 step 2, 11-13 its evaluation, 14-18 step 3, 19-23 step 4, 24-26 its evaluation.
@pytest.mark.parametrize(
    ("asked_at", "done", "left"),
    [(3, 0, 26), (8, 1, 21), (10, 2, 16), (12, 2, 16), (13, 2, 13), (21, 3, 8), (26, 4, 0)],
)
def test_asked_to_stop_anywhere_it_saves_the_last_whole_step_and_goes_on_bit_for_bit(
    strategy, tmp_path, monkeypatch, unasked, asked_at, done, left
):
    monkeypatch.setattr(loop_file, "LONG_STEP_S", -1.0)
    data = {"batch": 5, "micro": 1, "dropout": 0.5, "eval_data": ToyData(3)}
    whole, steps = toy(strategy, **data, callbacks=[Evaluation(2)])
    whole.fit()
    for load in (False, True):
        unasked()
        saving = checkpointing(strategy, tmp_path, load_checkpoint=load)
        part, rest = toy(strategy, **data, callbacks=[Evaluation(2), saving])
        if not load:
            part.asked_at, first = asked_at, rest
            with pytest.raises(Preempted, match=f"stopped by SIGTERM after step {done}; ") as stop:
                part.fit()
            assert ("--load_checkpoint" in str(stop.value)) == bool(done)
    part.fit()
    assert torch.equal(weights_of(part), weights_of(whole))
    assert part.forwards == left
    assert timeless(first.steps + rest.steps) == timeless(steps.steps)


def timeless(rows):
    pace = ("tokens_per_second", "time/step")
    return [{name: value for name, value in row.items() if name not in pace} for row in rows]


def test_a_step_that_is_saved_already_is_not_saved_again(strategy, tmp_path, unasked):
    class AskAfter(Callback):
        def on_step_end(self, trainer, metrics):
            if trainer.global_step == 2:
                signals.ask("SIGTERM")

    trainer, _ = toy(strategy, callbacks=[checkpointing(strategy, tmp_path, save_steps=2), AskAfter()])
    saved = []
    monitor = trainer.engine.save
    trainer.engine.save = lambda folder: (saved.append(folder.parent.name), monitor(folder))
    with pytest.raises(Preempted, match="after step 2; saved step 2"):
        trainer.fit()
    assert saved == ["global_step2.tmp"]


def saved_steps(folder):
    """Return what the manifests in ``folder`` say of the run, and whose exports are there."""
    kept = ("state", "score", "files")
    manifests = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/manifest.json")}
    steps = {name: {part: manifest[part] for part in kept} for name, manifest in manifests.items()}
    marks = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*_hf/.openrlhf-export.json")}
    return steps, marks


@pytest.mark.parametrize(("asked_at", "before"), [(12, 1), (25, 2)], ids=["in the middle", "after the last step"])
def test_a_step_whose_evaluation_was_broken_off_is_saved_again_as_in_the_whole_run(
    strategy, tmp_path, unasked, asked_at, before
):
    data = {"batch": 5, "micro": 1, "dropout": 0.5, "eval_data": ToyData(3)}
    flags = {"save_steps": 2, "save_hf_ckpt": True}
    saving = checkpointing(strategy, tmp_path / "whole", **flags)
    toy(strategy, **data, callbacks=[Evaluation(2), saving])[0].fit()
    for load in (False, True):
        unasked()
        saving = checkpointing(strategy, tmp_path / "part", load_checkpoint=load, **flags)
        part, _ = toy(strategy, **data, callbacks=[Evaluation(2), saving])
        if not load:
            part.asked_at = asked_at
            with pytest.raises(Preempted):
                part.fit()
            left = saved_steps(tmp_path / "part")
            assert left[0][f"global_step{2 * before}"]["score"] is None and len(left[1]) == before - 1
    part.fit()
    assert saved_steps(tmp_path / "part") == saved_steps(tmp_path / "whole")


def test_a_step_that_is_not_due_is_not_saved_again_when_its_evaluation_is_done(strategy, tmp_path, unasked):
    data = {"batch": 5, "micro": 1, "eval_data": ToyData(3)}
    for load in (False, True):
        unasked()
        saving = checkpointing(strategy, tmp_path, load_checkpoint=load, save_steps=3)
        part, _ = toy(strategy, **data, callbacks=[Evaluation(2), saving])
        if not load:
            part.asked_at = 12
            with pytest.raises(Preempted):
                part.fit()
    part.fit()
    assert saved_steps(tmp_path)[0]["global_step2"]["score"] is None


def test_an_evaluation_that_was_broken_off_is_forgotten_without_rows_to_evaluate(strategy):
    trainer, _ = toy(strategy, eval_data=ToyData(3))
    trainer.position.evaluating = True
    other, _ = toy(strategy)
    other.load_state_dict(trainer.state_dict())
    other.fit()
    assert not other.evaluating and other.global_step == 6


def test_asked_to_stop_without_checkpoints_it_says_that_nothing_is_left(strategy, tmp_path, unasked):
    trainer, _ = toy(strategy, callbacks=[checkpointing(strategy, tmp_path, disable_ds_ckpt=True)])
    trainer.asked_at = 5
    with pytest.raises(Preempted, match="nothing was saved to go on from"):
        trainer.fit()
    assert list(tmp_path.iterdir()) == []


def changed_row():
    data = ToyData()
    data.inputs[3, 1] += 1
    return data


def test_one_changed_row_is_noticed_and_may_be_allowed(strategy):
    saved = toy(strategy)[0].state_dict()
    same, other = toy(strategy)[0], toy(strategy, changed_row())[0]
    same.load_state_dict(saved)
    with pytest.raises(UsageError, match=r"--dataset.*10 rows then, 10 now"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, allow_change=True)


def test_a_position_is_never_carried_over_to_epochs_of_another_length(strategy):
    saved = toy(strategy)[0].state_dict()
    with pytest.raises(UsageError, match="3 steps and now has 4.*--pretrain"):
        toy(strategy, ToyData(14))[0].load_state_dict(saved, allow_change=True)
    with pytest.raises(UsageError, match="3 steps and now has 2.*--pretrain"):
        toy(strategy, batch=5)[0].load_state_dict(saved)


class RowsSeen(Callback):
    """Keeps the rows that every step learns from."""

    def __init__(self):
        self.rows = []

    def on_start(self, trainer):
        collate = trainer.train_data.collate
        trainer.train_data.collate = lambda items: (
            self.rows.append([row[1].item() for row in items]),
            collate(items),
        )[1]


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
def test_a_resumed_run_learns_from_each_row_in_the_order_of_the_whole_one(strategy, tmp_path, cut):
    """Step 3 is the last of an epoch of 3: the next run begins with the next epoch, and no step comes twice."""
    whole, seen = RowsSeen(), []
    toy(strategy, callbacks=[whole])[0].fit()
    for last, load in ((cut, False), (None, True)):
        part = RowsSeen()
        saving = checkpointing(strategy, tmp_path, save_steps=1, load_checkpoint=load)
        with contextlib.suppress(Cut):
            toy(strategy, callbacks=[saving, part, CutAfter(last)])[0].fit()
        seen += part.rows
    assert seen == whole.rows and len(whole.rows) == 2 * (2 + 2 + 1)


def test_a_finished_run_says_so_and_may_be_made_longer(strategy, tmp_path):
    said = []
    for epochs, load in ((2, False), (2, True), (3, True)):
        saving = checkpointing(strategy, tmp_path, said, save_steps=3, load_checkpoint=load)
        trainer, recorder = toy(strategy, epochs=epochs, callbacks=[saving])
        trainer.fit()
        said.append(len(recorder.steps))
    done = "all 6 steps of this run are done: there is nothing left to train"
    resuming = f"resuming from {tmp_path / 'global_step6'}"
    assert said == [6, resuming, done, 0, resuming, 3]


class Evaluations(Callback):
    """Gives the steps the evaluations that the test wants; runs before checkpoints are saved."""

    def __init__(self, values):
        self.values = values

    def on_step_end(self, trainer, metrics):
        trainer.callbacks.on_evaluate(trainer, {"eval_loss": self.values[trainer.global_step]})


def test_the_best_step_stays_also_after_a_resume_and_is_named_at_the_end(strategy, tmp_path):
    said = []
    values = {1: 0.5, 2: 0.1, 3: float("nan"), 4: 0.4, 5: 0.3, 6: 0.2}
    for last, load, kept in ((4, False, [2, 4]), (None, True, [2, 6])):
        saving = checkpointing(
            strategy, tmp_path, said, save_steps=1, max_ckpt_num=2, save_hf_ckpt=True, load_checkpoint=load
        )
        with contextlib.suppress(Cut):
            toy(strategy, callbacks=[Evaluations(values), saving, CutAfter(last)])[0].fit()
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"global_step{step}{end}" for step in kept for end in ("", "_hf")]
    assert said[-1] == f"best of the steps kept: {tmp_path / 'global_step2'} (eval_loss 0.1)"


def test_a_run_whose_checkpoints_would_fill_the_disk_stops_before_its_first_step(strategy, tmp_path, monkeypatch):
    trainer, recorder = toy(strategy, callbacks=[checkpointing(strategy, tmp_path, save_steps=1)])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(InfraError, match=r"4 x 0.0 MiB \(at most 3 kept and one being written\).*--max_ckpt_num 3"):
        trainer.fit()
    assert recorder.steps == [] and trainer.global_step == 0
