"""A checkpoint is whole or not there, damage is found before anything is loaded, and the newest always stays."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import DataError, InfraError, UsageError
from openrlhf.strategy import files
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm
from tests.strategy import programs
from tests.strategy.ranks import run_ranks

LAYOUT = {"world_size": 1, "zero_stage": 2}


class Killed(BaseException):
    """Stands for a process that ends in the middle of a save."""


class Role:
    """A saver and loader of two files whose content is a number."""

    def __init__(self, value: int = 0, size: int = 1):
        self.value = value
        self.size = size

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights.bin").write_bytes(bytes([self.value]) * self.size)
        (folder / "optim.bin").write_bytes(bytes([self.value]))

    def load(self, folder: Path) -> None:
        self.value = (folder / "weights.bin").read_bytes()[0]


def manager(root, said=None, layout=LAYOUT, flags=None, **config):
    config = CheckpointConfig(ckpt_path=str(root), **config)
    say = (said if said is not None else []).append
    return CheckpointManager(config, SoloComm(), layout=layout, flags=flags, say=say)


def save(keeper, step, **role):
    return keeper.save(step, {"actor": Role(step, **role).save, "critic": Role(step + 1, **role).save}, {"step": step})


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_a_saved_checkpoint_gives_back_roles_state_and_random_numbers(tmp_path):
    keeper = manager(tmp_path)
    torch.manual_seed(3)
    random.seed(4)
    save(keeper, 7)
    expected = (torch.rand(2), random.random())
    actor, critic = Role(), Role()
    found = keeper.latest()
    state = keeper.load(found, {"actor": actor.load, "critic": critic.load})
    assert (found.step, state, actor.value, critic.value) == (7, {"step": 7}, 7, 8)
    assert torch.equal(torch.rand(2), expected[0]) and random.random() == expected[1]
    with pytest.raises(DataError, match="reward"):
        keeper.load(found, {"reward": actor.load})


def test_without_any_checkpoint_the_run_starts_fresh_and_says_so(tmp_path):
    said = []
    assert manager(tmp_path / "none", said, load_checkpoint=True).start() is None
    assert len(said) == 1 and "fresh start" in said[0]


def test_without_the_flag_earlier_checkpoints_are_moved_not_mixed_or_deleted(tmp_path):
    save(manager(tmp_path), 4)
    (tmp_path / "notes.txt").write_text("mine")
    said = []
    assert manager(tmp_path, said).start() is None
    previous = next(path for path in tmp_path.iterdir() if path.name.startswith("previous-"))
    assert names(previous) == ["global_step4"] and (tmp_path / "notes.txt").exists()
    assert str(previous) in said[0]
    save(manager(tmp_path), 4)
    manager(tmp_path).start()
    assert len([name for name in names(tmp_path) if name.startswith("previous-")]) == 2


def test_exports_without_a_checkpoint_are_not_mixed_with_those_of_a_new_run(tmp_path):
    for step in (4, 8):
        manager(tmp_path).export(step, lambda folder: folder.mkdir())
    said = []
    assert manager(tmp_path, said, load_checkpoint=True).start() is None
    [previous] = tmp_path.iterdir()
    assert names(previous) == ["global_step4_hf", "global_step8_hf"]
    assert "fresh start" in said[0] and str(previous) in said[1]


def test_what_a_kill_left_of_an_export_is_removed_at_the_next_start(tmp_path):
    for name in ("global_step3.tmp", "global_step3_hf.tmp", "global_step3_hf.tmp.part"):
        (tmp_path / name).mkdir()
    manager(tmp_path, load_checkpoint=True).start()
    assert names(tmp_path) == []


def test_when_no_checkpoint_is_whole_the_run_stops_and_names_them(tmp_path):
    keeper = manager(tmp_path, load_checkpoint=True)
    for step in (1, 2):
        save(keeper, step)
        os.truncate(tmp_path / f"global_step{step}" / "actor" / "weights.bin", 0)
    with pytest.raises(DataError, match=r"global_step2: actor/weights.bin.*global_step1: actor/weights.bin"):
        keeper.start()


def test_another_layout_is_refused_and_both_are_named(tmp_path):
    save(manager(tmp_path), 1)
    with pytest.raises(UsageError, match="world_size 1, zero_stage 2; this run has world_size 4, zero_stage 3"):
        manager(tmp_path, layout={"world_size": 4, "zero_stage": 3}).latest()


def test_the_newest_checkpoints_stay_within_the_number_allowed(tmp_path):
    for first in (1, 4):
        keeper = manager(tmp_path, max_ckpt_num=2)
        for step in range(first, first + 3):
            save(keeper, step)
    assert names(tmp_path) == ["global_step5", "global_step6"]


def test_exports_count_and_leave_with_their_step(tmp_path):
    keeper = manager(tmp_path, max_ckpt_num=2)
    for step in range(1, 5):
        save(keeper, step)
        keeper.export(step, lambda folder: Role().save(folder))
    assert names(tmp_path) == [f"global_step{step}{end}" for step in (3, 4) for end in ("", "_hf")]


def test_exports_alone_are_limited_too_and_the_only_checkpoint_stays(tmp_path):
    keeper = manager(tmp_path, max_ckpt_num=2)
    save(keeper, 1)
    for step in range(2, 6):
        keeper.export(step, lambda folder: Role().save(folder))
    assert names(tmp_path) == ["global_step1", "global_step5_hf"]


def test_the_memory_limit_prunes_but_never_the_newest(tmp_path, monkeypatch):
    save(manager(tmp_path / "one"), 1, size=500)
    monkeypatch.setattr("openrlhf.strategy.checkpoint.GIB", int(2.5 * files.tree_size(tmp_path / "one")))
    tmp_path = tmp_path / "limited"
    keeper = manager(tmp_path, max_ckpt_num=10, max_ckpt_mem=1)
    for step, kept in ((1, [1]), (2, [1, 2]), (3, [2, 3])):
        save(keeper, step, size=500)
        assert names(tmp_path) == [f"global_step{each}" for each in kept]
    save(keeper, 4, size=100_000)
    assert names(tmp_path) == ["global_step4"]


def test_pruning_touches_only_what_carries_our_mark(tmp_path):
    for name in ("global_step0", "global_step1_hf", "global_stepping"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("x")
    keeper = manager(tmp_path, max_ckpt_num=1)
    for step in (2, 3):
        save(keeper, step)
    assert names(tmp_path) == ["global_step0", "global_step1_hf", "global_step3", "global_stepping"]


def test_saving_the_same_step_again_replaces_it(tmp_path):
    keeper = manager(tmp_path)
    save(keeper, 1)
    keeper.save(1, {"actor": Role(9).save}, {})
    actor = Role()
    keeper.load(keeper.latest(), {"actor": actor.load})
    assert actor.value == 9 and names(tmp_path) == ["global_step1"]


def killing(monkeypatch, at):
    """Make the ``at``-th call that touches the disk from now on raise; return how many there were."""
    calls = {"count": 0}

    def watched(original):
        def call(*args, **kwargs):
            calls["count"] += 1
            if calls["count"] == at:
                raise Killed
            return original(*args, **kwargs)

        return call

    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "write_text"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
        (torch, "save"),
    ):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    monkeypatch.setattr(Path, "write_bytes", watched(Path.write_bytes))
    return calls


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_a_kill_at_any_call_leaves_a_loadable_checkpoint_of_one_step(tmp_path, again):
    at, finished = 1, False
    while not finished:
        root = tmp_path / str(at)
        keeper = manager(root, max_ckpt_num=1)
        save(keeper, 1)
        with pytest.MonkeyPatch.context() as patch:
            killing(patch, at)
            try:
                keeper.save(1 if again else 2, {"actor": Role(20).save, "critic": Role(21).save}, {"step": 2})
                finished = True
            except Killed:
                at += 1
        actor, critic = Role(), Role()
        keeper = manager(root, max_ckpt_num=1)
        state = keeper.load(keeper.latest(), {"actor": actor.load, "critic": critic.load})
        assert (state["step"], actor.value, critic.value) in ((1, 1, 2), (2, 20, 21)), f"killed at call {at}"
        assert not any(name.endswith((".tmp", ".old")) for name in names(root)), f"killed at call {at}"
    assert at > 20


@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_old_copy_that_is_the_only_one_stays_until_the_new_one_is_in_place(tmp_path, monkeypatch, at):
    target = tmp_path / "global_step1"
    for name in ("global_step1.old", "global_step1.tmp"):
        (tmp_path / name).mkdir()
    killing(monkeypatch, at)
    with pytest.raises(Killed):
        files.publish_folder(tmp_path / "global_step1.tmp", target)
    assert {"global_step1", "global_step1.old"} & set(names(tmp_path))


def test_a_full_disk_is_said_and_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    keeper = manager(tmp_path)
    save(keeper, 1)

    def refuse(folder):
        folder.mkdir()
        (folder / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(InfraError, match="No space left on device.*GiB free"):
        keeper.save(2, {"actor": refuse}, {})
    assert names(tmp_path) == ["global_step1"] and keeper.latest().step == 1
    monkeypatch.setattr(files, "write_durably", lambda path, text: refuse(path.parent / "sub"))
    with pytest.raises(InfraError, match="No space left"):
        save(keeper, 3)
    assert names(tmp_path) == ["global_step1"]


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "file").write_text("x")
    for act in (lambda keeper: keeper.start(), lambda keeper: save(keeper, 1)):
        with pytest.raises(InfraError, match="file"):
            act(manager(tmp_path / "file"))


def test_roles_saved_by_other_processes_are_committed_together(tmp_path):
    keeper = manager(tmp_path)
    folder = keeper.begin(5)
    Role(1).save(folder / "actor")
    assert keeper.latest() is None
    folder = keeper.begin(5)
    for name, value in (("actor", 1), ("critic", 2)):
        Role(value).save(folder / name)
    keeper.commit(5, {"step": 5})
    assert keeper.latest().state == {"step": 5}


@pytest.mark.full
def test_ranks_wait_for_a_rank_zero_that_writes_longer_than_the_collective_timeout(tmp_path):
    assert run_ranks("tests.strategy.programs:slow_rank_zero", 2, folder=str(tmp_path)) == ["global_step1"] * 2


@pytest.mark.full
def test_ranks_that_do_not_share_a_disk_are_told_so(tmp_path):
    for message in run_ranks("tests.strategy.programs:different_disks", 2, folder=str(tmp_path)):
        assert message.startswith("InfraError") and "--ckpt_path" in message


@pytest.mark.full
def test_a_rank_that_sees_another_checkpoint_of_the_same_name_is_an_error(tmp_path):
    for message in run_ranks("tests.strategy.programs:other_checkpoint_on_one_rank", 2, folder=str(tmp_path)):
        assert message.startswith("InfraError") and "do not see the same" in message and "--ckpt_path" in message


FLAGS = {"learning_rate": 1e-3, "train_batch_size": 8, "max_epochs": 2}


def test_flags_that_change_the_training_are_refused_and_each_is_named_with_both_values(tmp_path):
    save(manager(tmp_path, flags=FLAGS), 1)
    keeper = manager(tmp_path, flags={**FLAGS, "learning_rate": 1e-4, "train_batch_size": 16})
    with pytest.raises(UsageError) as error:
        keeper.latest()
    rate, batch = error.value.problems
    assert rate.startswith("--learning_rate 0.001 -> 0.0001 since global_step1 was written")
    assert batch.startswith("--train_batch_size 8 -> 16") and "--allow_config_change" in batch
    assert names(tmp_path) == ["global_step1"]


def test_changed_flags_may_be_allowed_and_are_said(tmp_path):
    save(manager(tmp_path, flags=FLAGS), 1)
    said = []
    assert manager(tmp_path, said, flags={**FLAGS, "learning_rate": 1e-4}, allow_config_change=True).latest().step == 1
    assert said[0] == "--allow_config_change: going on with --learning_rate 0.001 -> 0.0001"


def test_a_longer_run_needs_no_leave_and_says_what_it_means(tmp_path):
    save(manager(tmp_path, flags=FLAGS), 1)
    said = []
    assert manager(tmp_path, said, flags={**FLAGS, "max_epochs": 3}).latest().step == 1
    assert said[0].startswith("--max_epochs 2 -> 3: the run goes on") and "schedule" in said[0]


def test_the_optimizer_flags_of_this_run_win_over_those_of_the_checkpoint(tmp_path):
    strategy = programs.strategy_of(zero_stage=1)
    before = strategy.prepare_train(programs.tiny_net(), programs.OPTIMIZER, 10)
    for step in (0, 1):
        programs.run_step(before, strategy, step, 8)
    before.save(tmp_path / "model")
    changed = replace(programs.OPTIMIZER, learning_rate=2e-2, l2=0.5, adam_betas=(0.8, 0.9))
    after = strategy.prepare_train(programs.tiny_net(), changed, 10)
    after.load(tmp_path / "model")
    assert after.lr == pytest.approx(2 * before.lr) == pytest.approx(2e-2 * 0.8)
    found = [(group["betas"], group["weight_decay"]) for group in after.engine.optimizer.param_groups]
    assert found == [((0.8, 0.9), 0.5), ((0.8, 0.9), 0.0)]


@pytest.mark.full
def test_ranks_wait_for_the_weights_of_rank_zero_longer_than_the_collective_timeout(tmp_path):
    assert run_ranks("tests.strategy.programs:slow_weights", 2, folder=str(tmp_path)) == ["global_step1"] * 2


@pytest.mark.full
def test_a_rank_that_is_gone_when_a_model_is_saved_is_named_long_before_the_deadline_of_a_disk(tmp_path):
    ranks = run_ranks("tests.strategy.programs:stopped_before_saving", 2, check=False, folder=str(tmp_path))
    message, seconds = ranks[0]
    assert "at the barrier" in message and f"saving {tmp_path}" in message
    assert "rank 1: no sign of life" in message and seconds < 30
