"""What CONTRIBUTING.md shows is what the code is."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not shutil.which("git"), reason="takes the diff back with git")
def test_every_diff_that_contributors_are_shown_can_be_taken_back_from_the_code(tmp_path):
    diffs = re.findall(r"^```diff\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(diffs) == 1
    for diff in diffs:
        for name in re.findall(r"^--- a/(.*)$", diff, flags=re.MULTILINE):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
        words = ["git", "apply", "--reverse", "-"]
        done = subprocess.run(words, input=diff, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "group_norm" not in (tmp_path / "openrlhf/ops/advantages.py").read_text()
