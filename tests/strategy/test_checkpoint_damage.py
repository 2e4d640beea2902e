"""Every kind of damage to a checkpoint is found before anything is loaded, and an older whole one is used."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from openrlhf.config.groups import CheckpointConfig
from openrlhf.errors import DataError
from openrlhf.strategy import manifests
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.comm import SoloComm

WEIGHTS, OPTIMIZER = "actor/model.safetensors", "critic/optim.pt"


def manager(root, said=None, most=1):
    config = CheckpointConfig(ckpt_path=str(root), load_checkpoint=True, max_ckpt_num=most)
    return CheckpointManager(config, SoloComm(), say=(said if said is not None else []).append)


def saver(value):
    def save(folder: Path) -> None:
        folder.mkdir(parents=True)
        tensors = {name: torch.full((8, 8), value) for name in ("first.weight", "second.weight")}
        save_file(tensors, folder / "model.safetensors")
        torch.save(tensors, folder / "optim.pt")

    return save


def save(keeper, step):
    return keeper.save(step, {"actor": saver(float(step)), "critic": saver(step + 0.5)}, {"step": step})


def header_of(path):
    return int.from_bytes(path.read_bytes()[:8], "little")


def cut(name, where):
    """Truncate a file at ``where(its size, its safetensors header)``."""

    def damage(folder):
        path = folder / name
        os.truncate(path, where(path.stat().st_size, header_of(path)))

    return damage


def flip(name, where):
    """Flip one bit of the byte at ``where(size, header)``."""

    def damage(folder):
        path = folder / name
        data = bytearray(path.read_bytes())
        data[where(len(data), header_of(path))] ^= 1
        path.write_bytes(bytes(data))

    return damage


def remove(name):
    def damage(folder):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return damage


def copy(source, name):
    """Replace ``name`` with ``source``, which is given relative to the folder of step 2."""
    return lambda folder: shutil.copyfile(folder / source, folder / name)


def link_outside(folder):
    (folder / WEIGHTS).rename(folder.parent / "elsewhere")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere")


def rewritten(change):
    """Change the manifest and give it a hash that fits."""

    def damage(folder):
        body = json.loads((folder / "manifest.json").read_text())
        body.pop("sha256")
        change(body)
        manifests.write(folder, body)

    return damage


def add_entry(name):
    def change(body):
        body["files"][name] = body["files"][WEIGHTS]

    return change


def edit_without_hash(folder):
    body = json.loads((folder / "manifest.json").read_text())
    body["state"]["step"] = 99
    (folder / "manifest.json").write_text(json.dumps(body))


def swap(folder):
    one, other = folder / WEIGHTS, folder / "critic/model.safetensors"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def take_over(folder):
    """Let step 2 be a whole copy of step 1."""
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "global_step1", folder)


DAMAGES = {
    "weights cut at 0": cut(WEIGHTS, lambda size, header: 0),
    "weights cut at 7": cut(WEIGHTS, lambda size, header: 7),
    "weights cut at 8": cut(WEIGHTS, lambda size, header: 8),
    "weights cut in the header": cut(WEIGHTS, lambda size, header: 8 + header // 2),
    "weights cut behind the header": cut(WEIGHTS, lambda size, header: 8 + header),
    "weights short of one byte": cut(WEIGHTS, lambda size, header: size - 1),
    "a bit of the length of the header": flip(WEIGHTS, lambda size, header: 0),
    "a bit at the start of the header": flip(WEIGHTS, lambda size, header: 8),
    "a bit in the header": flip(WEIGHTS, lambda size, header: 8 + header // 2),
    "the first bit of the data": flip(WEIGHTS, lambda size, header: 8 + header),
    "a bit in the data": flip(WEIGHTS, lambda size, header: (size + header) // 2),
    "the last bit of the data": flip(WEIGHTS, lambda size, header: size - 1),
    "optimizer cut at 0": cut(OPTIMIZER, lambda size, header: 0),
    "optimizer cut in half": cut(OPTIMIZER, lambda size, header: size // 2),
    "optimizer short of one byte": cut(OPTIMIZER, lambda size, header: size - 1),
    "the first bit of the optimizer": flip(OPTIMIZER, lambda size, header: 0),
    "a bit of the optimizer": flip(OPTIMIZER, lambda size, header: size // 2),
    "the last bit of the optimizer": flip(OPTIMIZER, lambda size, header: size - 1),
    "a bit of the random state": flip("rng/rank0.pt", lambda size, header: size // 2),
    "a missing shard": remove(WEIGHTS),
    "a missing role": remove("critic"),
    "a missing random state": remove("rng/rank0.pt"),
    "two roles swapped": swap,
    "weights of another step": copy("../global_step1/" + WEIGHTS, WEIGHTS),
    "optimizer of another step": copy("../global_step1/" + OPTIMIZER, OPTIMIZER),
    "the manifest of another step": copy("../global_step1/manifest.json", "manifest.json"),
    "another step under this name": take_over,
    "a missing manifest": remove("manifest.json"),
    "an emptied manifest": cut("manifest.json", lambda size, header: 0),
    "half a manifest": cut("manifest.json", lambda size, header: size // 2),
    "a bit of the manifest": flip("manifest.json", lambda size, header: size // 2),
    "a changed state": edit_without_hash,
    "a name that leads outside": rewritten(add_entry("../global_step1/" + WEIGHTS)),
    "an absolute name": rewritten(add_entry("/etc/hostname")),
    "a link that leads outside": link_outside,
    "a file that nobody wrote": copy(OPTIMIZER, "critic/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
}
IDS = [f"{number} of {len(DAMAGES)}: {name}" for number, name in enumerate(DAMAGES, start=1)]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=IDS)
def test_damage_is_found_and_an_older_whole_checkpoint_is_used(damage, tmp_path):
    keeper = manager(tmp_path, said := [], most=2)
    for step in (1, 2):
        save(keeper, step)
    damage(tmp_path / "global_step2")
    found = keeper.latest()
    assert (found.step, found.state) == (1, {"step": 1})
    assert said[0].startswith("checkpoint global_step2 is damaged (") and said[-1].startswith("resuming from ")
    [aside] = tmp_path.glob("damaged-*")
    assert [path.name for path in aside.iterdir()] == ["global_step2"]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=IDS)
def test_damage_to_the_only_checkpoint_stops_with_its_name(damage, tmp_path):
    keeper = manager(tmp_path, most=2)
    for step in (1, 2):
        save(keeper, step)
    damage(tmp_path / "global_step2")
    shutil.rmtree(tmp_path / "global_step1")
    with pytest.raises(DataError, match="no whole checkpoint in .*: global_step2: "):
        keeper.latest()
    assert [path.name for path in tmp_path.glob("global_step*")] == ["global_step2"]


def test_a_damaged_newer_checkpoint_does_not_push_whole_ones_out(tmp_path):
    for step in (1, 5):
        save(manager(tmp_path, most=2), step)
    os.truncate(tmp_path / "global_step5" / WEIGHTS, 3)
    keeper = manager(tmp_path)
    assert keeper.latest().step == 1
    for step in (2, 3):
        save(keeper, step)
        assert keeper.latest().step == step


def test_hidden_files_of_network_disks_are_no_damage(tmp_path):
    keeper = manager(tmp_path)
    save(keeper, 1)
    (tmp_path / "global_step1" / "actor" / ".nfs0001").write_text("x")
    assert keeper.latest().step == 1
