"""A disk that is full, small or refuses: the last whole checkpoint stays, the message says why, the next one works."""

import errno
import resource
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import InfraError
from openrlhf.strategy import room
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm
from openrlhf.strategy.retention import Score
from tests.cli.supervised import command, demonstrations, environment, metrics_of, write_rows
from tests.helpers import tiny_folder
from tests.strategy import programs
from tests.strategy.ranks import run_ranks

MIB = 2**20


def manager(root, **flags):
    config = CheckpointConfig(ckpt_path=str(root), load_checkpoint=True, **flags)
    return CheckpointManager(config, SoloComm(), say=lambda line: None)


def saver(size, folder):
    folder.mkdir(parents=True)
    torch.save(torch.zeros(size, dtype=torch.uint8), folder / "weights.pt")


def save(keeper, step, size=2 * MIB):
    return keeper.save(step, {"model": lambda folder: saver(size, folder)}, {"step": step})


@contextmanager
def largest_file(size):
    """Let files of this process grow to ``size`` bytes at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [MIB, 100], ids=["in the weights", "in the random state"])
def test_a_limit_met_in_a_save_leaves_the_last_checkpoint_and_the_next_save_works(size, tmp_path):
    keeper = manager(tmp_path)
    save(keeper, 1)
    with largest_file(size), pytest.raises(InfraError, match="cannot write checkpoint 2.*limit on file sizes.*free"):
        save(keeper, 2, size=2 * MIB if size == MIB else 1)
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"]
    assert keeper.latest().step == 1
    save(keeper, 3)
    assert keeper.latest().step == 3


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_every_way_of_a_disk_to_refuse_is_said(number, tmp_path):
    def refuse(folder):
        folder.mkdir(parents=True)
        raise OSError(number, f"reason {number}")

    keeper = manager(tmp_path)
    save(keeper, 1)
    with pytest.raises(InfraError, match=f"reason {number}.*free"):
        keeper.save(2, {"model": refuse})
    assert [path.name for path in tmp_path.iterdir()] == ["global_step1"]


ON_TMPFS = """
import subprocess, sys
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", {root!r}], check=True)
from pathlib import Path
from openrlhf.errors import InfraError
from tests.strategy.test_checkpoint_disk import manager, save
keeper, room = manager({root!r}), Path({root!r}) / "other"
save(keeper, 1)
room.write_bytes(bytes(200000))
try:
    save(keeper, 2)
except InfraError as error:
    print(error.exit_code, error)
print(sorted(path.name for path in Path({root!r}).iterdir()), keeper.latest().step)
keeper.config = type(keeper.config)(ckpt_path={root!r}, max_ckpt_num=1)
save(keeper, 3, size=100000)
print(keeper.latest().step)
"""


def on_tmpfs(code):
    """Run python code that may mount; skip where the kernel does not let us."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here")
    words = ["unshare", "-Urm", sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, env=environment(), check=False)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_next_save_works(tmp_path):
    done = on_tmpfs(ON_TMPFS.format(root=str(tmp_path)))
    said, left, last = done.stdout.splitlines()
    assert said.startswith("4 cannot write checkpoint 2") and "no space left" in said and "MiB free" in said
    assert left == "['global_step1', 'other'] 1" and last == "3"


def shortage(tmp_path, free, monkeypatch, size=10 * MIB, saves=10, scored=False, **flags):
    monkeypatch.setattr(room, "free_bytes", lambda root: free)
    return room.shortage(tmp_path, CheckpointConfig(ckpt_path=str(tmp_path), **flags), size, saves, scored)


def test_the_estimate_counts_what_is_kept_and_the_one_being_written(tmp_path, monkeypatch):
    said = shortage(tmp_path, 39 * MIB, monkeypatch)
    assert "40.0 MiB = 4 x 10.0 MiB (at most 3 kept and one being written), and 39.0 MiB are free" in said
    assert "--max_ckpt_num 3" in said and "--ckpt_path" in said
    assert shortage(tmp_path, 40 * MIB, monkeypatch) is None


@pytest.mark.parametrize(
    ("needed", "options"),
    [
        (2, {"max_ckpt_num": 1}),
        (3, {"max_ckpt_num": 1, "scored": True}),
        (1, {"saves": 1}),
        (0, {"saves": 0}),
    ],
    ids=["one kept", "one and the best kept", "one to come", "none to come"],
)
def test_the_estimate_asks_for_no_more_than_will_be_there(needed, options, tmp_path, monkeypatch):
    assert shortage(tmp_path, needed * 10 * MIB, monkeypatch, **options) is None
    assert not needed or shortage(tmp_path, needed * 10 * MIB - 1, monkeypatch, **options)


