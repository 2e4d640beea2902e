"""The processes in which other tests run their programs: each is alone, and what fails in one is told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.strategy.ranks import run_ranks


def told(name: str) -> list[str | None]:
    """Return what the environment of this rank says."""
    return [os.environ.get(variable) for variable in ("RANK", "WORLD_SIZE", name)]


def one_waits(folder: str, how: str) -> None:
    """Let rank 1 end in some way, when it does, and all others wait."""
    Path(folder, os.environ["RANK"]).write_text(str(os.getpid()))
    if how == "raise" and os.environ["RANK"] == "1":
        raise ValueError("this went wrong")
    if how == "kill" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.iterdir()]


def test_every_call_has_the_environment_of_its_moment(monkeypatch):
    monkeypatch.setenv("CANARY", "1")
    assert run_ranks(f"{__name__}:told", 2, name="CANARY") == [["0", "2", "1"], ["1", "2", "1"]]
    monkeypatch.delenv("CANARY")
    assert run_ranks(f"{__name__}:told", 1, name="CANARY") == [["0", "1", None]]
    assert "RANK" not in os.environ


def test_a_fresh_process_knows_the_same(monkeypatch):
    monkeypatch.setenv("CANARY", "1")
    assert run_ranks(f"{__name__}:told", 1, fresh=True, name="CANARY") == [["0", "1", "1"]]


@pytest.mark.parametrize(("how", "code", "says"), [("raise", "1", "ValueError: this went wrong"), ("kill", "-9", "")])
def test_the_end_of_one_rank_is_told_and_is_the_end_of_all(tmp_path, how, code, says):
    with pytest.raises(AssertionError, match=rf"one_waits ended with \[-9, {code}\]") as caught:
        run_ranks(f"{__name__}:one_waits", 2, folder=str(tmp_path), how=how)
    assert says in str(caught.value)
    assert not any(Path("/proc", str(pid)).exists() for pid in pids(tmp_path))


def test_ranks_that_take_too_long_are_ended(tmp_path):
    with pytest.raises(AssertionError, match=r"one_waits ended with \[-9, -9\]"):
        run_ranks(f"{__name__}:one_waits", 2, timeout=5, folder=str(tmp_path), how="wait")
    assert not any(Path("/proc", str(pid)).exists() for pid in pids(tmp_path))
