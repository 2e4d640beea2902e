"""Processes of a PPO run on Ray that are killed or stopped in each of its phases.

An engine is replaced and the run is the undisturbed one bit for bit; without a trained role or its driver a run ends,
says who is gone, leaves nothing behind, and its resume is the undisturbed one. The seconds of each case are printed;
they say something about a calm machine only.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.cli.resuming import STEPS, differences, remember
from tests.cli.striking import DRIVER, Struck, strike
from tests.cli.supervised import command, demonstrations, run, write_rows
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import tiny_reward_model

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

PROMPTS, EPISODES = 24, 2
MOMENTS = ("generate", "make_experience", "train", "sync")
ENGINE, CRITIC = "vLLM engine 0", "critic rank 0"
LOST, SERVES = f"{ENGINE} was lost", f"{ENGINE} serves again"
STRUCK_AT = (3, 4, 5)
"""The steps at which a phase may be met; the checkpoint of the step before is there."""


def flags_in(folder: Path) -> dict:
    """Return the flags of all runs, their models and data in ``folder``: three steps an episode, two engines."""
    flags = {f"{role}_num_gpus_per_node": 1 for role in ("actor", "critic", "ref", "reward")}
    flags |= {"pretrain": tiny_folder(folder / "policy", hidden=64), "input_key": "prompt"}
    flags |= {"reward_pretrain": tiny_reward_model(folder / "reward", mean=0.0, std=0.1)}
    flags |= {"prompt_data": write_rows(folder / "prompts.jsonl", demonstrations(PROMPTS)), "prompt_max_len": 32}
    flags |= {"rollout_batch_size": 8, "n_samples_per_prompt": 2, "micro_rollout_batch_size": 2}
    flags |= {"train_batch_size": 4, "micro_train_batch_size": 1, "generate_max_len": 128, "num_episodes": EPISODES}
    flags |= {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "lr_warmup_ratio": 0}
    return {**flags, "vllm_num_engines": 2, "vllm_sync_backend": "gloo", "save_steps": 1, "max_ckpt_num": STEPS}


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> dict:
    """The flags of all runs."""
    pytest.importorskip("vllm")
    return flags_in(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory) -> Path:
    """The folder of the undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    run_calmly(words(material, folder))
    return folder


def words(material: dict, folder: Path, *switches: str) -> list[str]:
    return command(
        "train_ppo_ray", {**material, "save_path": folder / "model", "ckpt_path": folder / "ckpt"}, switches
    )


def run_calmly(command_line: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        run(command_line, timeout=400)


def strike_at(moment: str, material: dict, folder: Path, whom: str, number: signal.Signals, *lines: str) -> Struck:
    """Strike in ``moment`` of one of the later steps, print what was seen, and return it."""
    phases = [f"{moment}, after step {step - (moment != 'sync')}" for step in STRUCK_AT]
    struck = strike(words(material, folder), folder / "model_run", phases, whom, number, lines)
    print(json.dumps({"whom": whom, "signal": number.name, "moment": moment, "code": struck.code, **struck.seconds}))
    assert "Traceback" not in struck.output
    return struck


def check_ledger(folder: Path) -> None:
    """Fail unless every episode learned from two samples of each prompt, drawn by the policy of the step before."""
    rows = [json.loads(line) for line in (folder / "model_run" / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(versions == [row["step"] - 1] * 2 for row in rows for versions in row["samples"].values())
    for episode in range(EPISODES):
        own = rows[episode * STEPS // EPISODES : (episode + 1) * STEPS // EPISODES]
        learned = [uid for row in own for uid in row["samples"]]
        assert len(learned) == len(set(learned)) == PROMPTS


def check_whole(folder: Path, whole: Path) -> None:
    """Fail unless a disturbed run is the whole one: metrics, samples, ledger, weights and the last checkpoint."""
    check_ledger(folder)
    remember(folder)
    assert [line for line in differences(whole, folder, STEPS) if not line.startswith("the log does not say")] == []


def take_up(material: dict, folder: Path) -> None:
    """Go on with a run that ended before its end, from a checkpoint."""
    run_calmly(words(material, folder, "load_checkpoint"))
    assert re.search(r"global_step[2-5]", (folder / "model_run" / "log.txt").read_text())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_whose_engine_is_lost_goes_on_as_if_it_had_not_been(moment, number, material, whole, tmp_path):
    struck = strike_at(moment, material, tmp_path, ENGINE, number, LOST, SERVES)
    assert struck.code == 0, struck.output
    assert LOST in struck.log and SERVES in struck.log
    why = f"Process {struck.pid} was ended by SIGKILL" if number is signal.SIGKILL else "No sign of life from"
    assert why in struck.log
    check_whole(tmp_path, whole)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_whose_critic_is_killed_ends_with_its_name_and_can_be_taken_up(moment, material, whole, tmp_path):
    struck = strike_at(moment, material, tmp_path, CRITIC, signal.SIGKILL)
    assert struck.code == 4, struck.output
    told = re.search(
        rf"^error: {CRITIC} died\. Process {struck.pid} was ended by SIGKILL.*log: (\S+)$", struck.output, re.M
    )
    assert told and Path(told[1]).is_file(), struck.output
    assert struck.output.count("error: ") == 1
    take_up(material, tmp_path)
    check_whole(tmp_path, whole)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_whose_driver_is_killed_leaves_nothing_behind_and_can_be_taken_up(moment, material, whole, tmp_path):
    struck = strike_at(moment, material, tmp_path, DRIVER, signal.SIGKILL)
    assert struck.code == -signal.SIGKILL
    take_up(material, tmp_path)
    check_whole(tmp_path, whole)
