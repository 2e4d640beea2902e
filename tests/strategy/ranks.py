"""Run a function in several processes, with the environment that a launcher would give them.

    results = run_ranks("tests.strategy.programs:gradients", 2, stage=3)

Each process calls ``gradients(stage=3)``; the results come back in rank order. They are forks of one process that has
imported the large libraries, which takes each of them longer than most programs.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from openrlhf.device import gpu_present
from tests.helpers import free_ports

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = ["torch", "transformers.models.qwen2.modeling_qwen2", "deepspeed"]


def run_ranks(
    target: str, world: int, *, timeout: float = 240, check: bool = True, fresh: bool = False, **arguments: Any
) -> list[Any]:
    """Call ``module:function(**arguments)`` in ``world`` processes and return what each returned.

    ``arguments`` must fit into JSON, results must pickle. Every process ends with the first that fails. With ``check``
    a failure raises ``AssertionError`` with the last lines of every process; without it the failed ranks' text is
    their result. With ``fresh`` they are no forks: for variables that count when a process starts.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes: list[BaseProcess] = []
        try:
            _start(processes, target, world, arguments, Path(folder), fresh)
            _wait(processes, timeout, stop_on_failure=check)
        finally:
            for process in processes:
                if process.exitcode is None:
                    process.kill()
                process.join()
        failed = any(process.exitcode for process in processes)
        if failed and check:
            texts = [Path(folder, f"{rank}.log").read_text()[-3000:] for rank in range(world)]
            codes = [process.exitcode for process in processes]
            raise AssertionError(f"{target} ended with {codes}:\n" + "\n--- next rank ---\n".join(texts))
        return [_result(Path(folder), rank) for rank in range(world)]


def _start(processes: list[BaseProcess], target: str, world: int, arguments: dict, folder: Path, fresh: bool) -> None:
    """Add every process to ``processes`` as soon as it runs."""
    [port] = free_ports(1)
    # Libraries read these when they are imported, which the first call lets the process do that is forked.
    read = {"OMP_NUM_THREADS": "1"} if gpu_present() else {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with patch.dict(os.environ, read):
        for rank in range(world):
            environment = {**os.environ, **_of_launcher(rank, world, port)}
            words = (target, json.dumps(arguments), environment, str(folder / str(rank)))
            Path(f"{words[-1]}.log").touch()  # it may end before it writes there
            process = _context(fresh).Process(target=_run, args=words)
            process.start()
            processes.append(process)


def _context(fresh: bool) -> BaseContext:
    # CUDA does not survive a fork.
    if fresh or gpu_present():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _of_launcher(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def _wait(processes: list[BaseProcess], timeout: float, stop_on_failure: bool) -> None:
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if stop_on_failure and any(process.exitcode for process in processes):
            return
        time.sleep(0.05)


def _result(folder: Path, rank: int) -> Any:
    output = folder / f"{rank}.out"
    return pickle.loads(output.read_bytes()) if output.exists() else (folder / f"{rank}.log").read_text()


def _run(target: str, arguments: str, environment: dict[str, str], place: str) -> None:
    """Be one rank: its output goes to ``place.log``, its result to ``place.out``."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(f"{place}.log", "w") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    module, name = target.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(f"{place}.out").write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    # Threads of gloo may still listen to a rank that is gone; they would abort an ordinary exit.
    os._exit(0)
