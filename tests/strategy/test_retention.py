"""Which folders are ours: only those are pruned, and nothing outside the folder of checkpoints is ever touched."""

import json

import pytest

from openrlhf.config.groups import CheckpointConfig
from openrlhf.strategy import retention
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm
from openrlhf.strategy.retention import Score


def manager(root, **flags):
    config = CheckpointConfig(ckpt_path=str(root), **{"max_ckpt_num": 1, **flags})
    return CheckpointManager(config, SoloComm(), say=lambda line: None)


def saver(folder):
    folder.mkdir(parents=True)
    (folder / "weights").write_text("x")


def save(keeper, step, value=None, metric="eval_loss", higher=False):
    score = None if value is None else Score(metric, value, higher)
    return keeper.save(step, {"model": saver}, {"step": step}, score)


def names(root):
    return sorted(path.name for path in root.iterdir())


NOT_OURS = [
    *("global_step", "global_step_1", "global_step-1", "global_step1_hf_backup", "global_step1.bak", "global_step1x"),
    *("global_step1.tmp.bak", "global_step1.older", "global_step1 copy", "global_step1..", "global_step1.tmp2"),
    *("xglobal_step1", "global_step.tmp", "GLOBAL_STEP1", "best", "..global_step1"),
]


@pytest.mark.parametrize(
    "name", NOT_OURS, ids=[f"{n} of {len(NOT_OURS)}: {name}" for n, name in enumerate(NOT_OURS, 1)]
)
def test_a_folder_of_another_name_survives_cleaning_pruning_and_a_fresh_start(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("x")
    keeper = manager(tmp_path)
    for step in (1, 2):
        save(keeper, step)
    assert keeper.latest().step == 2
    keeper.start_fresh()
    assert (tmp_path / name / "mine.txt").read_text() == "x"


@pytest.mark.parametrize("name", ["global_step0", "global_step0_hf", "global_step0.tmp", "global_step0.old"])
def test_a_link_is_never_followed(name, tmp_path):
    outside, root = tmp_path / "outside", tmp_path / "root"
    saver(outside)
    (outside / "manifest.json").write_text(json.dumps({"step": 0}))
    (outside / retention.EXPORT_MARK).write_text("{}")
    root.mkdir()
    keeper = manager(root)
    save(keeper, 1)
    (root / name).symlink_to(outside)
    for step in (2, 3):
        save(keeper, step)
    keeper.latest()
    keeper.start_fresh()
    assert names(outside) == [retention.EXPORT_MARK, "manifest.json", "weights"]


@pytest.mark.parametrize(
    ("values", "higher", "kept"),
    [
        ([3.0, 1.0, 2.0, 4.0], False, [2, 4]),
        ([3.0, 1.0, 2.0, 0.5], True, [1, 4]),
        ([1.0, 1.0, 1.0, 1.0], False, [1, 4]),
        ([None, 2.0, None, None], False, [2, 4]),
        ([None, None, None, None], False, [4]),
        ([4.0, 3.0, 2.0, 1.0], False, [4]),
    ],
    ids=["a loss", "an accuracy", "equal ones", "one evaluated", "none evaluated", "the newest"],
)
def test_the_best_step_stays_beside_the_newest(values, higher, kept, tmp_path):
    keeper = manager(tmp_path)
    for step, value in enumerate(values, start=1):
        save(keeper, step, value, higher=higher)
    assert names(tmp_path) == [f"global_step{step}" for step in kept]
    best = keeper.best()
    assert (best.step if best else None) == (kept[0] if any(values) else None)


def test_the_best_export_stays_where_nothing_else_is_written(tmp_path):
    keeper = manager(tmp_path)
    for step, value in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3)):
        keeper.export(step, saver, Score("eval_loss", value, higher=False))
    assert names(tmp_path) == ["global_step2_hf", "global_step4_hf"] and keeper.best().step == 2


def test_a_better_step_after_a_resume_takes_the_place_of_the_best_one(tmp_path):
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.2), (5, 0.6)):
        keeper = manager(tmp_path, load_checkpoint=True)
        keeper.start()
        save(keeper, step, value)
    assert names(tmp_path) == ["global_step4", "global_step5"]


def test_scores_of_another_metric_are_not_compared(tmp_path):
    keeper = manager(tmp_path)
    save(keeper, 1, 0.1, metric="eval_loss")
    for step, value in ((2, 0.3), (3, 0.5), (4, 0.4)):
        save(keeper, step, value, metric="acc_mean", higher=True)
    assert keeper.best().step == 3 and names(tmp_path) == ["global_step3", "global_step4"]


def test_the_limit_counts_what_earlier_runs_left(tmp_path):
    for first in (1, 3, 5):
        keeper = manager(tmp_path, max_ckpt_num=2, load_checkpoint=True)
        keeper.start()
        for step in (first, first + 1):
            save(keeper, step)
    assert names(tmp_path) == ["global_step5", "global_step6"]
