"""Run a function in several processes, with the environment that a launcher would give them.

    results = run_ranks("tests.strategy.programs:gradients", 2, stage=3)

Each process calls ``gradients(stage=3)``; the results come back in rank order.
"""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.helpers import free_ports

ROOT = Path(__file__).resolve().parents[2]


def run_ranks(target: str, world: int, *, timeout: float = 240, check: bool = True, **arguments: Any) -> list[Any]:
    """Call ``module:function(**arguments)`` in ``world`` processes and return what each returned.

    ``arguments`` must fit into JSON, results must pickle. Every process ends with the first that fails. With ``check``
    a failure raises ``AssertionError`` with the last lines of every process; without it the failed ranks' text is
    their result.
    """
    with tempfile.TemporaryDirectory() as folder:
        [port] = free_ports(1)
        processes = [_start(target, rank, world, port, arguments, Path(folder)) for rank in range(world)]
        try:
            _wait(processes, timeout, stop_on_failure=check)
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()
        failed = any(process.returncode for process in processes)
        if failed and check:
            texts = [Path(folder, f"{rank}.log").read_text()[-3000:] for rank in range(world)]
            codes = [process.returncode for process in processes]
            raise AssertionError(f"{target} ended with {codes}:\n" + "\n--- next rank ---\n".join(texts))
        return [_result(Path(folder), rank) for rank in range(world)]


def _start(target: str, rank: int, world: int, port: int, arguments: dict, folder: Path) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "tests.strategy.ranks",
        target,
        json.dumps(arguments),
        str(folder / f"{rank}.out"),
    ]
    with (folder / f"{rank}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def _wait(processes: list[subprocess.Popen], timeout: float, stop_on_failure: bool) -> None:
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if stop_on_failure and any(process.poll() for process in processes):
            return
        time.sleep(0.05)


def _result(folder: Path, rank: int) -> Any:
    output = folder / f"{rank}.out"
    return pickle.loads(output.read_bytes()) if output.exists() else (folder / f"{rank}.log").read_text()


def main() -> None:
    """Run one rank: ``ranks.py module:function JSON-arguments result-file``."""
    target, arguments, output = sys.argv[1:]
    module, name = target.split(":")
    result = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(output).write_bytes(pickle.dumps(result))
    sys.stdout.flush()
    # Threads of gloo may still listen to a rank that is gone; they would abort an ordinary exit.
    os._exit(0)


if __name__ == "__main__":
    main()
