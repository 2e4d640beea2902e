"""The console script: every command under its short name, as its module would be, and quick to ask."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from openrlhf.cli.main import COMMANDS, main
from openrlhf.cli.report import named
from tests.cli.supervised import ROOT, environment

HEAVY = "{'torch', 'ray', 'vllm', 'transformers', 'deepspeed', 'datasets', 'tyro'}"


def call(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "openrlhf.cli.main", *words],
        capture_output=True, text=True, timeout=120, env=environment(), cwd=ROOT,
    )  # fmt: skip


def test_help_lists_every_command_and_imports_nothing():
    program = f"import sys; from openrlhf.cli.main import main; main(['--help']); print({HEAVY} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment(), cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert re.findall(r"^  ([\w-]+) ", done.stdout, flags=re.M) == list(COMMANDS)


def test_a_command_gets_the_words_behind_its_name(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    main(["sft", "--pretrain", "m", "--dataset", "d", "--output_key", "a", "--dry_run"])
    assert "pretrain = 'm'" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_help(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert not stop.value.code and "--dry_run" in capsys.readouterr().out


def test_an_error_of_a_command_keeps_its_exit_status():
    done = call("rm", "--pretran", "m")
    assert done.returncode == 2 and "did you mean --pretrain?" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("word", "says"), [("stf", "did you mean sft?"), ("xyz", "openrlhf --help lists the commands")]
)
def test_an_unknown_command_is_an_error(word, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main([word])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: openrlhf {word}: there is no such command: {says}\n"


def test_the_version_is_that_of_the_package(capsys):
    main(["--version"])
    assert capsys.readouterr().out.strip() == (ROOT / "version.txt").read_text().strip()


def test_the_report_of_a_run_is_written_anew(tmp_path):
    rows = [{"phase": "train", "step": step, "loss": 1 / step, "time": step} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call("report", str(tmp_path))
    assert done.returncode == 0 and done.stdout == f"report in {tmp_path / 'report.html'}\n"
    assert "loss" in (tmp_path / "report.html").read_text()
    missing = call("report", str(tmp_path / "nowhere"))
    assert missing.returncode == 2 and "there is no such folder" in missing.stderr


def test_folders_of_a_report_need_no_flag():
    assert named(["a", "b", "--dry_run"]) == ["--runs", "a", "b", "--dry_run"]
    assert named(["--runs", "a"]) == ["--runs", "a"]
