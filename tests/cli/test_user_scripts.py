"""Scripts that users of OpenRLHF 0.5 have run through their own launchers, with ``--dry_run`` added.

The forms are made from the example scripts: DeepSpeed's launcher by module and by path, a job of a Ray cluster, a W&B
key, and ModelScope. ``OPENRLHF_USER_SCRIPTS=DIR`` names a folder of further scripts to run as they are.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.supervised import ROOT, environment
from tests.test_documented_commands import check, commands_of

EXAMPLES = ROOT / "examples/scripts"
GIVEN = os.environ.get("OPENRLHF_USER_SCRIPTS", "")
BY_MODULE = "deepspeed --module openrlhf.cli.train_ppo"
BY_PATH = "deepspeed --master_port 61000 openrlhf/cli/train_ppo.py"
KEY, MODELSCOPE = " \\\n   --use_wandb {wandb_token}", " \\\n   --load_checkpoint \\\n   --use_ms"
FORMS = {
    "train_sft.sh": ("train_sft_llama.sh", KEY),
    "train_sft_modelscope.sh": ("train_sft_llama.sh", MODELSCOPE + KEY),
    "train_rm.sh": ("train_rm_llama.sh", KEY),
    "train_ppo.sh": ("train_ppo_llama.sh", KEY),
    "train_ppo_modelscope.sh": ("train_ppo_llama.sh", KEY + MODELSCOPE),
    "train_ppo_ray.sh": ("train_ppo_llama_ray.sh", KEY),
}
IN_CI = ("train_sft.sh", "train_ppo_modelscope.sh")
JOBS = 8265
"""The port at which such scripts hand in their jobs."""
TOKEN = secrets.token_hex(32)
FOLDER = Path("/openrlhf")
"""The clone of such scripts."""


def form(name: str) -> str:
    """Return a script of one of the forms."""
    source, flags = FORMS[name]
    text = (EXAMPLES / source).read_text(encoding="utf-8").rstrip() + flags + "\n"
    text = re.sub(r"^\[ .*SMOKE.*\n", "", text, flags=re.M)
    return text.replace(BY_MODULE, BY_PATH) if name == "train_ppo_modelscope.sh" else text


def given() -> list[Path]:
    """Return further scripts, of users; none unless a folder is named."""
    return sorted(Path(GIVEN).glob("*.sh")) if GIVEN else []


def texts() -> dict[str, str]:
    """Return all scripts by name: the forms, and the given ones."""
    return {name: form(name) for name in FORMS} | {f"given/{path.name}": path.read_text() for path in given()}


def dry(text: str, path: Path) -> Path:
    """Write a script with ``--dry_run`` added to its last command, and nothing else changed."""
    path.write_text(text.rstrip() + " --dry_run\n", encoding="utf-8")
    return path


def launching() -> dict[str, str]:
    """Return the environment of who has activated the one of these tests and has a token for Ray clusters."""
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    return {**environment(), **ray, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def output_of(script: Path) -> str:
    """Run a script from the clone; return what it printed."""
    done = subprocess.run(
        ["bash", str(script)], cwd=ROOT, env=launching(), timeout=400, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def steps_planned(output: str) -> bool:
    return re.search(r"^plan:\n(.+\n)*? .*an optimizer step is \d+", output, flags=re.M) is not None


LAUNCHED = [name for name in texts() if "ray job submit" not in texts()[name]]
JOBS_OF_RAY = [name for name in texts() if name not in LAUNCHED]


@pytest.mark.parametrize("name", texts())
def test_its_flags_are_known(name):
    [(command, arguments)] = commands_of(re.sub(r"openrlhf/cli/(\w+)\.py", r"openrlhf.cli.\1", texts()[name]))
    check(command, arguments)


@pytest.mark.timeout(450)
@pytest.mark.parametrize(
    "name", [each if each in IN_CI else pytest.param(each, marks=pytest.mark.full) for each in LAUNCHED]
)
def test_the_launcher_of_deepspeed_starts_it(name, tmp_path):
    assert steps_planned(output_of(dry(texts()[name], tmp_path / "script.sh")))


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_ray_cluster_takes_it_as_a_job(tmp_path):
    with clone_at(FOLDER), ray_head():
        for name in JOBS_OF_RAY:
            output = output_of(dry(texts()[name], tmp_path / "script.sh"))
            assert steps_planned(output) and "succeeded" in output


def test_the_folder_of_further_scripts_holds_some():
    if not GIVEN:
        pytest.skip("OPENRLHF_USER_SCRIPTS names no folder of further scripts to run")
    assert given(), f"OPENRLHF_USER_SCRIPTS names {GIVEN}, which holds no .sh file"


@contextmanager
def clone_at(place: Path) -> Iterator[None]:
    """Make a link to this clone at ``place``, unless it is there."""
    if place.exists():
        if place.resolve() != ROOT:
            pytest.skip(f"{place} is something else than this clone")
        yield
        return
    try:
        place.symlink_to(ROOT)
    except OSError as error:
        pytest.skip(f"no link can be made at {place}: {error}")
    try:
        yield
    finally:
        place.unlink()


@contextmanager
def ray_head() -> Iterator[None]:
    """Start a Ray cluster of this machine with eight GPUs on paper; it ends with the block, and no other does."""
    if not port_is_free(JOBS):
        pytest.skip(f"port {JOBS} is taken: a Ray cluster is running here")
    ray = str(Path(sys.executable).with_name("ray"))
    words = [ray, "start", "--head", "--num-gpus", "8", "--node-ip-address", "127.0.0.1", "--block"]
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        log = Path(folder, "start.log")
        with log.open("w") as file:
            head = subprocess.Popen(
                [*words, "--port", "0", "--temp-dir", folder], stdout=file, stderr=subprocess.STDOUT, env=launching()
            )
        try:
            end = time.monotonic() + 180
            while port_is_free(JOBS):
                assert head.poll() is None and time.monotonic() < end, log.read_text()
                time.sleep(0.5)
            yield
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0
