"""Where a run writes and what a person sees of it: run folder, terminal, log file, start-up summary.

From :func:`open_run` on, everything that libraries write to stdout or stderr, C libraries included, goes to
``<run_path>/log.txt``; our own lines go to the terminal, and to the log too. Light to import: no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf.config.arguments import to_flat_dict
from openrlhf.config.groups import CheckpointConfig, run_folder
from openrlhf.config.memory import frozen, trained
from openrlhf.config.needs import frozen_sharding, sharding_of
from openrlhf.config.plan import step_text, total_text
from openrlhf.datasets.preview import sample_lines
from openrlhf.errors import InfraError
from openrlhf.strategy import files
from openrlhf.strategy.lock import FolderLock
from openrlhf.trainer.console import OURS, Console, noise_to, our_lines

LOG_NAME = "log.txt"


@dataclass(frozen=True)
class Run:
    """An open run: its folder, its terminal, and its configuration without secrets."""

    path: Path
    rank: int
    console: Console
    flags: dict[str, Any]

    def say(self, *lines: str) -> None:
        """Write lines to the terminal (rank 0) and to the log."""
        for line in lines:
            OURS.info(line)

    def phase(self, name: str) -> None:
        """Note in the log what the run begins to do, for who wonders where it stands or stopped."""
        OURS.debug("phase: %s", name)


@contextmanager
def open_run(config: Any, program: str) -> Iterator[Run]:
    """Make the run folder, write ``config.json``, and send the noise of libraries to the log until the block ends.

    An error inside the block is written to the log with its traceback and raised on, with the terminal restored. Rank
    0 locks the folders that the run writes to: a second run in them gets a ``UsageError``, a folder that cannot be
    written an ``InfraError``.
    """
    rank = int(os.environ.get("RANK", "0"))
    folder = Path(run_folder(config.checkpoint.save_path, config.logging.run_path))
    flags = to_flat_dict(config)
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            said = _claim(config.checkpoint, folder, held) if rank == 0 else []
            if rank == 0:
                (folder / "config.json").write_text(json.dumps({"program": program, **flags}, indent=2) + "\n")
        except OSError as error:
            raise InfraError(f"cannot write the run folder {folder} (--run_path, --save_path): {error}") from error
        log_file = folder / (LOG_NAME if rank == 0 else f"log.rank{rank}.txt")
        terminal = held.enter_context(noise_to(log_file))
        console = held.enter_context(our_lines(Console(terminal, quiet=rank != 0)))
        OURS.debug("%s, process %d, rank %d", program, os.getpid(), rank)
        run = Run(folder, rank, console, flags)
        run.say(*said)
        yield run


def _claim(config: CheckpointConfig, run_path: Path, held: ExitStack) -> list[str]:
    """Lock the folders of a run until ``held`` closes, and write to each; return what to tell."""
    # By where they really are: this process would get the lock of one folder twice, and give it back once.
    places = {run_path.resolve(): (run_path, "--run_path, --save_path")}
    checkpoints = Path(config.ckpt_path)
    try:
        files.probe(files.nearest_folder(Path(config.save_path)))
        if not config.disable_ds_ckpt or config.save_hf_ckpt:
            checkpoints.mkdir(parents=True, exist_ok=True)
            files.probe(checkpoints)
            places.setdefault(checkpoints.resolve(), (checkpoints, "--ckpt_path"))
    except OSError as error:
        raise InfraError(
            f"cannot write to --save_path {config.save_path} and --ckpt_path {checkpoints}: {error}"
        ) from error
    said = []
    for place, flags in places.values():
        lock = FolderLock(place, flags)
        said.append(lock.acquire())
        held.callback(lock.release)
    return [line for line in said if line]


def start_up_lines(config: Any, run: Run, strategy: Any, model: Any, train_data: Any, eval_data: Any) -> list[str]:
    """Return what a person wants to know before a supervised run starts.

    ``config`` is a supervised command's configuration, ``model`` the module before it is prepared for training.
    """
    return [
        f"run      {run.path} ({LOG_NAME} there takes what libraries print)",
        _place_line(config, strategy),
        _data_line(train_data, eval_data),
        *sample_lines(train_data),
        f"batch    {step_text(config.batch, strategy.world_size, 'rows', strategy.ring.size)}",
        f"         {total_text(config.batch, len(train_data))}",
        _model_line(config, strategy.world_size, model),
    ]


def _place_line(config: Any, strategy: Any) -> str:
    ranks = f"{strategy.world_size} rank{'s' if strategy.world_size > 1 else ''} on {strategy.device.type}"
    precision = "bf16 weights, fp32 master" if config.model.bf16 else "fp32"
    return f"where    {ranks}, ZeRO-{config.deepspeed.zero_stage}, {precision}"


def _data_line(train_data: Any, eval_data: Any) -> str:
    return f"data     {len(train_data):,} rows to train, {len(eval_data):,} to evaluate"


def _model_line(config: Any, world_size: int, model: Any) -> str:
    from openrlhf.models.adapters import parameter_counts

    total, learning = parameter_counts(model)
    return f"model    {config.model.pretrain}: {learning_text(config, world_size, total, learning)}"


def learning_text(config: Any, ranks: int, total: int, learning: int) -> str:
    """Return how many parameters learn, and what they need in memory on one of ``ranks``."""
    needed = trained(total, learning, sharding_of(config, ranks))
    beside = f", and {_size(needed.host)} of main memory" if needed.host else ""
    return (
        f"{total:,} parameters, {learning:,} trained; about {_size(needed.device)} a rank for weights, gradients and "
        f"Adam{beside}, activations on top"
    )


def frozen_line(config: Any, world_size: int, path: str, flag: str, model: Any, offload: bool) -> str:
    """Return what ``model`` of ``path``, named by ``flag``, takes beside the trained one; it never learns.

    ``offload`` keeps its shards in main memory.
    """
    from openrlhf.models.adapters import parameter_counts

    total, _ = parameter_counts(model)
    needed = frozen(total, frozen_sharding(config, world_size, offload))
    where = " in main memory" if needed.host else ""
    size = _size(needed.device + needed.host)
    return f"frozen   {path} ({flag}): {total:,} parameters; about {size} more a rank{where}"


def _size(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
