"""A data set of a stranger runs no code and names nothing outside its folder."""

from __future__ import annotations

import json
import pickle

import pytest
from datasets import Dataset, DatasetDict

from openrlhf.datasets.sources import load_split
from openrlhf.errors import DataError
from tests.security.canary import code, pickled

ANY = {"flag": "--dataset", "required": {}}


@pytest.mark.parametrize("entry", ["{folder}", "{folder}/data.py", "json@{folder}"])
def test_scripts_of_a_data_set_are_not_run(tmp_path, entry):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(code(tmp_path / "canary"))
    with pytest.raises(DataError):
        load_split(entry.format(folder=folder), "train", **ANY)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("entry", ["{folder}", "pandas@{folder}", "{folder}/train.pkl"])
def test_pickles_of_a_data_set_are_not_read(tmp_path, entry):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.pkl").write_bytes(pickled(tmp_path / "canary"))
    with pytest.raises(DataError):
        load_split(entry.format(folder=folder), "train", **ANY)
    assert not (tmp_path / "canary").exists()
    pickle.loads((folder / "train.pkl").read_bytes())
    assert (tmp_path / "canary").exists(), "the canary is alive"


def test_a_saved_data_set_loads(tmp_path):
    rows = Dataset.from_dict({"text": ["a", "b"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "dict")
    assert load_split(str(tmp_path / "one"), "train", **ANY)["text"] == ["a", "b"]
    assert load_split(str(tmp_path / "dict"), "train", **ANY)["text"] == ["a", "b"]


@pytest.mark.parametrize("name", ["../outside/data-00000-of-00001.arrow", "{outside}/data-00000-of-00001.arrow", None])
def test_a_saved_data_set_names_only_files_of_its_folder(tmp_path, name):
    rows = Dataset.from_dict({"text": ["a"]})
    rows.save_to_disk(tmp_path / "outside")
    rows.save_to_disk(tmp_path / "data")
    state = tmp_path / "data" / "state.json"
    content = json.loads(state.read_text())
    content["_data_files"] = [{"filename": name and name.format(outside=tmp_path / "outside")}]
    state.write_text(json.dumps(content))
    with pytest.raises(DataError, match="state.json.*(leads out of the folder|not the name)"):
        load_split(str(tmp_path / "data"), "train", **ANY)


@pytest.mark.parametrize("splits", [["../outside"], ["{outside}"], [7], "train", None])
def test_a_saved_data_set_names_only_splits_of_its_folder(tmp_path, splits):
    rows = Dataset.from_dict({"text": ["a"]})
    rows.save_to_disk(tmp_path / "outside")
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "data")
    if isinstance(splits, list):
        splits = [name.format(outside=tmp_path / "outside") if isinstance(name, str) else name for name in splits]
    (tmp_path / "data" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    with pytest.raises(DataError, match="dataset_dict.json"):
        load_split(str(tmp_path / "data"), "train", **ANY)
