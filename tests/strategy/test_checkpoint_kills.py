"""A run killed at any operation of a save, or at any moment, goes on from a whole step to the same end."""

import json
import subprocess
import sys

import pytest

from tests.cli.supervised import ROOT, environment

WATCHED = {"fsync", "mkdir", "open", "rename", "rmdir", "unlink", "write"}


def drill(*words):
    """Run a drill of `tests.strategy.killing` and return what it found."""
    words = [sys.executable, "-m", "tests.strategy.killing", *map(str, words)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=580, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    return found


def check_operations(kind, folder, every):
    found = drill(kind, "operations", folder, every)
    assert set(found["kinds"]) >= WATCHED
    assert found["killed"] == len(range(1, found["operations"] + 1, every)) and found["operations"] > 30
    assert found["torn"] == []


def test_a_kill_at_every_tenth_operation_of_a_save_loses_one_step_at_most(tmp_path):
    check_operations("supervised", tmp_path, 10)


@pytest.mark.full
def test_a_kill_at_every_operation_of_a_save_loses_one_step_at_most(tmp_path):
    check_operations("supervised", tmp_path, 1)


@pytest.mark.full
@pytest.mark.parametrize("count", [20], ids="{} random moments".format)
def test_a_kill_at_random_moments_loses_one_step_at_most(count, tmp_path):
    found = drill("supervised", "moments", tmp_path, count)
    assert found["moments"] == len(found["resumed at"]) == count and len(set(found["resumed at"])) > 3
    assert found["torn"] == []


@pytest.mark.full
def test_a_kill_at_every_fourth_operation_of_a_save_of_ppo_never_leaves_roles_of_different_steps(tmp_path):
    check_operations("ppo", tmp_path, 4)
