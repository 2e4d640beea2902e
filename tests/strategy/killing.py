"""Kill a process in the middle of a save, at every operation on the disk or at any moment, and see what is left.

    python -m tests.strategy.killing {supervised,ppo} {operations,moments} FOLDER EVERY

One process imports the heavy libraries and forks the others, which costs milliseconds. Prints one JSON object.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import pickle
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

WATCHED = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink", "remove")
SEED = 7


class Operations:
    """Counts the operations on the disk of this process, and kills it at number ``kill_at``; a write is torn then."""

    def __init__(self, kill_at: int | None = None):
        self.kill_at = kill_at
        self.names: list[str] = []

    def touch(self, name: str, half: Callable[[], Any] = lambda: None) -> None:
        self.names.append(name)
        if len(self.names) == self.kill_at:
            half()
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count inside the block."""
        import torch

        originals = [(os, name, getattr(os, name)) for name in WATCHED]
        originals += [(builtins, "open", builtins.open), (io, "open", io.open), (torch, "save", torch.save)]
        for name in WATCHED:
            setattr(os, name, self._counted(name, getattr(os, name)))
        builtins.open = io.open = self._opener(io.open)
        torch.save = self._saver(torch.save)
        try:
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _counted(self, name: str, original: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.touch(name)
            return original(*args, **kwargs)

        return call

    def _opener(self, original: Callable) -> Callable:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if "w" not in mode:
                return original(file, mode, *args, **kwargs)
            self.touch("open")
            binary = io.BufferedWriter(CountedFile(self, file))
            return binary if "b" in mode else io.TextIOWrapper(binary, encoding="utf-8")

        return call

    def _saver(self, original: Callable) -> Callable:
        """torch.save writes below Python; through a file of ours each of its writes is seen."""

        def call(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            with open(file, "wb") as opened:
                original(value, opened, *args, **kwargs)

        return call


class CountedFile(io.FileIO):
    """A file whose every write is an operation."""

    def __init__(self, operations: Operations, path: Any):
        super().__init__(path, "w")
        self._operations = operations

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._operations.touch("write", lambda: super(CountedFile, self).write(view[: len(view) // 2]))
        return super().write(view)


def forked(action: Callable[[], Any], moment: Callable[[], Any] | None = None) -> tuple[int, Any]:
    """Run ``action`` in a copy of this process; return its wait status and what it returned, None if it was killed.

    It is killed when ``moment``, called here, returns.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        status = 1
        try:
            os.write(writer, pickle.dumps(action()))
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    if moment is not None:
        moment()
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return status, pickle.loads(answer) if answer and status == 0 else None


def result_of(action: Callable[[], Any]) -> Any:
    """Return what ``action`` returns in a copy of this process, which must not fail."""
    status, result = forked(action)
    if status:
        raise RuntimeError(f"a copy of this process ended with {status}")
    return result


class Run:
    """A small run that saves after every step. ``BEFORE`` steps are saved before the one that is killed."""

    BEFORE = 3

    def whole(self, folder: Path, stop_after: int | None, operations: Operations | None = None) -> Any:
        """Go on from what is in ``folder`` to the end, or up to a step; return first step, last step and weights.

        The operations of the first save are counted.
        """
        raise NotImplementedError


class Supervised(Run):
    """The supervised loop on a toy, with dropout, exports and DeepSpeed's own files; 2 checkpoints are kept."""

    def whole(self, folder: Path, stop_after: int | None, operations: Operations | None = None) -> Any:
        from openrlhf.config.groups import DeepSpeedConfig
        from openrlhf.strategy.deepspeed import DeepSpeedStrategy
        from tests.trainer.test_loop import Cut, CutAfter, checkpointing, toy, weights_of

        strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=1), bf16=False, micro_batch_size=1)
        strategy.setup_distributed()
        saving = checkpointing(strategy, folder, save_steps=1, max_ckpt_num=2, save_hf_ckpt=True, load_checkpoint=True)
        watched = Watched(saving, operations, folder)
        trainer, _ = toy(strategy, dropout=0.5, epochs=3, callbacks=[watched, CutAfter(stop_after)])
        with suppress(Cut):
            trainer.fit()
        return watched.first, trainer.global_step, weights_of(trainer).tolist()


class PPO(Run):
    """The PPO loop on a tiny policy and a critic."""

    BEFORE = 1

    def whole(self, folder: Path, stop_after: int | None, operations: Operations | None = None) -> Any:
        from dataclasses import replace

        from openrlhf.config.groups import CheckpointConfig
        from openrlhf.config.ppo import AlgorithmConfig
        from openrlhf.trainer.callbacks import Callbacks
        from tests.trainer.ppo.harness import local_loop, tiny_ppo_config, with_rollout

        home = folder.parent
        config = tiny_ppo_config(home, algorithm=AlgorithmConfig(advantage_estimator="gae"))
        config = with_rollout(config, num_episodes=3, rollout_batch_size=8)
        checkpoint = CheckpointConfig(ckpt_path=str(folder), save_steps=1, max_ckpt_num=1, load_checkpoint=True)
        loop, recorder = local_loop(replace(config, checkpoint=checkpoint), prompts=8, stop_after=stop_after)
        evaluation, saving, _ = loop.callbacks._callbacks
        watched = Watched(saving, operations, folder)
        loop.callbacks = Callbacks([evaluation, watched, recorder])
        with suppress(KeyboardInterrupt):
            loop.fit()
        workers = (loop.roles.policy.worker, loop.roles.critic.worker)
        weights = [tensor.double().sum().item() for worker in workers for _, tensor in worker.engine.named_weights()]
        return watched.first, loop.global_step, weights


def Watched(saving: Any, operations: Operations | None, folder: Path) -> Any:
    """Return a callback that does what ``saving`` does, counts its first save, and writes down what it saved."""
    from openrlhf.trainer.callbacks import Callback

    class Watching(Callback):
        first = -1
        counted = operations

        def restore(self, trainer: Any) -> None:
            saving.restore(trainer)
            self.first = trainer.global_step + 1

        def on_step_end(self, trainer: Any, metrics: Any) -> None:
            if self.counted is None:
                saving.on_step_end(trainer, metrics)
            else:
                with self.counted.watching():
                    saving.on_step_end(trainer, metrics)
                self.counted = None
            with note_of(folder).open("a") as note:
                note.write(f"{trainer.global_step} {time.monotonic()}\n")

    return Watching()


def drill_operations(run: Run, folder: Path, every: int) -> dict[str, Any]:
    """Kill a save at each ``every``-th operation, resume, and compare the end with that of an uninterrupted run."""
    base = folder / "base"
    _, steps, expected = result_of(lambda: run.whole(folder / "straight", None))
    result_of(lambda: run.whole(base, run.BEFORE))
    counting, step = Operations(), run.BEFORE + 1

    def counted() -> list[str]:
        run.whole(copy_of(base, folder / "counted"), step, counting)
        return counting.names

    names = result_of(counted)
    torn = []
    points = range(1, len(names) + 1, every)
    for at in points:
        copy = copy_of(base, folder / f"at{at}")
        status, _ = forked(lambda at=at, copy=copy: run.whole(copy, step, Operations(at)))
        first, last, weights = result_of(lambda copy=copy: run.whole(copy, None))
        leftovers = [path.name for path in copy.iterdir() if path.name.endswith((".tmp", ".old", ".part"))]
        if (
            status != signal.SIGKILL
            or first not in (step, step + 1)
            or (last, weights) != (steps, expected)
            or leftovers
        ):
            torn.append((at, names[at - 1], status, first, leftovers))
    return {"operations": len(names), "killed": len(points), "torn": torn, "kinds": sorted(set(names))}


def drill_moments(run: Run, folder: Path, times: int) -> dict[str, Any]:
    """Kill a run at random moments between its first and its last save, resume, and compare the ends."""
    straight = folder / "straight"
    _, steps, expected = result_of(lambda: run.whole(straight, None))
    seconds = saves_of(straight)[-1][1] - saves_of(straight)[0][1]
    chance, torn, resumed = random.Random(SEED), [], []
    for number in range(times):
        copy = folder / f"moment{number}"
        delay = seconds * chance.random()
        status, _ = forked(lambda copy=copy: run.whole(copy, None), lambda copy=copy, delay=delay: wait(copy, delay))
        saved = saves_of(copy)[-1][0]
        first, last, weights = result_of(lambda copy=copy: run.whole(copy, None))
        resumed.append(first)
        if first not in (saved + 1, saved + 2) or (last, weights) != (steps, expected):
            torn.append((number, status, saved, first))
    return {"moments": times, "torn": torn, "resumed at": resumed}


def note_of(folder: Path) -> Path:
    """Return where a run writes down what it has saved in ``folder``, and when."""
    return folder.parent / f"{folder.name}.saved"


def saves_of(folder: Path) -> list[tuple[int, float]]:
    """Return step and time of what was saved, without a line that a kill cut short."""
    lines = note_of(folder).read_text().split("\n")[:-1] if note_of(folder).exists() else []
    return [(int(step), float(when)) for step, when in (line.split() for line in lines)]


def wait(folder: Path, seconds: float) -> None:
    """Return so many seconds after the first save."""
    while not saves_of(folder):
        time.sleep(0.005)
    time.sleep(seconds)


def copy_of(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def main() -> None:
    kind, drill, folder, number = sys.argv[1:]
    # What the copies would otherwise import one by one.
    import deepspeed  # noqa: F401
    import transformers.optimization  # noqa: F401

    import tests.trainer.ppo.harness
    import tests.trainer.test_loop  # noqa: F401

    run = {"supervised": Supervised, "ppo": PPO}[kind]()
    result = {"operations": drill_operations, "moments": drill_moments}[drill](run, Path(folder), int(number))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
