"""Bad data and model folders end with one message that names file and line, key or flag, before a model is loaded."""

from __future__ import annotations

import logging
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf.cli import train_dpo, train_kd, train_kto, train_ppo_ray, train_prm, train_rm, train_sft
from openrlhf.cli.common import run
from openrlhf.config.ppo_ray import RayPPOConfig
from tests.cli.bad_inputs import CASES, good_models, prepare

ROOT = Path(__file__).resolve().parents[2]
SUPERVISED = [module.command for module in (train_sft, train_rm, train_dpo, train_kto, train_kd, train_prm)]
READERS = {
    **{command.name: (command.config_class, command.read) for command in SUPERVISED},
    "train_ppo_ray": (RayPPOConfig, train_ppo_ray.prompts),
}
CPU_SECONDS = 10


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return good_models(tmp_path_factory.mktemp("models"))


def judge(case, code, text):
    """Fail unless the outcome is the case's exit status and one message that says what it must."""
    assert code == case.code, text
    assert "Traceback" not in text
    messages = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, text
    missing = [pattern for pattern in case.says if not re.search(pattern, messages[0])]
    assert not missing, f"{missing} not in: {messages[0]}"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_bad_input_is_one_message(case, models, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level(logging.CRITICAL, logger="datasets")  # it writes to the terminal of the test that was first
    command, *words = prepare(case, models, tmp_path)
    monkeypatch.chdir(tmp_path)
    config_class, read = READERS[command]
    with pytest.raises(SystemExit) as stop:
        run(config_class, read, command, argv=words)
    judge(case, stop.value.code, capsys.readouterr().err)


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_bad_input_ends_the_command_in_seconds(case, models, tmp_path):
    command, *words = prepare(case, models, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", f"openrlhf.cli.{command}", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    judge(case, done.returncode, done.stderr)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
