"""What is said of a process that is gone."""

from __future__ import annotations

import pytest

from openrlhf.ray import obituary
from openrlhf.ray.host import Sign
from openrlhf.ray.obituary import how_it_died

TABLE = (
    "The actor died unexpectedly before finishing this task.\n\tclass_name: WorkerHost\n\tpid: 444\n\tip: 10.0.0.7\n"
)
VANISHED = (
    f"{TABLE}Worker exit type: SYSTEM_ERROR Worker unexpectedly exits with a connection error code 2. End of file."
)
SEEN = Sign(pid=444, headway=None, memory=3 * 2**29)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """The log of the process, as Ray keeps it on this machine."""
    path = tmp_path / "worker-444.err"
    monkeypatch.setattr(obituary, "_log_of", lambda process: path if process == "444" else None)
    return path


@pytest.mark.parametrize(
    ("written", "cause"),
    [
        (":job_id:01000000\n", "was ended by SIGKILL, as the system does when memory runs out"),
        ("*** SIGSEGV received at time=1790000000 on cpu 0 ***\nFatal Python error\n", "was ended by SIGSEGV"),
    ],
)
def test_its_number_signal_memory_and_log_are_named(written, cause, log):
    log.write_text(written)
    said = how_it_died(RuntimeError(VANISHED), SEEN)
    assert said == f"Process 444 {cause}; it held 1.50 GiB when last seen; its log: {log}"


def test_of_a_process_of_another_machine_the_machine_is_named():
    said = how_it_died(RuntimeError(VANISHED), None)
    assert said == "Process 444 was killed, or crashed; its log is in Ray's folder of the machine 10.0.0.7"


def test_what_ray_knows_better_is_passed_on():
    said = how_it_died(RuntimeError(f"{TABLE}The actor died because its node has died. Node Id: ab"), SEEN)
    assert "Process 444 ended: " in said and "its node has died. Node Id: ab" in said
