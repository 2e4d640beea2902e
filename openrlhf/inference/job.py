"""What every task of batch inference does: cut its rows into windows, work on each, keep it, and publish the whole."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from openrlhf.config.arguments import to_flat_dict
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.inference.windows import WindowFile
from openrlhf.models.identity import model_identity
from openrlhf.strategy.comm import Comm, SoloComm
from openrlhf.strategy.signals import PATIENCE_S

INDIFFERENT = {
    *("pretrain", "dataset", "dataset_probs", "dataset_split", "max_samples"),  # their content counts
    *("output_path", "local_rank", "collective_timeout", "use_ms"),
    *("post_processor", "normalize_reward", "reward_template"),  # they come behind
}
"""Flags that results do not depend on by their value."""
SPEED = ("micro_batch_size", "max_num_seqs", "tp_size", "zero_stage", "enable_prefix_caching", "window_size")
"""Flags that results depend on by rounding only, such as one changes after running out of memory."""
PACKAGES = ("torch", "transformers", "vllm")


class Task(Protocol):
    """A kind of work on rows.

    Attributes:
        rows: what is worked on; each has a ``uid``.
    """

    rows: Sequence[Any]

    def work(self, rows: Sequence[Any]) -> list[Any]:
        """Return the result of each row, fit for JSON; all ranks call it with the same rows and get all results."""

    def lines(self, results: Sequence[Any]) -> Sequence[dict]:
        """Return the lines of the output, given the results of all rows."""

    def summary(self, results: Sequence[Any]) -> str:
        """Return a line for the user."""


@dataclass(frozen=True)
class Voice:
    """How a job talks: lines that stay, and one that shows where it stands."""

    say: Callable[[str], None]
    status: Callable[[str], None]


def run_job(
    config: BatchInferenceConfig, task: Task, voice: Voice, load: Callable[[], None], comm: Comm | None = None
) -> None:
    """Work on the rows that are not done yet and publish ``--output_path``; all ranks of ``comm`` call it.

    ``load()`` loads the model, where there is work to do.

    Raises:
        InfraError: the output cannot be written.
        UsageError: another process is writing it.
    """
    comm, rows = comm or SoloComm(), task.rows
    file = None
    if comm.rank == 0:
        uids, key, speed = [row.uid for row in rows], job_key(config, rows), speed_flags(config)
        file = WindowFile(Path(config.output_path), key, speed, uids, voice.say)
    comm.barrier("what the first rank reads", PATIENCE_S)  # every weight, for the key
    done = comm.broadcast_object(file.done if file else None)
    if done < len(rows):
        load()
    clock = time.monotonic()
    for start in range(done, len(rows), config.window_size):
        end = min(start + config.window_size, len(rows))
        results = task.work([rows[index] for index in range(start, end)])
        if file:
            file.add(results)
            voice.status(_progress(end, len(rows), end - done, time.monotonic() - clock))
    if file:
        results = file.results
        lines = task.lines(results)
        file.publish(lines)
        file.close()
        voice.say(task.summary(results))
        voice.say(f"done: {len(lines):,} lines in {file.output}")
    comm.barrier("the end")


def job_key(config: BatchInferenceConfig, rows: Sequence[Any]) -> str:
    """Return a hash of all that the results of ``rows`` depend on by more than rounding."""
    indifferent = {*INDIFFERENT, *SPEED}
    flags = {name: value for name, value in to_flat_dict(config).items() if name not in indifferent}
    path = config.model.pretrain
    versions = [_version(package) for package in PACKAGES]
    parts = (flags, model_identity(path) or path, fingerprint(rows), versions)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def speed_flags(config: BatchInferenceConfig) -> dict[str, Any]:
    """Return the flags that results depend on by rounding only."""
    flags = to_flat_dict(config)
    return {name: flags[name] for name in SPEED}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _progress(done: int, total: int, fresh: int, seconds: float) -> str:
    """Return where the job stands after ``done`` rows, of which this process did ``fresh``."""
    pace = fresh / max(seconds, 1e-9)
    return f"{done:,} of {total:,} rows, {pace:.1f} a second, about {(total - done) / pace:,.0f} s left"
