"""The example scripts in their small form: the commands that they show, on tiny models and made-up rows."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.test_documented_commands import commands_of

SCRIPTS = Path(__file__).resolve().parents[2] / "examples/scripts"
ROUNDS = 2
IN_ROUNDS = ("train_iterative_dpo_llama", "train_rejection_sampling_llama")
IN_CI = ("train_llama_slurm", "train_ppo_llama", "serve_remote_rm")
"""A supervised command (the one that SLURM starts is train_sft_llama.sh), PPO, and a server."""
SMALL = re.compile(r"^\[ .*SMOKE.*smoke\.sh", re.M)
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.sh") if SMALL.search(path.read_text(encoding="utf-8")))


def smoke(name: str, folder: Path) -> str:
    """Run the small form of a script with its results in ``folder``; return what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SMOKE": "1", "RUNS": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", f"examples/scripts/{name}.sh"], cwd=SCRIPTS.parents[1], env=environment, text=True, timeout=900,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def shown(name: str) -> list[str]:
    """Return the commands of this project that a script runs, in order."""
    source = "train_sft_llama" if name == "train_llama_slurm" else name
    commands = [command for command, _ in commands_of((SCRIPTS / f"{source}.sh").read_text(encoding="utf-8"))]
    return commands * (ROUNDS if name in IN_ROUNDS else 1)


@pytest.fixture(scope="module")
def in_ci(tmp_path_factory) -> Iterator[dict[str, tuple[Path, Future]]]:
    """The folder and what :func:`smoke` gives of the scripts in :data:`IN_CI`, of which two run at a time."""
    folders = {name: tmp_path_factory.mktemp(name) for name in IN_CI}
    pool = ThreadPoolExecutor(max_workers=2)
    try:
        yield {name: (folder, pool.submit(smoke, name, folder)) for name, folder in folders.items()}
    finally:
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.full) for name in NAMES]
)
def test_the_small_form_of_a_script_runs_its_commands_to_their_end(name, request, tmp_path):
    commands = shown(name)
    if name in IN_CI:
        folder, running = request.getfixturevalue("in_ci")[name]
        output = running.result()
    else:
        folder, output = tmp_path, smoke(name, tmp_path)
    assert re.findall(r"^== .*?openrlhf\.cli\.(\w+)", output, flags=re.M) == commands
    runs = list((folder / "smoke" / name).rglob("metrics.jsonl"))
    trained = [command for command in commands if command.startswith("train_")]
    assert len(runs) == len(trained)
    for path in runs:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        losses = [value for row in rows for key, value in row.items() if key.endswith("loss")]
        assert losses and all(math.isfinite(loss) for loss in losses)
        model = path.parent.with_name(path.parent.name.removesuffix("_run"))
        assert list(model.glob("*.safetensors"))


def test_every_script_that_shows_a_command_has_a_small_form():
    showing = {path.stem for path in SCRIPTS.glob("*.sh") if commands_of(path.read_text(encoding="utf-8"))}
    others = {"train_gsm8k", *(name for name in showing if name.startswith("quickstart"))}
    assert showing - others <= {*NAMES} and {*IN_CI} <= {*NAMES}


def test_sizes_shrink_and_the_other_flags_stay(script, tmp_path, monkeypatch):
    monkeypatch.setenv("SMOKE_DIR", str(tmp_path))
    (tmp_path / "mine.jsonl").write_text("{}\n")
    flags = script("smoke").flags_of(
        f"--train_batch_size 256 --micro_train_batch_size 1 --bf16 --lr 5e-6 --max_len=8192 --save_path /a/b "
        f"--beta 0.1 --dataset {tmp_path / 'mine.jsonl'} --input_template '' --seed 7".split()
    )
    with ExitStack() as stack:
        small = script("smoke").small("train_sft", flags, stack)
    assert small | {"train_batch_size": ["256"], "max_len": ["8192"], "save_path": ["/a/b"]} == flags
    assert (small["train_batch_size"], small["max_len"], small["save_path"]) == (["4"], ["256"], ["a/b"])


def test_the_engines_of_a_script_are_left_out_where_vllm_is_not_installed(script, monkeypatch):
    monkeypatch.setattr(script("smoke"), "find_spec", lambda name: None)
    small = script("smoke").small
    with ExitStack() as stack:
        assert small("train_ppo_ray", {"vllm_num_engines": ["4"]}, stack) == {"vllm_num_engines": ["0"]}
        tasks = [small("batch_inference", {"eval_task": [task]}, stack) for task in ("generate_vllm", "rm")]
    assert tasks == [{"eval_task": ["generate"]}, {"eval_task": ["rm"]}]


@pytest.mark.parametrize("gpu", [True, False])
def test_what_is_in_main_memory_anyway_is_not_offloaded(script, monkeypatch, gpu):
    monkeypatch.setattr(script("smoke"), "gpu_present", lambda: gpu)
    with ExitStack() as stack:
        small = script("smoke").small("train_ppo", {"bf16": [], "adam_offload": []}, stack)
    assert small == ({"bf16": [], "adam_offload": []} if gpu else {"bf16": []})


def test_a_launcher_of_a_cluster_starts_what_it_would_start(script):
    launched = script("smoke").launched
    flags = {"ring_attn_size": ["2"], "bf16": []}
    words = launched("torchrun", "train_dpo", flags)
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node", "2"]
    assert words[4:] == ["--module", "openrlhf.cli.train_dpo", "--ring_attn_size", "2", "--bf16"]
    assert launched("deepspeed", "train_dpo", flags)[:3] == ["deepspeed", "--num_accelerators", "2"]
    assert launched("python3", "train_ppo_ray", {})[1:] == ["-m", "openrlhf.cli.train_ppo_ray"]


def test_what_reaches_beyond_the_machine_is_shown_only(script, capfd):
    assert script("smoke").run(["sudo", "rm", "-r", "/some where"]) == 0
    assert capfd.readouterr().out == "== not run here: sudo rm -r '/some where'\n"


def test_every_row_has_the_columns_that_the_scripts_name(script):
    rows_like = script("smoke_inputs").rows_like
    for name in NAMES:
        for _, words in commands_of((SCRIPTS / f"{name}.sh").read_text(encoding="utf-8")):
            flags = script("smoke").flags_of(words)
            keys = [values[0] for key, values in flags.items() if key.endswith("_key") and values[0]]
            for data in [*flags.get("dataset", []), *flags.get("prompt_data", [])]:
                if not data.startswith("$"):
                    assert all({*keys} <= {*row} for row in rows_like(data)), (name, data)
