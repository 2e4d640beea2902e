"""Runs that are cut and taken up again: how they are started, how they are cut, and what must be equal afterwards.

A run has a folder: ``model`` (the export), ``model_run`` (metrics, samples, log) and ``ckpt``, with a checkpoint of
every step. One whole run gives all the cuts: what it had on the disk after a step is copied and taken up there.
"""

from __future__ import annotations

import json
import os
import pickletools
import re
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STEPS = 6
JOURNALS = ("metrics.jsonl", "samples.jsonl", "ledger.jsonl")
BEFORE = "before.jsonl"
WEIGHT_NUMBER = re.compile(r"\d+_\d+")


@dataclass(frozen=True)
class Trial:
    """A run of six steps, and where it is cut.

    ``cuts`` are steps after which it is taken up again; with ``broken_off`` it is also stopped at that many backward
    passes into step 2. The run that was taken up after step 2 is cut once more after step 4.
    """

    name: str
    program: str
    flags: tuple[str, ...]
    cuts: tuple[int, ...] = (2, 3, 5)
    broken_off: int = 2
    twice: bool = True

    @property
    def cases(self) -> dict[str, int]:
        """The folder of every run that is taken up, and the last step that it must not do again."""
        once = {f"from{step}": step for step in self.cuts}
        broken = {"broken": 1} if self.broken_off else {}
        return {**broken, **once, **({"twice": 4} if self.twice else {})}


def places(folder: Path) -> list[str]:
    """Return the flags that put everything a run writes into ``folder``, with a checkpoint of every step."""
    paths = ["--save_path", str(folder / "model"), "--ckpt_path", str(folder / "ckpt")]
    return [*paths, "--save_steps", "1", "--max_ckpt_num", str(STEPS)]


def run_trials(folder: str, trials: list[dict], ports: list[int]) -> int:
    """Do every trial in this process, one of the ranks; return the runs that were started.

    ``trials`` are the fields of a :class:`Trial`. The ranks meet anew for every run, each time at another port.
    """
    meetings = iter(ports)
    for fields in trials:
        trial = Trial(**fields)
        _try(trial, Path(folder) / trial.name, meetings)
    return len(ports) - len(list(meetings))


def _try(trial: Trial, folder: Path, ports: Iterator[int]) -> None:
    _start(trial, folder / "whole", next(ports))
    if trial.broken_off:
        with broken_off(folder / "broken" / "ckpt" / "global_step1", trial.broken_off):
            _start(trial, folder / "broken", next(ports))
    for name, step in trial.cases.items():
        if os.environ["RANK"] == "0":
            if name != "broken":
                cut(folder / ("from2" if name == "twice" else "whole"), folder / name, step)
            remember(folder / name)
        _start(trial, folder / name, next(ports), "--load_checkpoint")


def _start(trial: Trial, folder: Path, port: int, *switches: str) -> None:
    from openrlhf.config.arguments import parse

    os.environ["MASTER_PORT"] = str(port)
    config_class, train = _program(trial.program)
    config, _ = parse(config_class, [*trial.flags, *places(folder), *switches], trial.program)
    train(config)


def _program(name: str):
    """Return the configuration class and the function of a command."""
    from openrlhf.cli import train_dpo, train_kd, train_kto, train_ppo, train_prm, train_rm, train_sft
    from openrlhf.config.ppo import PPOConfig

    if name == "train_ppo":
        return PPOConfig, train_ppo.train
    commands = (train_sft, train_rm, train_dpo, train_kto, train_kd, train_prm)
    (command,) = (module.command for module in commands if module.command.name == name)
    return command.config_class, command.train


@contextmanager
def broken_off(checkpoint: Path, passes: int) -> Iterator[None]:
    """End what runs inside in the middle of a step: at that many backward passes after ``checkpoint`` appeared.

    Fails when it came to its end instead.
    """
    from openrlhf.strategy.engine import TrainEngine

    original, seen = TrainEngine.backward, 0

    def backward(engine, loss_sum, weight) -> None:
        nonlocal seen
        seen += checkpoint.exists()
        if seen == passes:
            raise KeyboardInterrupt
        original(engine, loss_sum, weight)

    TrainEngine.backward = backward
    try:
        yield
    except KeyboardInterrupt:
        return
    finally:
        TrainEngine.backward = original
    raise AssertionError("the run came to its end, it was not broken off")


def cut(source: Path, target: Path, step: int) -> None:
    """Leave in ``target`` what the run in ``source`` had on the disk after ``step``."""
    shutil.copytree(source / "ckpt" / f"global_step{step}", target / "ckpt" / f"global_step{step}")
    (target / "model_run").mkdir(exist_ok=True, parents=True)
    for name in JOURNALS:
        journal = source / "model_run" / name
        if journal.exists():
            kept = [line for line in journal.read_bytes().splitlines(keepends=True) if _step(line) <= step]
            (target / "model_run" / name).write_bytes(b"".join(kept))


