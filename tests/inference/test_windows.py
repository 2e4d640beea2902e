"""The file of results and what can befall it: cuts at every byte, other keys, a second process, no disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf.errors import InfraError
from openrlhf.inference.windows import WindowFile

UIDS = ["0", "1", "2", "3", "4"]
RESULTS = ["a\n", "Ω", "\ud800", "", "e"]
ROWS = [{"output": result} for result in RESULTS]
SPEED = {"micro_batch_size": 16, "window_size": 2}


class Heard(list):
    """The lines that were said."""

    def __call__(self, line: str) -> None:
        self.append(line)


def finish(output: Path, key: str = "k", most: int = 3, size: int = 2, **speed) -> list[str]:
    """Do windows of ``size`` rows, ``most`` with those of earlier processes; publish when all rows are done. Return
    what was said.
    """
    heard = Heard()
    file = WindowFile(output, key, SPEED | speed, UIDS, heard)
    for start in range(file.done, min(size * most, len(UIDS)), size):
        file.add(RESULTS[start : start + size])
    if file.done == len(UIDS):
        file.publish({"output": result} for result in file.results)
    file.close()
    return heard


def test_an_undisturbed_file_holds_the_rows_and_nothing_stays_beside_it(tmp_path):
    assert finish(tmp_path / "new" / "out.jsonl") == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.jsonl"]
    lines = (tmp_path / "new" / "out.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == ROWS
    assert "Ω".encode() in lines[1] and b"\\ud800" in lines[2]


def test_a_file_cut_at_any_byte_is_finished_as_if_nothing_had_happened(tmp_path):
    finish(tmp_path / "whole.jsonl")
    finish(tmp_path / "out.jsonl", most=2)
    partial = tmp_path / "out.jsonl.partial"
    content = partial.read_bytes()
    assert content.count(b"\n") == 3
    for length in range(len(content) + 1):
        partial.write_bytes(content[:length])
        finish(tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
        assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "whole.jsonl"}


def test_a_window_of_other_bytes_and_what_is_behind_it_are_done_again(tmp_path):
    finish(tmp_path / "whole.jsonl")
    finish(tmp_path / "out.jsonl", most=2)
    partial = tmp_path / "out.jsonl.partial"
    header, first, second = partial.read_bytes().splitlines(keepends=True)
    nothing = b'{"uids": ["0"], "results": null}\n'
    for damaged in (b"\0" * 9 + b"\n", b"[1]\n", second, first.replace(b'"a', b'0, "a'), nothing):
        partial.write_bytes(header + damaged + second)
        finish(tmp_path / "out.jsonl")
        assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_windows_that_are_there_are_not_done_again(tmp_path):
    finish(tmp_path / "out.jsonl", most=2)
    said = finish(tmp_path / "out.jsonl", most=2)
    assert said == [f"going on behind the 4 rows that {tmp_path / 'out.jsonl.partial'} holds"]
    assert (tmp_path / "out.jsonl.partial").read_bytes().count(b"\n") == 3


def test_windows_of_another_key_are_moved_aside_and_kept(tmp_path):
    finish(tmp_path / "out.jsonl", most=2)
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    said = finish(tmp_path / "out.jsonl", key="other")
    aside = [path for path in tmp_path.iterdir() if path.name.startswith("out.jsonl.partial-")]
    assert len(aside) == 1 and aside[0].read_bytes() == before
    assert said[0].startswith("starting afresh") and aside[0].name in said[0]
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 5


def test_windows_of_another_speed_are_kept_and_their_flags_told(tmp_path):
    finish(tmp_path / "whole.jsonl")
    finish(tmp_path / "out.jsonl", most=2)
    said = finish(tmp_path / "out.jsonl", size=3, micro_batch_size=4, window_size=3)
    assert said == [
        f"going on behind the 4 rows that {tmp_path / 'out.jsonl.partial'} holds",
        "these were made with --micro_batch_size 16, --window_size 2: what comes now may differ by rounding, no more",
    ]
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "whole.jsonl"}


def test_an_older_output_stays_until_the_new_one_is_whole(tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("old")
    finish(output, most=2)
    assert output.read_text() == "old"
    finish(output)
    assert output.read_bytes().count(b"\n") == 5


def test_a_second_process_is_refused_while_the_first_one_writes(tmp_path):
    output = tmp_path / "out.jsonl"
    file = WindowFile(output, "k", SPEED, UIDS, Heard())
    program = (
        "import sys; from pathlib import Path; from openrlhf.inference.windows import WindowFile\n"
        f"WindowFile(Path({str(output)!r}), 'k', {{}}, {UIDS!r}, print)"
    )
    second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "UsageError" in second.stderr and "another process is writing this file" in second.stderr
    file.close()
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == 0


def test_a_disk_that_refuses_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InfraError, match="--output_path .* cannot be written"):
        WindowFile(tmp_path / "file" / "out.jsonl", "k", SPEED, UIDS, Heard())
    file = WindowFile(tmp_path / "out.jsonl", "k", SPEED, UIDS, Heard())
    file.add(RESULTS[:2])
    (tmp_path / ".out.jsonl.whole").mkdir()
    with pytest.raises(InfraError, match="the same command goes on behind what is in out.jsonl.partial"):
        file.publish(ROWS)