def test_checkpoints_on_the_disk_give_their_room_back(tmp_path, monkeypatch):
    keeper = manager(tmp_path, max_ckpt_num=3)
    for step in (1, 2, 3):
        save(keeper, step)
    assert shortage(tmp_path, 3 * MIB, monkeypatch, size=2 * MIB) is None
    assert "8.0 MiB = 4 x 2.0 MiB" in shortage(tmp_path, MIB, monkeypatch, size=2 * MIB)


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (2, True), (3, False)])
def test_the_estimate_is_what_a_checkpoint_takes(stage, bf16, tmp_path):
    strategy = programs.strategy_of(zero_stage=stage, bf16=bf16)
    module = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400))
    engine = strategy.prepare_train(module.bfloat16() if bf16 else module, programs.OPTIMIZER, 10)
    engine.backward(engine(torch.ones(2, 400, dtype=torch.bfloat16 if bf16 else torch.float32)).float().sum(), 1)
    engine.step()
    estimate, export = room.checkpoint_bytes(engine)
    path = manager(tmp_path).save(1, {"model": engine.save})
    assert sum(file.stat().st_size for file in (path / "model").rglob("*")) == pytest.approx(estimate, rel=0.03)
    assert export == 2 * (400 * 401) * (2 if bf16 else 4)


def test_bytes_on_the_disk_stay_bounded_with_exports(tmp_path):
    keeper, sizes = manager(tmp_path, max_ckpt_num=2), []
    for step in range(1, 7):
        score = Score("eval_loss", float(step), higher=False)
        keeper.export(step, lambda folder: saver(MIB, folder), score)
        keeper.save(step, {"model": lambda folder: saver(2 * MIB, folder)}, score=score)
        sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()))
    assert max(sizes[2:]) < 1.01 * sizes[1] and sizes[1] < 6.3 * MIB
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("global_step1", "global_step1_hf", "global_step6", "global_step6_hf")
    ]


@pytest.mark.full
def test_when_the_disk_of_one_rank_is_full_all_ranks_hear_it_at_once(tmp_path):
    for said, seconds in run_ranks("tests.strategy.programs:full_on_one_rank", 2, folder=str(tmp_path)):
        assert said.startswith("InfraError: cannot write checkpoint 1") and "rank 1: " in said
        assert seconds < 10
    assert list(tmp_path.iterdir()) == []


def sft(folder, **flags):
    """Return the command line of a small SFT run in ``folder``."""
    fixed = {
        "pretrain": tiny_folder(folder / "base"),
        "dataset": write_rows(folder / "train.jsonl", demonstrations(24)),
        "input_key": "prompt",
        "output_key": "answer",
        "train_batch_size": 8,
        "save_path": folder / "model",
        "ckpt_path": folder / "ckpt",
        "max_epochs": 1,
    }
    return command("train_sft", {**fixed, **flags})


def mounted(place, words, size):
    """Return code that mounts a small disk at ``place`` and runs a command."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    return f"""
    import subprocess, sys
    subprocess.run({mount!r}, check=True)
    sys.exit(subprocess.run({list(map(str, words))!r}).returncode)
    """


@pytest.mark.full
def test_a_disk_that_is_predictably_too_small_stops_the_run_before_its_first_step(tmp_path):
    (tmp_path / "ckpt").mkdir()
    done = on_tmpfs(mounted(tmp_path / "ckpt", sft(tmp_path, save_steps=1), "500k"))
    assert done.returncode == 4, done.stderr
    assert "3 x " in done.stderr and "are free" in done.stderr and "Traceback" not in done.stderr
    assert metrics_of(tmp_path / "model_run") == []


@pytest.mark.full
def test_a_full_disk_of_the_logs_does_not_end_the_training(tmp_path):
    words = sft(tmp_path, run_path=tmp_path / "run", use_tensorboard=tmp_path / "run" / "tb")
    (tmp_path / "run").mkdir()
    done = on_tmpfs(mounted(tmp_path / "run", words, "12k"))
    assert done.returncode == 0, done.stderr
    assert "JsonlLogger failed (OSError: [Errno 28]" in done.stdout and "no report: [Errno 28]" in done.stdout
    assert (Path(tmp_path) / "model" / "model.safetensors").is_file()
