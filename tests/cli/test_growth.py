"""Long runs do not grow: memory, files, threads, shared memory and what a step writes stay what they were."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cli.growth import SETTLES, Usage, growth, table, watch
from tests.cli.supervised import ROOT, command, demonstrations, environment, write_rows
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import reward_file

MOST = 0.01
"""Share of its memory by which a process may grow."""


def report(name: str, before: dict, after: dict) -> None:
    """Print the figures; pytest shows them with -s, or when the test fails."""
    print(f"\n{name}\n{table(before, after)}")


def test_growth_of_any_kind_is_seen():
    def look(resident: int = 600 * 2**20, files: int = 9, written: int = 0, daemon: int = 30 * 2**20) -> dict:
        raylet = Usage("/x/ray/core/src/ray/raylet/raylet", daemon, 1, 1, 0)
        return {0: written, 7: Usage("python", resident, files, 3, 1), 8: raylet}

    def found(after: dict) -> list[str]:
        return growth(look(), after, MOST, steps=10, bytes_a_step=100)

    assert found(look()) == found(look(resident=605 * 2**20, written=1000, daemon=31 * 2**20)) == []
    assert [line.split(":")[0] for line in found(look(resident=607 * 2**20))] == ["python", "all processes"]
    assert len(found(look(daemon=30 * 2**20 + SETTLES + 1))) == 1
    assert found(look(files=10)) == ["python: 9 to 10 files"]
    assert found(look(written=2000)) == ["200 bytes written a step"]
    assert found({**look(), 9: Usage("another", 0, 1, 1, 0)}) == ["process another is new"]


@pytest.mark.full
@pytest.mark.timeout(600)
def test_a_long_sft_run_does_not_grow(tmp_path):
    flags = {
        "pretrain": tiny_folder(tmp_path / "base"),
        "dataset": write_rows(tmp_path / "rows.jsonl", demonstrations(400)),
        "input_key": "prompt",
        "output_key": "answer",
        "max_len": 64,
        "train_batch_size": 4,
        "micro_train_batch_size": 2,
        "max_epochs": 11,
        "save_path": tmp_path / "model",
        "ckpt_path": tmp_path / "ckpt",
    }
    words = command("train_sft", flags)
    before, after = watch(words, tmp_path / "model_run", (200, 1000), 300, env=environment(), cwd=ROOT)
    report("SFT, step 200 to 1,000", before, after)
    assert growth(before, after, MOST, 800, 600) == []


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_long_ppo_run_with_vllm_does_not_grow(tmp_path):
    pytest.importorskip("vllm")
    rows = [{"input": f"What is {n % 9} + {n}?", "label": str(n)} for n in range(42)]
    flags = [
        *("--pretrain", tiny_folder(tmp_path / "base", hidden=64), "--remote_rm_url", reward_file(tmp_path)),
        *("--prompt_data", write_rows(tmp_path / "prompts.jsonl", rows), "--num_episodes", "10"),
        *("--rollout_batch_size", "2", "--n_samples_per_prompt", "2", "--generate_max_len", "8"),
        *("--prompt_max_len", "24", "--train_batch_size", "4", "--micro_train_batch_size", "4"),
        *("--advantage_estimator", "rloo", "--vllm_num_engines", "1", "--vllm_sync_backend", "gloo"),
        *("--actor_num_gpus_per_node", "1", "--ref_num_gpus_per_node", "1"),
        *("--save_path", str(tmp_path / "model"), "--ckpt_path", str(tmp_path / "ckpt")),
    ]
    words = [sys.executable, "-m", "openrlhf.cli.train_ppo_ray", *flags]
    own = {**environment(), "RAY_ADDRESS": "local"}
    before, after = watch(words, Path(tmp_path / "model_run"), (50, 200), 600, env=own, cwd=ROOT)
    report("PPO on Ray with vLLM, step 50 to 200", before, after)
    assert growth(before, after, MOST, 150, 4000) == []
