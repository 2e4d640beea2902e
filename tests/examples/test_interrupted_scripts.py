"""The scripts of several stages, ended after every stage in turn: what is there is not made again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "examples/scripts"
LAUNCHER = """#!/usr/bin/env bash
echo "$@" >> calls
[ "$(wc -l < calls)" -le "$STAGES" ] || exit 137
while [ $# -gt 0 ]; do
  case $1 in
    --output_path) echo whole > "$2" ;;
    --save_path) mkdir -p "$2" && echo whole > "$2/config.json" ;;
  esac
  shift
done
"""
"""In place of the launchers: it writes what a command writes, and is killed after so many stages."""
STAGES = {"train_rejection_sampling_llama": 6, "train_iterative_dpo_llama": 6, "train_conditional_llama": 3}
PLACES = ("--output_path", "--save_path")


def start(name: str, folder: Path, stages: int) -> tuple[int, list[list[str]]]:
    """Run a script whose launchers survive ``stages`` commands; return its exit status and all commands so far."""
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "ROUNDS": "2",
        "STAGES": str(stages),
    }
    environment.pop("SMOKE", None)
    done = subprocess.run(["bash", SCRIPTS / f"{name}.sh"], cwd=folder, env=environment, timeout=60)
    return done.returncode, [line.split() for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.parametrize("name", STAGES)
def test_a_script_that_was_ended_goes_on_at_the_stage_that_it_was_in(name, tmp_path):
    (tmp_path / "bin").mkdir()
    for launcher in ("python3", "deepspeed"):
        (tmp_path / "bin" / launcher).write_text(LAUNCHER)
        (tmp_path / "bin" / launcher).chmod(0o755)
    _, undisturbed = start(name, tmp_path, 99)
    assert len(undisturbed) == STAGES[name]
    assert start(name, tmp_path, 99) == (0, undisturbed)  # everything is there: nothing is started
    subprocess.run(["rm", "-r", tmp_path / "checkpoint", tmp_path / "calls"], check=True)
    for stage in range(STAGES[name]):  # each start finishes the stage of the one before and is ended in the next
        status, calls = start(name, tmp_path, 2 * stage)
        assert status == 137 and calls[-1] == undisturbed[stage]
    status, calls = start(name, tmp_path, 99)
    assert status == 0
    outputs = [words[words.index(flag) + 1] for words in calls for flag in PLACES if flag in words]
    assert len(set(outputs)) == STAGES[name] and all((tmp_path / path).exists() for path in outputs)
    assert all("--load_checkpoint" in words for words in calls if "--save_path" in words)
