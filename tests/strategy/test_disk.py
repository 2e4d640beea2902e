"""What goes wrong in the work of one rank on a shared disk is the same error on all of them, at once."""

from pathlib import Path

import pytest
import torch

from openrlhf.errors import DataError, InfraError
from openrlhf.strategy.comm import SoloComm
from openrlhf.strategy.disk import SharedDisk
from tests.strategy.ranks import run_ranks


def refused_by_torch(folder: Path):
    torch.save(torch.zeros(1), folder / "no such folder" / "weights.pt")


def cut_short(folder: Path):
    raise RuntimeError("[enforce fail at inline_container.cc:778] . PytorchStreamWriter failed writing file data/0")


def of_ours(folder: Path):
    raise DataError(f"{folder} holds more than tensors")


@pytest.mark.parametrize(
    ("action", "kind", "says"),
    [
        (refused_by_torch, InfraError, "cannot convert .*no such folder.*free"),
        (cut_short, InfraError, "cannot convert .*a file was cut short: no space left.*free"),
        (of_ours, DataError, "holds more than tensors$"),
    ],
)
def test_an_action_that_fails_is_said_and_leaves_nothing_half_done(action, kind, says, tmp_path):
    def work():
        (tmp_path / "half").mkdir()
        action(tmp_path)

    disk = SharedDisk(tmp_path, SoloComm())
    with pytest.raises(kind, match=says):
        disk.on_main(work, "convert", tmp_path / "half")
    assert list(tmp_path.iterdir()) == []


def test_all_ranks_raise_what_rank_zero_raised_at_once(tmp_path):
    for found in run_ranks("tests.strategy.programs:failing_on_main", 2, folder=str(tmp_path)):
        kinds, seconds = zip(*found, strict=True)
        assert kinds == ("DataError", "InfraError", "InfraError")
        assert max(seconds) < 5


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_another_waits_for_the_disk_is_named_at_once(victim, tmp_path):
    message, seconds = run_ranks(
        "tests.strategy.programs:killed_before_the_disk", 2, check=False, folder=str(tmp_path), victim=victim
    )[1 - victim]
    assert message.startswith(f"InfraError: rank {1 - victim} waited") and f"rank {victim}" in message
    assert seconds < 30