def remember(folder: Path) -> None:
    """Keep the metrics as they are before the run in ``folder`` is taken up."""
    shutil.copy(folder / "model_run" / "metrics.jsonl", folder / BEFORE)


def differences(whole: Path, resumed: Path, since: int, steps: int = STEPS) -> list[str]:
    """Return in what a run taken up after step ``since`` is not the whole run, or how it did not go on from there."""
    weightless = [] if list((whole / "model").glob("*.safetensors")) else ["the whole run left no weights"]
    return [
        *weightless,
        *_not_resumed(resumed, since, steps),
        *_journal_differences(whole / "model_run", resumed / "model_run"),
        *(
            f"weight {name}"
            for model in ("model", "model_critic")
            for name in _weight_differences(whole / model, resumed / model)
        ),
        *_checkpoint_differences(*(run / "ckpt" / f"global_step{steps}" for run in (whole, resumed))),
    ]


def _not_resumed(resumed: Path, since: int, steps: int) -> list[str]:
    """Return signs that steps were done again. The clock is in every line: one written again differs."""
    found = []
    taken_up = f"resuming from {resumed / 'ckpt' / f'global_step{since}'}"
    if taken_up not in (resumed / "model_run" / "log.txt").read_text():
        found.append(f"the log does not say {taken_up!r}")
    before, after = (
        path.read_bytes().splitlines() for path in (resumed / BEFORE, resumed / "model_run" / JOURNALS[0])
    )
    kept = [line for line in before if _step(line) <= since]
    if after[: len(kept)] != kept:
        found.append(f"metrics up to step {since} were written again")
    done = [_step(line) for line in after if b'"phase": "train"' in line]
    if done != list(range(1, steps + 1)):
        found.append(f"metrics hold the steps {done}")
    return found


def _journal_differences(whole: Path, resumed: Path) -> list[str]:
    found = []
    for name in JOURNALS:
        left, right = ([_timeless(line) for line in _lines(run / name)] for run in (whole, resumed))
        if len(left) != len(right):
            found.append(f"{name}: {len(right)} lines, not {len(left)}")
        for one, other in zip(left, right, strict=False):
            unlike = [key for key in {**one, **other} if one.get(key) != other.get(key)]
            found += [f"{name} step {one['step']}: {key} {other.get(key)} not {one.get(key)}" for key in unlike]
    return found


def _weight_differences(whole: Path, resumed: Path) -> list[str]:
    import torch
    from safetensors.torch import load_file

    left, right = (
        {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for folder in (whole, resumed)
    )
    if left.keys() != right.keys():
        return [f"names: {sorted(left.keys() ^ right.keys())} are in one folder only"]
    return [name for name in left if not torch.equal(left[name], right[name])]


def _checkpoint_differences(whole: Path, resumed: Path) -> list[str]:
    """Compare everything that two last checkpoints hold: optimizers, averages, random states, the driver's state."""
    left, right = (json.loads((path / "manifest.json").read_text()) for path in (whole, resumed))
    found = [] if left["state"] == right["state"] else ["the state in the manifest"]
    names = {**left["files"], **right["files"]}
    unlike = [name for name in names if left["files"].get(name) != right["files"].get(name)]
    return found + [f"file {name}" for name in unlike if not _same_but_for_counters(whole / name, resumed / name)]


def _same_but_for_counters(whole: Path, resumed: Path) -> bool:
    """Return whether two files of torch are equal but for the numbers that ZeRO-3 gives the weights of a process.

    Here many runs follow each other in one process.
    """
    if not (zipfile.is_zipfile(whole) and zipfile.is_zipfile(resumed)):
        return False
    left, right = (zipfile.ZipFile(path) for path in (whole, resumed))
    return _contents(left) == _contents(right)


def _contents(archive: zipfile.ZipFile) -> dict[str, object]:
    members = {name: archive.read(name) for name in archive.namelist() if not name.endswith("serialization_id")}
    pickled = next(name for name in members if name.endswith("data.pkl"))
    words = ((code.name, word) for code, word, _ in pickletools.genops(members[pickled]))
    return {**members, pickled: [word for word in words if not WEIGHT_NUMBER.fullmatch(str(word[1]))]}


def _timeless(line: bytes) -> dict:
    values = json.loads(line)
    return {key: value for key, value in values.items() if key != "tokens_per_second" and not key.startswith("time/")}


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines() if path.exists() else []


def _step(line: bytes) -> int:
    return json.loads(line)["step"]


def failures(folder: Path, trials: Sequence[Trial]) -> dict[str, list[str]]:
    """Return the differences of every case of ``trials`` that has some."""
    found = {
        f"{trial.name} {name}": differences(folder / trial.name / "whole", folder / trial.name / name, since)
        for trial in trials
        for name, since in trial.cases.items()
    }
    return {name: unlike for name, unlike in found.items() if unlike}
