"""Checkpoints: one folder a step for all roles, whole or not there, found damaged before it is loaded.

    <ckpt_path>/global_step12/actor/...      what each role's saver wrote (DeepSpeed's own files)
    <ckpt_path>/global_step12/rng/rank0.pt   the random state of every rank
    <ckpt_path>/global_step12/manifest.json  written last: step, layout, state, size and SHA-256 of every file
    <ckpt_path>/global_step12_hf/            the Hugging Face export of the same step
    <ckpt_path>/previous-<time>/             what an earlier run left, moved by a run that does not resume
    <ckpt_path>/damaged-<time>/              checkpoints found damaged, moved by a run that resumes an older one

A folder is written as ``.tmp`` and renamed when its files are on the disk. Older steps are pruned only afterwards, as
``retention.py`` says: never the newest, never the best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import DataError, InfraError, OpenRLHFError
from openrlhf.strategy import files, manifests, retention, universal
from openrlhf.strategy.agreement import flag_lines, layout_differs
from openrlhf.strategy.comm import Comm
from openrlhf.strategy.disk import GIB, SharedDisk
from openrlhf.strategy.manifests import FORMAT, MANIFEST
from openrlhf.strategy.retention import EXPORT_MARK, Kept, Score
from openrlhf.strategy.rng import load_rng, save_rng
from openrlhf.strategy.room import shortage

# What saves or loads one role, given its folder.
Handler = Callable[[Path], Any]


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on the disk: its folder, its step, and the ``state`` that the run stored with it.

    ``converted`` is set when its files must be cut anew for the ranks and the ZeRO stage of this run.
    """

    path: Path
    step: int
    layout: dict[str, Any]
    state: dict[str, Any]
    converted: bool = False

    def role(self, name: str) -> Path:
        """Return the folder of a role. Raises ``DataError`` if the checkpoint has no such role."""
        folder = self.path / name
        if not folder.is_dir():
            raise DataError(f"{self.path} holds nothing for {name!r}; it was written by another kind of run")
        return folder


