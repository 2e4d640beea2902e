"""The script that makes a Ray cluster of a SLURM job, where its head does not come up, and where it comes up late."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples/scripts/train_ppo_llama_ray_slurm.sh"
PROGRAMS = {
    "scontrol": "echo one; echo two",
    "sleep": "",
    "srun": """
echo "$*" >> calls
case "$*" in
  *hostname*) echo 10.0.0.1 ;;
  *--head*) [ "$HEAD" = dies ] || exec tail -f /dev/null ;;
  *"job list"*) [ "$(grep -c 'job list' calls)" -ge "$ANSWERS_AT" ] ;;
esac""",
}
"""In place of SLURM's."""


def start(folder: Path, head: str, answers_at: int) -> tuple[int, str, list[str]]:
    """Run the script; return its exit status, what it said, and what it started."""
    for name, body in PROGRAMS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    given = {"PATH": f"{folder}:{os.environ['PATH']}", "HEAD": head, "ANSWERS_AT": str(answers_at)}
    environment = {**os.environ, **given, "SLURM_SUBMIT_DIR": str(folder)}
    environment.pop("SMOKE", None)
    with (folder / "said").open("w") as said:
        process = subprocess.Popen(
            ["bash", SCRIPT], env=environment, start_new_session=True, stdout=said, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(timeout=120)
        finally:
            with suppress(ProcessLookupError):  # nothing is left behind the script
                os.killpg(process.pid, signal.SIGKILL)
    return status, (folder / "said").read_text(), (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("head", ["dies", "is silent"])
def test_a_cluster_whose_head_does_not_answer_ends_the_job(tmp_path, head):
    status, said, calls = start(tmp_path, head, answers_at=1000)
    assert status == 1 and "error: the head of the Ray cluster on one does not answer, or has ended" in said
    tries = sum("job list" in call for call in calls)
    assert tries == 60 if head == "is silent" else tries < 60
    assert not any("job submit" in call for call in calls)


def test_a_head_that_answers_late_gets_the_training(tmp_path):
    status, _, calls = start(tmp_path, "lives", answers_at=3)
    assert status == 0 and sum("job list" in call for call in calls) == 3
    assert [call.split()[-1] for call in calls if "job submit" in call] == ["--gradient_checkpointing"]
    assert sum("ray start --address 10.0.0.1:6379" in call for call in calls) == 1
