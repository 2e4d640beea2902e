"""Asked to stop in any phase, a run ends soon with 143, and the run that goes on is the uninterrupted one bit for bit.

A signal comes when the log (or ``metrics.jsonl``) has a certain line; the witness that it came in time is the last
phase in the log afterwards.
"""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cli.stopping import EXITS_WITHIN_S, Stopped, assert_same_run, stop_at, with_word
from tests.cli.supervised import (
    command,
    demonstrations,
    metrics_of,
    on_two_ranks,
    pairs,
    run,
    write_rows,
)
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import tiny_reward_model

LOG, METRICS = "log.txt", "metrics.jsonl"


@dataclass(frozen=True)
class Case:
    """When a run of ``program`` is asked to stop: ``file`` of its run folder has ``line``; ``phase`` is the witness.

    ``step`` is where it must have stopped (None: any); ``code`` its exit status.
    """

    program: str
    file: str
    line: str
    phase: str
    step: int | None = None
    number: signal.Signals = signal.SIGTERM
    whom: str = ""
    code: int = 143

    def __str__(self) -> str:
        words = [self.program, self.line, self.number.name, self.whom]
        return re.sub(r"\W+", "_", " ".join(words)).strip("_")


RANK_1, LAUNCHER, OUTER = "--local_rank=1", "deepspeed.launcher.launch", ""
TRAIN_3 = '"step": 3,'
CASES = [
    Case("sft", LOG, "process", "", 0),
    Case("sft", LOG, "phase: data", "", 0),
    Case("sft", LOG, "phase: model", "", 0),
    Case("sft", METRICS, TRAIN_3, "model"),
    Case("sft", METRICS, TRAIN_3, "model", number=signal.SIGINT),
    Case("sft", LOG, "evaluation after step 10", "evaluation after step 10", 10),
    Case("sft", LOG, "save step 8", "model", 8),
    Case("sft", LOG, "phase: export", "export", 20),
    Case("sft2", LOG, "phase: model", "", 0, whom=RANK_1),
    Case("sft2", METRICS, TRAIN_3, "model", whom=RANK_1),
    Case("sft2", LOG, "evaluation after step 10", "evaluation after step 10", 10, whom=RANK_1),
    Case("sft2", LOG, "save step 8", "model", 8, whom=RANK_1),
    Case("sft2", METRICS, TRAIN_3, "model", whom=LAUNCHER, code=1),
    Case("sft2", METRICS, TRAIN_3, "", whom=OUTER, code=-15),  # heard within half a second, wherever that is
    Case("rm", METRICS, TRAIN_3, "model"),
    Case("rm", LOG, "evaluation after step 8", "evaluation after step 8", 8),
    Case("rm", LOG, "save step 8", "evaluation after step 8", 8),
    Case("rm", LOG, "phase: export", "export", 16),
    Case("ppo", LOG, "phase: generate, after step 1", "generate, after step 1", 1),
    Case("ppo", LOG, "phase: ray", "ray", 0),
    Case("ppo", LOG, "starting the workers", "ray", 0),
    Case("ppo", LOG, "phase: make_experience, after step 1", "make_experience, after step 1", 1),
    Case("ppo", LOG, "phase: train, after step 1", "evaluation after step 2", 2),
    Case("ppo", LOG, "evaluation after step 2", "evaluation after step 2", 2),
    Case("ppo", LOG, "phase: export", "export", 4),
    Case("ppo2", LOG, "phase: model", "", 0, whom=RANK_1),
    Case("ppo2", LOG, "phase: generate, after step 1", "generate, after step 1", 1, whom=RANK_1),
    Case("ppo2", LOG, "phase: make_experience, after step 1", "make_experience, after step 1", 1, whom=RANK_1),
    Case("ppo2", LOG, "phase: train, after step 1", "evaluation after step 2", 2, whom=RANK_1),
    Case("ppo2", LOG, "evaluation after step 2", "evaluation after step 2", 2, whom=RANK_1),
    Case("ppo2", LOG, "phase: export", "export", 4, whom=RANK_1),
    Case("ppo2", LOG, "phase: generate, after step 1", "generate, after step 1", 1, whom=LAUNCHER, code=1),
    Case("ppo-vllm", LOG, "phase: generate, after step 1", "generate, after step 1", 1),
    Case("ppo-vllm", LOG, "save step 2", "sync, after step 2", 2),
    Case("ppo-vllm", LOG, "phase: train, after step 1", "sync, after step 2", 2),
    Case("ppo-vllm", LOG, "phase: sync, after step 2", "sync, after step 2", 2),
]
QUICK = [
    case
    for case in CASES
    if str(case)
    in (
        "sft_save_step_8_SIGTERM",
        "ppo_phase_generate_after_step_1_SIGTERM",
        "ppo2_phase_generate_after_step_1_SIGTERM_local_rank_1",
    )
]
REWARD = """
import time
def reward_func(queries, prompts, labels):
    time.sleep(0.5)
    return [float(query[len(prompt):].count("e")) for query, prompt in zip(queries, prompts)]
"""
SUPERVISED = {
    "eval_split": "train",
    "max_len": 64,
    "learning_rate": 3e-3,
    "train_batch_size": 8,
    "max_epochs": 2,
    "save_steps": 8,
}