class CheckpointManager:
    """Writes, finds, verifies and prunes the checkpoints of one run. All ranks of ``comm`` call every method.

    ``layout`` is what the files depend on (`DeepSpeedStrategy.layout`), ``flags`` what the training depends on
    (`training_flags`): a checkpoint with others is refused unless the configuration allows it. ``say`` prints one line
    on rank 0.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        comm: Comm,
        *,
        layout: Mapping[str, Any] | None = None,
        flags: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        self.config = config
        self.comm = comm
        self.root = Path(config.ckpt_path)
        self.layout = json.loads(json.dumps(dict(layout or {})))
        self.flags = dict(flags or {})
        self._disk = SharedDisk(self.root, comm)
        self.say = say if comm.rank == 0 else lambda line: None

    def start(self) -> Checkpoint | None:
        """Do what ``--load_checkpoint`` asks at the start of a run; return the checkpoint to resume from, if any."""
        if self.config.load_checkpoint:
            return self.latest()
        self.start_fresh()
        return None

    def latest(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; None, said in one line, when there is none at all.

        A damaged one is moved aside and said so. Raises ``DataError`` when all are damaged, ``UsageError`` when the
        layout or the flags of this run are others, ``InfraError`` when the ranks do not see the same files.
        """
        candidates = self._disk.on_main(self._candidates, "look up")
        damage: dict[str, str] = {}
        for name in reversed(candidates):
            manifest, problem = self._verify(self.root / name)
            if problem is None:
                return self._accept(self.root / name, manifest, damage)
            damage[name] = problem
        if damage:
            found = "; ".join(f"{name}: {problem}" for name, problem in damage.items())
            raise DataError(f"no whole checkpoint in {self.root}: {found}")
        self.say(f"no checkpoint in {self.root} yet: fresh start")
        self.start_fresh()
        return None

    def start_fresh(self) -> None:
        """Move the checkpoints of an earlier run to ``previous-<time>``: they are neither mixed with
        ours nor deleted.
        """

        def move() -> str | None:
            retention.clean(self.root)
            return retention.set_aside(self.root, "previous", retention.step_folders(self.root))

        moved = self._disk.on_main(move, "move earlier checkpoints in")
        if moved:
            self.say(f"what an earlier run left is now in {moved}; --load_checkpoint --ckpt_path {moved} resumes it")

    def expect(self, step_bytes: int, saves: int, scored: bool = False) -> None:
        """Check that the disk has room for ``saves`` steps to come of ``step_bytes`` each; see `shortage`.

        Raises ``InfraError`` with the arithmetic on all ranks when it has not.
        """

        problem = self._disk.on_main(
            lambda: shortage(self.root, self.config, step_bytes, saves, scored), "measure the free space of"
        )
        if problem:
            raise InfraError(problem)

    def best(self) -> Kept | None:
        """Return the step on the disk with the best evaluation; None when no kept step was evaluated."""
        return self._disk.on_main(lambda: retention.best_of(retention.kept_steps(self.root).values()), "look up")

    def save(
        self,
        step: int,
        roles: Mapping[str, Callable[[Path], None]],
        state: Mapping[str, Any] | None = None,
        score: Score | None = None,
    ) -> Path:
        """Write the checkpoint of ``step`` and prune older ones; return its folder.

        Each saver is called by all ranks with its role's folder. ``state`` must fit into JSON; ``score`` is the
        evaluation of this very step. Raises ``InfraError`` on all ranks when the disk refuses; then the earlier
        checkpoints are untouched.
        """
        folder = self.begin(step)
        problem = None
        try:
            for name, saver in roles.items():
                saver(folder / name)
            save_rng(folder, self.comm.rank)
        except OpenRLHFError:
            # Several ranks may fail one by one, so nothing is agreed on; the next start removes what is left then.
            if self.comm.world_size == 1:
                files.remove(folder)
            raise
        except (OSError, RuntimeError) as error:
            problem = f"rank {self.comm.rank}: {files.why(error)}"
        self._disk.agree(problem, f"write checkpoint {step} to", folder)
        return self.commit(step, state, score)

    def begin(self, step: int) -> Path:
        """Make the empty folder that the savers of ``step`` fill before `commit`, and return it."""
        folder = self.root / f"global_step{step}.tmp"

        def make() -> None:
            if folder.exists():
                files.remove(folder)
            folder.mkdir(parents=True)

        self._disk.on_main(make, f"make {folder.name} in")
        return folder

    def commit(self, step: int, state: Mapping[str, Any] | None = None, score: Score | None = None) -> Path:
        """Hash what was written since `begin`, put it into place with its manifest, prune older ones."""
        folder = self.root / f"global_step{step}.tmp"
        target = self.root / f"global_step{step}"
        names = self._disk.on_main(lambda: manifests.files_of(folder), f"list {folder.name} in")
        mine, problem = {}, None
        try:
            mine = manifests.describe(folder, names[self.comm.rank :: self.comm.world_size])
        except OSError as error:
            problem = f"rank {self.comm.rank}: {error} (all ranks must see the same --ckpt_path)"
        self._disk.agree(problem, f"hash checkpoint {step} in", folder)
        entries = {name: entry for share in self.comm.all_gather_object(mine) for name, entry in share.items()}
        body = {"step": step, "layout": self.layout, "flags": self.flags, "state": dict(state or {}), "score": score}

        def publish() -> None:
            manifests.write(folder, {**body, "files": entries})
            files.fsync_tree(folder, files=False)
            files.publish_folder(folder, target)

        self._disk.on_main(publish, f"put checkpoint {step} into place in", folder)
        self._disk.on_main(self._prune, "remove older checkpoints in")
        return target

    def export(self, step: int, exporter: Handler, score: Score | None = None) -> Path:
        """Write the Hugging Face export of ``step`` with ``exporter(folder)``; it is pruned with its step."""
        target = self.root / f"global_step{step}_hf"
        staging = target.with_name(target.name + ".tmp")
        self._disk.on_main(lambda: staging.parent.mkdir(parents=True, exist_ok=True), "write to")
        exporter(staging)

        def publish() -> None:
            mark = {"format": FORMAT, "step": step, "score": score}
            files.write_durably(staging / EXPORT_MARK, json.dumps(mark))
            files.publish_folder(staging, target)

        self._disk.on_main(publish, f"put export {step} into place in", staging)
        self._disk.on_main(self._prune, "remove older checkpoints in")
        return target

    def load(self, checkpoint: Checkpoint, roles: Mapping[str, Handler]) -> dict[str, Any]:
        """Give each loader its role's folder, restore the random state of this rank, and return the stored state.

        Of a checkpoint with another layout each role is converted first. Its random state belongs to other ranks, so
        every rank goes on with its own.
        """
        for name, loader in roles.items():
            if checkpoint.converted:
                self._load_converted(checkpoint.role(name), loader)
            else:
                loader(checkpoint.role(name))
        if not checkpoint.converted:
            load_rng(checkpoint.path, self.comm.rank)
        return checkpoint.state

    def _load_converted(self, source: Path, loader: Handler) -> None:
        """Load a role from a copy cut for this layout, which is removed afterwards."""
        staging = self.root / f"{source.parent.name}.tmp"

        def convert() -> None:
            retention.clean(self.root)
            staging.mkdir()
            universal.convert(source, staging / source.name)

        self._disk.on_main(convert, f"convert {source} in", staging)
        loader(staging / source.name)
        self._disk.wait(f"load {staging}")
        self._disk.on_main(lambda: files.remove(staging), "clean up")

    def _candidates(self) -> list[str]:
        """Clean up and return the names of the checkpoints, oldest first; exports are none."""
        retention.clean(self.root)
        return [path.name for path in retention.step_folders(self.root) if not path.name.endswith("_hf")]

    def _accept(self, path: Path, manifest: dict[str, Any], damage: Mapping[str, str]) -> Checkpoint:
        """Return the whole checkpoint after the newer damaged ones are out of the way."""
        converted = layout_differs(path, manifest["layout"], self.layout, self.config)
        lines = flag_lines(path, manifest.get("flags", {}), self.flags, self.config)
        if damage:
            damaged = [self.root / name for name in damage]
            place = self._disk.on_main(lambda: retention.set_aside(self.root, "damaged", damaged), "move what is in")
            for name, problem in damage.items():
                self.say(f"checkpoint {name} is damaged ({problem}) and is now in {place}")
        for line in (*lines, f"resuming from {path}"):
            self.say(line)
        return Checkpoint(path, manifest["step"], manifest["layout"], manifest["state"], converted)

    def _verify(self, path: Path) -> tuple[dict[str, Any], str | None]:
        """Return the manifest, and what is wrong with the files: every rank checks a share, all hear the same."""
        manifest, problem = manifests.read(path)
        views = self.comm.all_gather_object((manifest.get("sha256"), problem))
        if len(set(views)) > 1:
            raise InfraError(
                f"the ranks do not see the same {path / MANIFEST}: put --ckpt_path on a shared disk ({views})"
            )
        if problem is None and manifest["step"] != retention.step_of(path):
            problem = f"its manifest is of step {manifest['step']}"
        if problem is None:
            problem = manifests.first_damage(path, manifest["files"], self.comm.rank, self.comm.world_size)
            self._disk.wait(f"verify {path.name}")
            problem = next((found for found in self.comm.all_gather_object(problem) if found), None)
        return manifest, problem

    def _prune(self) -> None:
        for path in retention.surplus(self.root, self.config.max_ckpt_num, self.config.max_ckpt_mem * GIB):
            retention.discard(path)
