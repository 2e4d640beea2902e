"""Checkpoints: one folder a step for all roles, whole or not there, found damaged before it is loaded.

    <ckpt_path>/global_step12/actor/...      what each role's saver wrote (DeepSpeed's own files)
    <ckpt_path>/global_step12/rng/rank0.pt   the random state of every rank
    <ckpt_path>/global_step12/manifest.json  written last: step, layout, state, size and SHA-256 of every file
    <ckpt_path>/global_step12_hf/            the Hugging Face export of the same step
    <ckpt_path>/previous-<time>/             what an earlier run left, moved by a run that does not resume

A folder is written as ``.tmp`` and renamed when its files are on the disk. Older steps are pruned only afterwards, the
newest never, and only folders that carry our mark.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from openrlhf import device as machine
from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import DataError, InfraError, OpenRLHFError, UsageError
from openrlhf.strategy import files, manifests
from openrlhf.strategy.comm import Comm
from openrlhf.strategy.manifests import FORMAT, MANIFEST
from openrlhf.strategy.unpickling import load_tensors

EXPORT_MARK = ".openrlhf-export.json"
STEP_FOLDER = re.compile(r"global_step(\d+)(_hf)?$")
LEFTOVER = re.compile(r"global_step\d+(_hf)?(?:\.tmp)?\.(old|tmp|part)$")
GIB = 2**30
# What saves or loads one role, given its folder.
Handler = Callable[[Path], Any]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk: its folder, its step, and the ``state`` that the run stored with it."""

    path: Path
    step: int
    layout: dict[str, Any]
    state: dict[str, Any]

    def role(self, name: str) -> Path:
        """Return the folder of a role. Raises ``DataError`` if the checkpoint has no such role."""
        folder = self.path / name
        if not folder.is_dir():
            raise DataError(f"{self.path} holds nothing for {name!r}; it was written by another kind of run")
        return folder


