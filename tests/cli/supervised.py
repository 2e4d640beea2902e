"""What the tests of the supervised commands share: tiny data, running a command, killing one, comparing two runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACE = {"tokens_per_second", "time/step"}
"""The metrics that the clock decides."""
WORDS = ["clips", "robot", "friends", "April", "May", "story", "answer", "tiny"]


def environment() -> dict[str, str]:
    """Return the environment of a command: this checkout, one thread, no network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write JSON lines and return the path as text."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def demonstrations(count: int, first: int = 0) -> list[dict]:
    """Return prompts that ask for a word again, with the answer; lengths differ."""
    picked = [[WORDS[(i * 7 + k * 3) % len(WORDS)] for k in range(1 + i % 3)] for i in range(first, first + count)]
    return [{"prompt": f"Write {' '.join(words)}", "answer": " ".join(words)} for words in picked]


def pairs(count: int, first: int = 0) -> list[dict]:
    """Return answers of which the chosen ones speak of clips and the rejected ones of a robot."""
    asked = [WORDS[i % len(WORDS)] for i in range(first, first + count)]
    return [
        {"prompt": f"A {word} {i}?", "chosen": f"{word} clips {i % 5}", "rejected": f"{word} robot robot {i % 5}"}
        for i, word in enumerate(asked)
    ]


def answers(count: int, first: int = 0) -> list[dict]:
    """Return the answers of pairs, each for itself: the chosen ones are desirable."""
    return [
        {"prompt": row["prompt"], "answer": row[side], "label": side == "chosen"}
        for row in pairs(count, first)
        for side in ("chosen", "rejected")
    ]


def steps(count: int, first: int = 0) -> list[dict]:
    """Return digits that each end a step with ``*``; every second step of a row is right."""
    return [
        {
            "input": " ".join(f"{(i + k) % 10} *" for k in range(2 + i % 3)),
            "label": ["+-"[(i + k) % 2] for k in range(2 + i % 3)],
        }
        for i in range(first, first + count)
    ]


def command(program: str, flags: dict, switches: tuple[str, ...] = ()) -> list[str]:
    """Return the command line that runs ``program`` on one rank."""
    words = [word for name, value in flags.items() for word in (f"--{name}", *str(value).split("|"))]
    return [sys.executable, "-m", f"openrlhf.cli.{program}", *words, *(f"--{switch}" for switch in switches)]


def on_two_ranks(words: list[str]) -> list[str]:
    """Return the command line that runs a command on two ranks of this machine, under DeepSpeed's launcher."""
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_accelerators", "2", "--module", *words[2:]]


def run(words: list[str], timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a command to its end; fail with what it printed when it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_and_kill(words: list[str], metrics: Path, at_step: int, timeout: float = 240) -> bytes:
    """Run a command, kill it with SIGKILL once ``metrics`` holds ``at_step``, and return the lines it left."""
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(words, env=environment(), cwd=ROOT, **nowhere)
    try:
        end = time.monotonic() + timeout
        while time.monotonic() < end and process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b'"phase": "train"') >= at_step:
                break
            time.sleep(0.002)
    finally:
        process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL, "the run ended before it could be killed"
    return metrics.read_bytes()


def metrics_of(run_path: Path, phase: str = "train") -> list[dict]:
    """Return the lines of ``metrics.jsonl`` of one phase."""
    rows = [json.loads(line) for line in (run_path / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["phase"] == phase]


def without_speed(rows: list[dict]) -> list[dict]:
    """Return metrics without those that the clock decides."""
    return [{name: value for name, value in row.items() if name not in PACE} for row in rows]


def weights_of(folder: Path) -> dict:
    """Return the tensors of a saved model."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_weights(folder: Path, other: Path) -> None:
    """Fail unless two saved models are equal bit for bit."""
    import torch

    left, right = weights_of(folder), weights_of(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