@dataclass(frozen=True)
class Program:
    """A command whose runs write below ``folder``."""

    name: str
    material: Path

    def words(self, folder: Path, resume: bool = False) -> list[str]:
        """Return its command line."""
        flags = {**getattr(self, self.name.partition("2")[0].partition("-")[0])(folder)}
        flags |= {"save_path": folder / "model", "ckpt_path": folder / "ckpt"}
        switches = ("load_checkpoint",) if resume else ()
        if self.name == "ppo2":
            return on_two_ranks(command("train_ppo", flags, switches))
        if self.name.startswith("ppo"):
            return command("train_ppo_ray", flags, switches)
        words = command("train_rm" if self.name == "rm" else "train_sft", flags, switches)
        return on_two_ranks(words) if self.name == "sft2" else words

    def sft(self, _: Path) -> dict:
        """Two epochs of ten steps, with dropout."""
        here = self.material
        data = {"dataset": here / "sft.jsonl", "eval_dataset": here / "sft_eval.jsonl"}
        keys = {"input_key": "prompt", "output_key": "answer", "micro_train_batch_size": 3}
        return {**SUPERVISED, **data, **keys, "pretrain": here / "base"}

    def rm(self, _: Path) -> dict:
        """Two epochs of eight steps, with dropout."""
        here = self.material
        data = {"dataset": here / "rm.jsonl", "eval_dataset": here / "rm_eval.jsonl", "prompt_key": "prompt"}
        return {**SUPERVISED, **data, "pretrain": here / "base", "micro_train_batch_size": 4}

    def ppo(self, folder: Path) -> dict:
        """Four rollout steps: the policy samples and a file rewards, or vLLM samples and models reward and value."""
        here = self.material
        (folder / "reward.py").write_text(REWARD)
        roles = () if self.name == "ppo2" else ("actor", "critic", "ref", "reward")
        flags = {f"{role}_num_gpus_per_node": 1 for role in roles}
        flags |= {"pretrain": here / "policy", "prompt_data": here / "prompts.jsonl", "input_key": "prompt"}
        flags |= {"prompt_max_len": 32, "rollout_batch_size": 8, "micro_rollout_batch_size": 4, "train_batch_size": 8}
        flags |= {"micro_train_batch_size": 2, "actor_learning_rate": 3e-3, "lr_warmup_ratio": 0, "num_episodes": 2}
        if self.name != "ppo-vllm":
            flags |= {"remote_rm_url": folder / "reward.py", "advantage_estimator": "reinforce"}
            return {**flags, "generate_max_len": 160, "eval_dataset": here / "prompts.jsonl", "eval_steps": 2}
        flags |= {"reward_pretrain": here / "reward", "vllm_num_engines": 1, "vllm_sync_backend": "gloo"}
        return {**flags, "generate_max_len": 128, "save_steps": 2}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Models and data of all programs."""
    folder = tmp_path_factory.mktemp("material")
    tiny_folder(folder / "base", attention_dropout=0.1)
    tiny_folder(folder / "policy", hidden=64)
    tiny_reward_model(folder / "reward", mean=0.0, std=0.1)
    write_rows(folder / "sft.jsonl", demonstrations(78))
    write_rows(folder / "sft_eval.jsonl", demonstrations(90, first=100))
    write_rows(folder / "rm.jsonl", pairs(60))
    write_rows(folder / "rm_eval.jsonl", pairs(90, first=100))
    write_rows(folder / "prompts.jsonl", demonstrations(16))
    return folder


@pytest.fixture(scope="module")
def whole(material, tmp_path_factory):
    """Return the folder of the uninterrupted run of a program; each runs once."""
    folders: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            run_calmly(Program(name, material).words(folders[name]))
        return folders[name]

    return of


def run_calmly(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "local")
        run(words)


def assert_same(folder: Path, whole: Path, name: str) -> None:
    """Fail unless a run of program ``name`` is the whole one."""
    assert_same_run(folder, whole, METRICS, *(("samples.jsonl", "ledger.jsonl") if name.startswith("ppo") else ()))


def ask(case: Case, material: Path, folder: Path) -> Stopped:
    """Run until ``case`` and check how the run ended."""
    run_path = folder / "model_run"
    whom = with_word(case.whom) if case.whom else int
    words = Program(case.program, material).words(folder)
    stopped = stop_at(words, run_path, (run_path / case.file, case.line), case.number, whom)
    assert stopped.code == case.code, stopped.output
    assert stopped.seconds < EXITS_WITHIN_S
    assert stopped.last_phase == case.phase or not case.phase
    assert case.step in (None, stopped.step), stopped.output
    assert len(set(stopped.saves)) == len(stopped.saves)
    assert "Traceback" not in stopped.output
    return stopped


def ask_and_look(case: Case, material: Path, folder: Path) -> None:
    """Run until ``case``; the last whole step must be on the disk then, and nothing after it in the metrics."""
    if case.program == "ppo-vllm":
        pytest.importorskip("vllm")
    stopped = ask(case, material, folder)
    done = len(metrics_of(folder / "model_run")) if (folder / "model_run" / METRICS).exists() else 0
    saved = max([0, *(int(path.name[11:]) for path in (folder / "ckpt").glob("global_step*"))])
    row = {"case": str(case), "code": stopped.code, "seconds": round(stopped.seconds, 1), "done": done, "saved": saved}
    print(json.dumps(row))
    assert done == saved == stopped.step
    assert stopped.saves[-1:] == [saved] * bool(saved)


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_a_run_that_is_asked_to_stop_ends_soon_with_its_last_step_saved(case, material, tmp_path):
    ask_and_look(case, material, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_run_that_was_asked_to_stop_goes_on_as_if_it_had_not_been(case, material, whole, tmp_path):
    ask_and_look(case, material, tmp_path)
    run_calmly(Program(case.program, material).words(tmp_path, resume=True))
    assert_same(tmp_path, whole(case.program), case.program)


@pytest.mark.full
def test_stopped_before_its_first_step_a_resumed_run_leaves_the_older_checkpoint_as_it_is(material, whole, tmp_path):
    program, run_path = Program("sft", material), tmp_path / "model_run"
    ask(Case("sft", LOG, "save step 8", "model", 8), material, tmp_path)
    before = contents(tmp_path / "ckpt")
    words = program.words(tmp_path, resume=True)
    stopped = stop_at(words, run_path, (run_path / LOG, "phase: model"))
    assert (stopped.code, stopped.step) == (143, 0)
    assert contents(tmp_path / "ckpt") == before != {}
    run_calmly(words)
    assert_same(tmp_path, whole("sft"), "sft")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.full
def test_asked_twice_a_run_on_ray_ends_at_once_and_leaves_nothing_behind(material, tmp_path):
    run_path = tmp_path / "model_run"
    line = (run_path / LOG, "phase: generate, after step 1")
    stopped = stop_at(Program("ppo", material).words(tmp_path), run_path, line, again_s=1.1)
    assert stopped.code == 143
    assert stopped.seconds < 1.1 + 5