class CheckpointManager:
    """Writes, finds, verifies and prunes the checkpoints of one run. All ranks of ``comm`` call every method.

    ``layout`` is what the files depend on (`DeepSpeedStrategy.layout`): a checkpoint of another layout is refused.
    ``say`` prints one line on rank 0. ``wait_s`` is how long, in seconds, ranks wait for rank 0's work on the disk,
    which may take longer than any collective.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        comm: Comm,
        *,
        layout: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
        wait_s: float = 3600.0,
    ):
        self.config = config
        self.comm = comm
        self.root = Path(config.ckpt_path)
        self.layout = json.loads(json.dumps(dict(layout or {})))
        self.wait_s = wait_s
        self._say = say if comm.rank == 0 else lambda line: None

    def start(self) -> Checkpoint | None:
        """Do what ``--load_checkpoint`` asks at the start of a run; return the checkpoint to resume from, if any."""
        if self.config.load_checkpoint:
            return self.latest()
        self.start_fresh()
        return None

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; None, said in one line, when there is none at all.

        A damaged one is passed over and said so. Raises ``DataError`` when all are damaged, ``UsageError`` when the
        layout of this run is another, ``InfraError`` when the ranks do not see the same files.
        """
        candidates = self._on_main(lambda: self._clean() or [path.name for path in self._checkpoints()], "look up")
        damage = []
        for name in reversed(candidates):
            manifest, problem = self._verify(self.root / name)
            if problem is None:
                return self._accept(self.root / name, manifest)
            damage.append(f"{name}: {problem}")
            self._say(f"checkpoint {self.root / name} is damaged ({problem}); looking for an older one")
        if damage:
            raise DataError(f"no whole checkpoint in {self.root}: " + "; ".join(damage))
        self._say(f"no checkpoint in {self.root} yet: fresh start")
        self.start_fresh()
        return None

    def start_fresh(self) -> None:
        """Move the checkpoints of an earlier run to ``previous-<time>``: they are neither mixed with
        ours nor deleted.
        """

        def move() -> str | None:
            self._clean()
            found = [path for path in self._folders() if path.is_dir()]
            if not found:
                return None
            stamp = time.strftime("previous-%Y%m%d-%H%M%S")
            target = next(path for path in _numbered(self.root / stamp) if not path.exists())
            target.mkdir()
            for path in found:
                path.rename(target / path.name)
            return str(target)

        moved = self._on_main(move, "move earlier checkpoints in")
        if moved:
            self._say(f"what an earlier run left is now in {moved}; --load_checkpoint --ckpt_path {moved} resumes it")

    def save(
        self, step: int, roles: Mapping[str, Callable[[Path], None]], state: Mapping[str, Any] | None = None
    ) -> Path:
        """Write the checkpoint of ``step`` and prune older ones; return its folder.

        Each saver is called by all ranks with its role's folder. ``state`` must fit into JSON. Raises ``InfraError``
        on all ranks when the disk refuses; then the earlier checkpoints are untouched.
        """
        folder = self.begin(step)
        problem = None
        try:
            for name, saver in roles.items():
                saver(folder / name)
            save_rng(folder, self.comm.rank)
        except OpenRLHFError:
            raise
        except (OSError, RuntimeError) as error:
            problem = f"rank {self.comm.rank}: {error}"
        self._agree([problem], f"write checkpoint {step} to", folder)
        return self.commit(step, state)

    def begin(self, step: int) -> Path:
        """Make the empty folder that the savers of ``step`` fill before `commit`, and return it."""
        folder = self.root / f"global_step{step}.tmp"

        def make() -> None:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)

        self._on_main(make, f"make {folder.name} in")
        return folder

    def commit(self, step: int, state: Mapping[str, Any] | None = None) -> Path:
        """Hash what was written since `begin`, put it into place with its manifest, prune older ones."""
        folder = self.root / f"global_step{step}.tmp"
        target = self.root / f"global_step{step}"
        names = self._on_main(lambda: manifests.files_of(folder), f"list {folder.name} in")
        mine, problem = {}, None
        try:
            mine = manifests.describe(folder, names[self.comm.rank :: self.comm.world_size])
        except OSError as error:
            problem = f"rank {self.comm.rank}: {error} (all ranks must see the same --ckpt_path)"
        self._agree([problem], f"hash checkpoint {step} in", folder)
        entries = {name: entry for share in self.comm.all_gather_object(mine) for name, entry in share.items()}

        def publish() -> None:
            manifests.write(folder, step=step, layout=self.layout, state=dict(state or {}), files=entries)
            files.fsync_tree(folder, files=False)
            files.publish_folder(folder, target)
            self._rotate()

        self._on_main(publish, f"put checkpoint {step} into place in", folder)
        return target

    def export(self, step: int, exporter: Handler) -> Path:
        """Write the Hugging Face export of ``step`` with ``exporter(folder)``; it is pruned with its step."""
        target = self.root / f"global_step{step}_hf"
        staging = target.with_name(target.name + ".tmp")
        self._on_main(lambda: staging.parent.mkdir(parents=True, exist_ok=True), "write to")
        exporter(staging)

        def publish() -> None:
            files.write_durably(staging / EXPORT_MARK, json.dumps({"format": FORMAT, "step": step}))
            files.publish_folder(staging, target)
            self._rotate()

        self._on_main(publish, f"put export {step} into place in", staging)
        return target

    def load(self, checkpoint: Checkpoint, roles: Mapping[str, Handler]) -> dict[str, Any]:
        """Give each loader its role's folder, restore the random state of this rank, and return the stored state."""
        for name, loader in roles.items():
            loader(checkpoint.role(name))
        load_rng(checkpoint.path, self.comm.rank)
        return checkpoint.state

    def _accept(self, path: Path, manifest: dict[str, Any]) -> Checkpoint:
        if manifest["layout"] != self.layout:
            raise UsageError(
                f"checkpoint {path} was written with {_in_words(manifest['layout'])}; this run has "
                f"{_in_words(self.layout)}: use the same, or start without --load_checkpoint"
            )
        self._say(f"resuming from {path}")
        return Checkpoint(path, manifest["step"], manifest["layout"], manifest["state"])

    def _verify(self, path: Path) -> tuple[dict[str, Any], str | None]:
        """Return the manifest, and what is wrong with the files: every rank checks a share, all hear the same."""
        manifest, problem = manifests.read(path)
        views = self.comm.all_gather_object((manifest.get("sha256"), problem))
        if len(set(views)) > 1:
            raise InfraError(
                f"the ranks do not see the same {path / MANIFEST}: put --ckpt_path on a shared disk ({views})"
            )
        if problem is None:
            problem = manifests.first_damage(path, manifest["files"], self.comm.rank, self.comm.world_size)
            self.comm.barrier(f"verify {path.name}", self.wait_s)
            problem = next((found for found in self.comm.all_gather_object(problem) if found), None)
        return manifest, problem

    def _rotate(self) -> None:
        """Remove the oldest steps beyond the limits; the newest step and the newest checkpoint always stay."""
        owned: dict[int, list[Path]] = {}
        for path in self._folders():
            if (path / MANIFEST).is_file() or (path / EXPORT_MARK).is_file():
                owned.setdefault(_step(path), []).append(path)
        checkpoints = [step for step, paths in owned.items() if any((path / MANIFEST).is_file() for path in paths)]
        protected = {max(owned, default=-1), max(checkpoints, default=-1)}
        sizes = {step: sum(files.tree_size(path) for path in paths) for step, paths in owned.items()}
        for step in sorted(owned):
            if len(sizes) <= self.config.max_ckpt_num and sum(sizes.values()) <= self.config.max_ckpt_mem * GIB:
                return
            if step not in protected:
                del sizes[step]
                for path in owned[step]:
                    _remove(path)

    def _clean(self) -> None:
        """Remove what an interrupted save left; bring back the old copy if it was stopped between two renames."""
        if self.root.is_file():
            raise NotADirectoryError(f"{self.root} is a file, not a folder")
        for path in self.root.glob("global_step*"):
            left = LEFTOVER.match(path.name)
            if not left or path.is_symlink():
                continue
            if left.group(2) == "old" and not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))
            else:
                shutil.rmtree(path)

    def _folders(self) -> list[Path]:
        """Return the folders of steps; a link is not ours to move or delete."""
        found = (path for path in self.root.glob("global_step*") if STEP_FOLDER.match(path.name))
        return sorted((path for path in found if not path.is_symlink()), key=_step)

    def _checkpoints(self) -> list[Path]:
        return [path for path in self._folders() if not path.name.endswith("_hf")]

    def _on_main(self, action: Callable[[], Any], what: str, partial: Path | None = None) -> Any:
        """Run ``action`` on rank 0 and return its result on all ranks; all raise ``InfraError`` if the
        disk refuses.
        """
        value, problem = None, None
        if self.comm.rank == 0:
            try:
                value = action()
            except OSError as error:
                problem = str(error)
        self.comm.barrier(f"{what} {self.root}", self.wait_s)
        value, problem = self.comm.broadcast_object((value, problem))
        if problem:
            self._give_up([problem], what, partial)
        return value

    def _agree(self, problems: list[str | None], what: str, partial: Path) -> None:
        self.comm.barrier(f"{what} {self.root}", self.wait_s)
        found = [problem for share in self.comm.all_gather_object(problems) for problem in share if problem]
        if found:
            self._give_up(found, what, partial)

    def _give_up(self, problems: list[str], what: str, partial: Path | None) -> None:
        if partial is not None and self.comm.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise InfraError(f"cannot {what} {self.root}: {'; '.join(problems)}{_free_space(self.root)}")


