"""A checkpoint of a stranger runs no code, even where its hashes are right, and names nothing outside its folder."""

from __future__ import annotations

import hashlib
import json
import os
from enum import Enum

import pytest
import torch

from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import DataError
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm
from openrlhf.strategy.manifests import MANIFEST
from openrlhf.strategy.rng import rng_file
from openrlhf.strategy.unpickling import FORCE, tensors_only
from tests.security.canary import Canary
from tests.strategy import programs


def manager(root, **config):
    return CheckpointManager(CheckpointConfig(ckpt_path=str(root), **config), SoloComm(), say=lambda line: None)


def put_canary(path, file):
    """Hide a canary among what a file holds."""
    content = torch.load(path, weights_only=False)
    torch.save({**content, "more": Canary(file)}, path)


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (2, False), (2, True), (3, True)])
def test_no_file_of_deepspeed_runs_code_when_it_is_loaded(tmp_path, stage, bf16):
    strategy = programs.strategy_of(zero_stage=stage, bf16=bf16)
    engine = programs.engine_of(strategy)
    programs.run_step(engine, strategy, 1, 4)
    engine.save(tmp_path / "whole")
    engine.load(tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.pt"))
    assert len(names) == (1 if stage == 0 and not bf16 else 2)
    for number, name in enumerate(names):
        folder, file = tmp_path / f"bad{number}", tmp_path / f"canary{number}"
        engine.save(folder)
        put_canary(folder / name, file)
        with pytest.raises(DataError, match="could run code"):
            engine.load(folder)
        assert not file.exists()
        torch.load(folder / name, weights_only=False)
        assert file.exists(), "the canary is alive"
    assert FORCE not in os.environ


@pytest.mark.parametrize("stage", [1, 3])
def test_what_an_early_release_of_python_wrote_is_read_too(tmp_path, stage, monkeypatch):
    engine = programs.engine_of(programs.strategy_of(zero_stage=stage))
    monkeypatch.setattr(Enum, "__reduce_ex__", lambda member, protocol: (getattr, (type(member), member.name)))
    engine.save(tmp_path / "whole")
    monkeypatch.undo()
    engine.load(tmp_path / "whole")


def test_random_states_run_no_code_even_with_right_hashes(tmp_path):
    keeper, file = manager(tmp_path / "ckpt"), tmp_path / "canary"
    folder = keeper.begin(1)
    rng_file(folder, 0).parent.mkdir()
    torch.save({"python": Canary(file)}, rng_file(folder, 0))
    keeper.commit(1)
    found = keeper.latest()
    with pytest.raises(DataError, match="rank0.pt holds more than tensors"):
        keeper.load(found, {})
    assert not file.exists()


def test_a_setting_of_the_user_outlives_a_load(tmp_path, monkeypatch):
    monkeypatch.setenv(FORCE, "0")
    with tensors_only(tmp_path):
        assert os.environ[FORCE] == "1"
    assert os.environ[FORCE] == "0"


NAMES = [
    "../outside",
    "../../outside",
    "actor/../../outside",
    "/etc/hostname",
    "//etc/hostname",
    "linked",
    "linked_folder/file",
]


def forge(folder, files):
    """Rewrite the manifest of a checkpoint so that it names ``files`` and is right in itself."""
    body = json.loads((folder / MANIFEST).read_text())
    body = {**body, "files": dict.fromkeys(files, {"size": 4, "sha256": "0" * 64})}
    del body["sha256"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({"sha256": digest, **body}))


@pytest.mark.parametrize("name", NAMES)
def test_a_manifest_cannot_name_a_file_outside_its_folder(tmp_path, name):
    outside = tmp_path / "outside_folder"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (tmp_path / "outside").write_text("mine")
    keeper = manager(tmp_path / "ckpt")
    keeper.begin(1)
    folder = keeper.commit(1)
    if name.startswith("linked"):
        (folder / name.split("/")[0]).symlink_to(outside if "/" in name else outside / "file")
    forge(folder, [name])
    with pytest.raises(DataError, match="leads outside the folder"):
        keeper.latest()


def test_what_links_lead_to_is_never_deleted_or_moved(tmp_path):
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    other = manager(outside)
    other.begin(1)
    other.commit(1)
    for name in ("folder", "global_step1"):
        (outside / name / "file").write_text("mine")
    root = tmp_path / "ckpt"
    root.mkdir()
    for name in ("global_step7.tmp", "global_step8.part", "global_step9.old"):
        (root / name).symlink_to(outside / "folder")
    (root / "global_step1").symlink_to(outside / "global_step1")
    keeper = manager(root, max_ckpt_num=1)
    for step in (2, 3):
        keeper.begin(step)
        keeper.commit(step)
    assert sorted(path.name for path in root.iterdir() if not path.is_symlink()) == ["global_step3"]
    manager(root).start_fresh()
    assert [(outside / name / "file").read_text() for name in ("folder", "global_step1")] == ["mine", "mine"]


def test_folders_of_the_user_beside_checkpoints_survive(tmp_path):
    mine = ["notes", "global_step", "global_stepX", "global_step5x", "global_step6_backup.tmp", "best"]
    for name in mine:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    keeper = manager(tmp_path, max_ckpt_num=1)
    for step in (1, 2):
        keeper.begin(step)
        keeper.commit(step)
    manager(tmp_path, load_checkpoint=True).start()
    assert [(tmp_path / name / "file").read_text() for name in mine] == ["mine"] * len(mine)
    assert json.loads((tmp_path / "global_step2" / "manifest.json").read_text())["step"] == 2
