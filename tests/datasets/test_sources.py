"""Every way to name a source of rows, against what OpenRLHF 0.5 scripts rely on."""

from __future__ import annotations

import json
import os

import datasets
import pytest

from openrlhf.config.groups import SFTDataConfig
from openrlhf.datasets.blending import blending_datasets, load_train_eval
from openrlhf.datasets.sources import is_here, load_split, some_rows
from openrlhf.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the Arrow cache of ``datasets`` inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(count, mark):
    return [{"input": f"{mark}{number}", "output": "x"} for number in range(count)]


def table(count, mark="a"):
    return datasets.Dataset.from_list(rows(count, mark))


def written(folder, **splits):
    """Write the rows of each split to the file ``<split>.<extension>`` of ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (extension, count) in splits.items():
        data = table(count, name[0])
        write = {"csv": data.to_csv, "parquet": data.to_parquet, "jsonl": data.to_json}[extension]
        write(folder / f"{name}.{extension}")
    return folder


def sizes(spec, probs="1.0", **options):
    train, evaluation = blending_datasets(spec, probs, **options)
    return len(train), len(evaluation)


@pytest.mark.parametrize(("kind", "extension"), [("json", "jsonl"), ("csv", "csv"), ("parquet", "parquet")])
def test_a_type_and_a_folder_name_the_files_of_that_type(tmp_path, kind, extension):
    folder = written(tmp_path / "d", train=(extension, 7), test=(extension, 2))
    (folder / "train.txt").write_text("not data")
    other = "csv" if extension == "jsonl" else "jsonl"
    written(folder, train=(other, 3))
    assert sizes(f"{kind}@{folder}") == (7, 2)


def test_a_folder_of_a_data_set_may_follow_its_name(tmp_path):
    written(tmp_path / "d" / "main", train=("parquet", 5), test=("parquet", 1))
    written(tmp_path / "d" / "more", train=("parquet", 9))
    assert sizes(f"{tmp_path / 'd'}@main") == (5, 1)


def test_a_folder_whose_files_name_no_split_is_all_training_rows(tmp_path):
    folder = written(tmp_path / "d", **{"1M-part": ("jsonl", 40), "2M-part": ("jsonl", 60)})
    (folder / "dataset_infos.json").write_text("{}")
    assert sizes(str(folder)) == (100, 3)


@pytest.mark.parametrize("name", ["dev", "my-validation", "eval_00"])
def test_files_that_name_another_split_are_no_training_rows(tmp_path, name):
    written(tmp_path / "d", **{name: ("jsonl", 4), "rest": ("jsonl", 4)})
    with pytest.raises(DataError, match=f"no split 'train'; splits there: {name}, rest"):
        blending_datasets(str(tmp_path / "d"), "1.0")


def test_saved_data_sets_are_read_with_and_without_splits(tmp_path):
    table(10).save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table(6), "test": table(2)}).save_to_disk(tmp_path / "two")
    assert sizes(str(tmp_path / "one")) == (10, 1)
    assert sizes(str(tmp_path / "two")) == (6, 2)


def test_a_source_with_one_split_of_another_name_is_taken_whole(tmp_path):
    datasets.DatasetDict({"prefs": table(6)}).save_to_disk(tmp_path / "d")
    assert sizes(str(tmp_path / "d")) == (6, 1)


def test_the_splits_are_named_by_flags(tmp_path):
    folder = written(tmp_path / "d", train=("jsonl", 3), train_sft=("jsonl", 8), held=("jsonl", 2))
    assert sizes(str(folder), train_split="train_sft", eval_split="held") == (8, 2)


@pytest.mark.parametrize("stopping", ["first_exhausted", "all_exhausted"])
def test_training_and_evaluation_rows_are_mixed_alike(tmp_path, stopping):
    sizes_of = {"a": (40, 4), "b": (10, 2)}
    for mark, counts in sizes_of.items():
        (tmp_path / mark).mkdir()
        for name, count in zip(("train", "test"), counts, strict=True):
            table(count, mark).to_json(tmp_path / mark / f"{name}.jsonl")
    spec = f"{tmp_path / 'a'} , {tmp_path / 'b'}"
    for number, mixed in enumerate(blending_datasets(spec, "0.5,0.5", stopping_strategy=stopping)):
        texts = mixed["input"][:]
        seen = [len({text for text in texts if text[0] == mark}) == sizes_of[mark][number] for mark in "ab"]
        assert all(seen) if stopping == "all_exhausted" else sum(seen) == 1
        assert (len(set(texts)) == len(texts)) == (stopping == "first_exhausted")


def test_max_samples_may_be_the_float_of_the_old_default_and_cuts_evaluation_too(tmp_path):
    folder = written(tmp_path / "d", train=("jsonl", 9), test=("jsonl", 5))
    assert sizes(str(folder), max_count=1e8) == (9, 5)
    assert sizes(str(folder), max_count=3) == (3, 3)


def test_an_evaluation_split_without_rows_is_an_error(tmp_path):
    folder = written(tmp_path / "d", train=("jsonl", 9))
    (folder / "test.jsonl").touch()
    config = SFTDataConfig(dataset=str(folder), output_key="output")
    with pytest.raises(DataError, match=r"test\.jsonl: no rows"):
        load_train_eval(config, 0, "first_exhausted")
    with pytest.raises(DataError, match=r"test\.jsonl: no rows"):
        load_train_eval(
            SFTDataConfig(dataset=str(folder / "train.jsonl"), eval_dataset=str(folder), output_key="output"),
            0,
            "first_exhausted",
        )


def test_the_second_source_must_have_the_columns_of_the_first(tmp_path):
    a = written(tmp_path / "a", train=("jsonl", 2))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c"}) + "\n")
    config = SFTDataConfig(dataset=f"{a},{tmp_path / 'b.jsonl'}", dataset_probs=".5,.5", output_key="output")
    with pytest.raises(DataError, match=r"b\.jsonl:1: no key 'input'; found: prompt, completion; set --input_key"):
        load_train_eval(config, 0, "first_exhausted")


def test_some_rows_of_any_source_say_what_it_holds(tmp_path):
    folder = written(tmp_path / "d", train=("csv", 40), test=("csv", 1))
    table(40).save_to_disk(tmp_path / "saved")
    (tmp_path / "list.json").write_text(json.dumps(rows(40, "t")))
    for entry in (folder, folder / "train.csv", tmp_path / "saved", f"csv@{folder}", tmp_path / "list.json"):
        found = some_rows(str(entry), "train", flag="--dataset")
        assert all(set(row) == {"input", "output"} for _, row in found) and len(found) < 20
        assert [row["input"][1:] for _, row in (found[0], found[1], found[-1])] == ["0", "4", "39"]
    assert some_rows(str(folder / "train.csv"), "train", flag="--dataset")[1][0] == f"{folder / 'train.csv'}:6"


def test_a_file_that_replaces_another_of_the_same_path_and_age_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"input": text}) + "\n")
        os.utime(path, (1000, 1000))
        assert load_split(str(path), "train", flag="--dataset", required={})[0] == {"input": text}


@pytest.mark.parametrize(
    ("entry", "here"),
    [
        ("json@./d", True),
        ("./nothing", True),
        ("/nothing", True),
        ("rows.jsonl", True),
        ("rows.jsonl.gz", True),
        ("owner/name", False),
        ("owner/name@part", False),
        ("name", False),
    ],
)
def test_what_means_something_here_is_told_from_names_of_a_hub(tmp_path, monkeypatch, entry, here):
    monkeypatch.chdir(tmp_path)
    assert is_here(entry) is here
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_here("owner/name")
