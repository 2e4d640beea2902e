"""Real runs, watched: nothing listens beyond this machine, and a key of a logging service reaches no file or child."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.cli.supervised import command, demonstrations, environment, on_two_ranks, write_rows
from tests.cli.test_train_ppo_ray import ONE_EACH, data
from tests.helpers import tiny_folder
from tests.security.watching import LOOPBACK, SECRET, files_with_secret, watch
from tests.strategy.ranks import run_ranks
from tests.trainer.ppo.harness import reward_file, tiny_reward_model

OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}


def sft(folder: Path, key: str) -> list[str]:
    """Write a model and data to ``folder`` and return a short run that logs to Weights & Biases."""
    flags = {
        "pretrain": tiny_folder(folder / "model"),
        "dataset": write_rows(folder / "train.jsonl", demonstrations(8)),
        "input_key": "prompt",
        "output_key": "answer",
        "train_batch_size": 4,
        "micro_train_batch_size": 2,
        "max_epochs": 1,
        "save_steps": 1,
        "save_path": folder / "out",
        "ckpt_path": folder / "ckpt",
        "use_wandb": key,
    }
    return command("train_sft", flags)


def key_file(folder: Path) -> str:
    folder.mkdir()
    (folder / "key.txt").write_text(f"{SECRET}\n")
    return str(folder / "key.txt")


def test_two_ranks_meet_on_the_loopback():
    found = run_ranks("tests.security.programs:listening", 2)
    assert len(found[0]) > len(found[1]) > 0, "the store of rank 0, and gloo"
    assert all(address.startswith(LOOPBACK) for rank in found for address in rank), found


def test_a_key_on_the_command_line_goes_no_further(tmp_path):
    seen = watch(sft(tmp_path, SECRET), {**environment(), **OFFLINE}, tmp_path)
    assert seen.code == 0, seen.output
    assert files_with_secret(tmp_path) == [] and SECRET not in seen.output
    assert "WANDB_API_KEY" in seen.output, "the notice"
    assert list((tmp_path / "out_run" / "wandb").glob("offline-run-*")), "wandb was there"
    assert seen.told == set()
    assert seen.open_ports == set()


@pytest.mark.full
def test_a_key_in_a_file_reaches_no_rank_and_ranks_listen_on_the_loopback(tmp_path):
    (tmp_path / "run").mkdir()
    words = on_two_ranks(sft(tmp_path / "run", key_file(tmp_path / "private")))
    seen = watch(words, {**environment(), **OFFLINE}, tmp_path / "run")
    assert seen.code == 0, seen.output
    assert files_with_secret(tmp_path / "run") == [] and SECRET not in seen.output
    assert seen.told == set()
    assert seen.listening and seen.open_ports == set()


@pytest.mark.full
@pytest.mark.parametrize("place", ["command line", "file", "environment"])
def test_ppo_on_a_ray_of_its_own_keeps_keys_and_ports_to_itself(tmp_path, place):
    pytest.importorskip("vllm")
    run = tmp_path / "run"
    run.mkdir()
    tiny_reward_model(run / "rm", mean=0.0, std=0.1)
    flags = [*data(run), *ONE_EACH, "--reward_pretrain", "rm", "--train_batch_size", "4", "--save_steps", "1"]
    flags += ["--vllm_num_engines", "1", "--vllm_sync_backend", "gloo", "--remote_rm_url", reward_file(run)]
    key = {"command line": SECRET, "file": key_file(tmp_path / "private"), "environment": "True"}[place]
    extra = {**OFFLINE, "RAY_ADDRESS": "local", "OTHER_SECRET": SECRET}
    if place == "environment":
        extra["WANDB_API_KEY"] = SECRET
    words = command("train_ppo_ray", {"use_wandb": key})
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as sessions:
        seen = watch([*words, *flags], {**environment(), **extra, "RAY_TMPDIR": sessions}, run)
        in_ray = files_with_secret(Path(sessions))
        shutil.rmtree(sessions, ignore_errors=True)
    assert seen.code == 0, seen.output
    assert files_with_secret(run) == [] and SECRET not in seen.output
    assert in_ray == []
    assert {"raylet", "gcs_server"} <= seen.programs
    assert not {name for name in seen.told if "wandb" not in name}
    assert seen.open_ports == set()
    assert json.loads((run / "out_run" / "config.json").read_text())["use_wandb"] == ("***" if key == SECRET else key)
