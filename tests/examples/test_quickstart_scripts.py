"""The quickstart scripts run from end to end, small, and go on where they were."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = "--demonstrations 192 --pairs 128 --prompts 256 --held_out 32"
STAGES = {
    "quickstart": ["task", "sft", "reward_model", "ppo"],
    "family": ["task", "sft", "family_task", "dpo", "kto", "prm", "teacher", "kd"],
    "estimators": ["task", "sft", "gae", "reinforce", "reinforce_baseline", "rloo", "group_norm", "dr_grpo", "gspo"],
    "iterative": [
        *("task", "sft", "reward_model", "answers_0", "pairs_0", "dpo_0", "answers_1", "pairs_1", "dpo_1"),
        *("best", "rejection", "rewarded", "csft", "csft_answers"),
    ],
}


def run(name, runs):
    """Run a script in the environment of these tests, with a small task, and return its output."""
    environment = {**os.environ, "OPENRLHF_ENV": sys.prefix, "RUNS": str(runs), "TASK_FLAGS": SIZES}
    file = "quickstart.sh" if name == "quickstart" else f"quickstart_{name}.sh"
    done = subprocess.run(
        ["bash", str(ROOT / "examples/scripts" / file)], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("name", list(STAGES))
def test_a_quickstart_runs_and_started_again_shows_the_same_figures(name, tmp_path):
    if not Path(sys.prefix, ".openrlhf-ready").is_file():
        pytest.skip("these tests run outside an environment of setup_env.sh")
    run(name, tmp_path)
    first = (tmp_path / name / "result.json").read_text()
    assert list(json.loads(first)["seconds"]) == STAGES[name]
    again = run(name, tmp_path)
    assert [line for line in again.splitlines() if "done before" in line] == [
        f"== {stage}: done before" for stage in STAGES[name]
    ]
    assert (tmp_path / name / "result.json").read_text() == first
