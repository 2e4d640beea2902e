"""Processes of a PPO run on Ray that are killed or stopped in each of its phases.

Engines are replaced, and the run is the undisturbed one bit for bit. Without a worker that learns, or without its
driver, a run ends, says who is gone and leaves nothing behind, and the one that goes on is the undisturbed one too.
The seconds of each case are printed; they say something about a calm machine only.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest

from tests.cli.stopping import assert_same_run
from tests.cli.striking import DRIVER, target
from tests.cli.supervised import command, demonstrations, run, write_rows
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import reward_file

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]

PROMPTS, EPISODES, BATCH = 24, 4, 8
STEPS = EPISODES * PROMPTS // BATCH
MOMENTS = ("generate", "make_experience", "train", "sync")
ENGINE, CRITIC = "vLLM engine 0", "critic rank 0"
LOST, SERVES = f"{ENGINE} was lost", f"{ENGINE} serves again"


def flags_in(folder: Path) -> dict:
    """Return the flags of all runs, their model and data in ``folder``: an actor, a critic and an engine."""
    flags = {"actor_num_gpus_per_node": 1, "critic_num_gpus_per_node": 1, "init_kl_coef": 0}
    flags |= {"pretrain": tiny_folder(folder / "policy", hidden=64), "input_key": "prompt"}
    flags |= {"remote_rm_url": reward_file(folder)}
    flags |= {"prompt_data": write_rows(folder / "prompts.jsonl", demonstrations(PROMPTS)), "prompt_max_len": 32}
    flags |= {"rollout_batch_size": BATCH, "n_samples_per_prompt": 2, "micro_rollout_batch_size": 1}
    flags |= {"train_batch_size": 4, "micro_train_batch_size": 1, "generate_max_len": 128, "num_episodes": EPISODES}
    flags |= {"actor_learning_rate": 3e-3, "critic_learning_rate": 3e-3, "lr_warmup_ratio": 0}
    return {**flags, "vllm_num_engines": 1, "vllm_sync_backend": "gloo", "save_steps": 1, "max_ckpt_num": 2}


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
        run(command_line, timeout=500)


def tell(**facts) -> None:
    """Print what was seen of a case."""
    print(json.dumps(facts), flush=True)


def check_same(folder: Path, whole: Path) -> None:
    """Fail unless a disturbed run is the whole one, and its ledger has two samples of each prompt in every episode,
    drawn by the policy of the step before.
    """
    assert_same_run(folder, whole, "metrics.jsonl", "samples.jsonl", "ledger.jsonl")
    rows = [json.loads(line) for line in (folder / "model_run" / "ledger.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(versions == [row["step"] - 1] * 2 for row in rows for versions in row["samples"].values())
    for first in range(0, STEPS, PROMPTS // BATCH):
        learned = [uid for row in rows[first : first + PROMPTS // BATCH] for uid in row["samples"]]
        assert len(learned) == len(set(learned)) == PROMPTS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_a_run_whose_engine_is_lost_in_every_phase_is_the_undisturbed_one(number, material, whole, tmp_path):
    with target(words(material, tmp_path), tmp_path / "model_run") as struck:
        for count, moment in enumerate(MOMENTS, start=1):
            pid = struck.strike(moment, ENGINE, number, since=struck.step + 1)
            seen = struck.seconds_until(LOST, count)
            serves = struck.seconds_until(SERVES, count)
            tell(signal=number.name, moment=moment, step=struck.step, seen=seen, serves=round(seen + serves, 1))
            why = f"Process {pid} was ended by SIGKILL" if number is signal.SIGKILL else f"or hanging (process {pid})"
            assert why in struck.log
        assert struck.end()[0] == 0, struck.output
    check_same(tmp_path, whole)


def end_in_every_phase(whom: str, material: dict, folder: Path):
    """Kill ``whom`` in each phase of a run that is taken up in between; yield the process, and how the run ended."""
    step = 0
    for moment in MOMENTS:
        switches = ("load_checkpoint",) if step else ()
        with target(words(material, folder, *switches), folder / "model_run") as struck:
            pid = struck.strike(moment, whom, signal.SIGKILL, since=step + 2)
            code, seconds = struck.end()
            assert not step or "after step 0" not in struck.log, "a run that goes on has steps behind it"
            step = struck.step
        tell(whom=whom, moment=moment, step=step, code=code, ended=seconds)
        yield pid, code, struck.output
    run_calmly(words(material, folder, "load_checkpoint"))


def test_a_run_whose_critic_is_killed_says_so_ends_and_goes_on_from_its_last_step(material, whole, tmp_path):
    for pid, code, output in end_in_every_phase(CRITIC, material, tmp_path):
        assert code == 4 and "Traceback" not in output and output.count("error: ") == 1, output
        told = re.search(rf"^error: {CRITIC} died\. Process {pid} was ended by SIGKILL.* log: (\S+)$", output, re.M)
        assert told and Path(told[1]).is_file(), output
    check_same(tmp_path, whole)


def test_a_run_whose_driver_is_killed_leaves_nothing_behind_and_goes_on_from_its_last_step(material, whole, tmp_path):
    for _, code, _ in end_in_every_phase(DRIVER, material, tmp_path):
        assert code == -signal.SIGKILL
    check_same(tmp_path, whole)