def rng_file(folder: Path, rank: int) -> Path:
    """Return where the random state of a rank is kept; every rank writes one, so it shows who took part."""
    return folder / "rng" / f"rank{rank}.pt"


def save_rng(folder: Path, rank: int) -> None:
    """Write the state of this process's random generators to ``folder/rng/rank<rank>.pt``."""
    (folder / "rng").mkdir(parents=True, exist_ok=True)
    torch.save(machine.rng_state(), rng_file(folder, rank))


def load_rng(folder: Path, rank: int) -> None:
    """Restore what `save_rng` wrote. Raises ``DataError`` if this rank has no file."""
    path = rng_file(folder, rank)
    if not path.is_file():
        raise DataError(f"{path} is missing: the checkpoint was written by fewer ranks")
    machine.set_rng_state(load_tensors(path))


def _step(path: Path) -> int:
    return int(STEP_FOLDER.match(path.name).group(1))


def _remove(path: Path) -> None:
    """Delete a folder under a name that the next start cleans up, should this be interrupted."""
    doomed = path.with_name(path.name + ".tmp")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _numbered(path: Path):
    yield path
    for number in range(2, 1000):
        yield path.with_name(f"{path.name}-{number}")


def _in_words(layout: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in layout.items()) or "no layout"


def _free_space(root: Path) -> str:
    existing = next((path for path in (root, *root.parents) if path.exists()), Path("/"))
    return f" ({shutil.disk_usage(existing).free / GIB:.2f} GiB free)"
