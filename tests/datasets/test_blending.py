import gzip
import json
import logging
import socket
import subprocess
import sys
from collections import Counter

import datasets
import pytest

from openrlhf.config.groups import SFTDataConfig
from openrlhf.datasets.blending import blending_datasets, load_mixture, load_train_eval, parse_probabilities
from openrlhf.errors import DataError, UsageError

REQUIRED = {"input": "--input_key", "output": "--output_key"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep the Arrow cache of ``datasets`` inside the test's folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rows(count, mark="a"):
    return [{"input": f"{mark}{number}", "output": f"answer {number}"} for number in range(count)]


def mixture(spec, probs="1.0", **options):
    defaults = {"split": "train", "max_samples": 10**8, "seed": 0, "stopping": "first_exhausted", "required": REQUIRED}
    return load_mixture(str(spec), probs, **(defaults | options))


def marks(mixed):
    return Counter(text[0] for text in mixed["input"])


def test_one_file_passes_through_in_order(write_lines):
    path = write_lines("a.jsonl", rows(5))
    assert mixture(path)["input"][:] == ["a0", "a1", "a2", "a3", "a4"]


@pytest.mark.parametrize("extension", ["json", "csv", "parquet", "arrow", "jsonl.gz"])
def test_every_local_format_is_read(tmp_path, extension):
    path = tmp_path / f"data.{extension}"
    table = datasets.Dataset.from_list(rows(3))
    if extension == "json":
        path.write_text(json.dumps(rows(3)))
    elif extension == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows(3)).encode()))
    elif extension == "csv":
        table.to_csv(path)
    elif extension == "parquet":
        table.to_parquet(path)
    else:
        table.save_to_disk(tmp_path / "saved")
        path.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes())
    assert mixture(path)["input"][:] == ["a0", "a1", "a2"]


def test_a_folder_saved_to_disk_is_read(tmp_path):
    train, test = datasets.Dataset.from_list(rows(4)), datasets.Dataset.from_list(rows(2, "t"))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "saved")
    assert len(mixture(tmp_path / "saved")) == 4
    assert marks(mixture(tmp_path / "saved", split="test")) == {"t": 2}


@pytest.mark.parametrize("spec", ["{}", "json@{}"])
def test_a_folder_gives_its_train_and_test_files(write_lines, tmp_path, spec):
    write_lines("d/train.jsonl", rows(8))
    write_lines("d/test.jsonl", rows(3, "t"))
    (tmp_path / "d" / "README.md").write_text("not data")
    train, evaluation = blending_datasets(spec.format(tmp_path / "d"), "1.0")
    assert (marks(train), marks(evaluation)) == ({"a": 8}, {"t": 3})


def test_shards_of_a_split_are_read_together(write_lines, tmp_path):
    write_lines("d/data/train-00000-of-00002.jsonl", rows(3))
    write_lines("d/data/train-00001-of-00002.jsonl", rows(3, "b"))
    assert marks(mixture(tmp_path / "d")) == {"a": 3, "b": 3}


def test_a_split_that_several_files_could_be_is_an_error(write_lines, tmp_path):
    write_lines("d/one_train.jsonl", rows(3))
    write_lines("d/two_train.jsonl", rows(3))
    with pytest.raises(DataError, match="could be one_train, two_train"):
        mixture(tmp_path / "d")


def test_first_exhausted_stops_at_the_first_source_that_runs_out(write_lines):
    spec = f"{write_lines('a.jsonl', rows(200))},{write_lines('b.jsonl', rows(20, 'b'))}"
    mixed = mixture(spec, "0.5,0.5")
    assert marks(mixed)["b"] == 20
    assert 5 < marks(mixed)["a"] < 60


def test_all_exhausted_repeats_the_small_source(write_lines):
    spec = f"{write_lines('a.jsonl', rows(100))},{write_lines('b.jsonl', rows(10, 'b'))}"
    mixed = mixture(spec, "0.5,0.5", stopping="all_exhausted")
    assert marks(mixed)["a"] == 100
    assert marks(mixed)["b"] > 60


def test_a_mixture_depends_on_its_seed_alone(write_lines):
    spec = f"{write_lines('a.jsonl', rows(50))},{write_lines('b.jsonl', rows(50, 'b'))}"
    first = mixture(spec, "0.3,0.7", seed=1)["input"][:]
    assert mixture(spec, "0.3,0.7", seed=1)["input"][:] == first
    assert mixture(spec, "0.3,0.7", seed=2)["input"][:] != first


def test_max_samples_cuts_each_source_and_the_mixture(write_lines):
    a, b = write_lines("a.jsonl", rows(50)), write_lines("b.jsonl", rows(50, "b"))
    assert len(mixture(a, max_samples=7)) == 7
    mixed = mixture(f"{a},{b}", None, max_samples=10)
    assert len(mixed) == 10


def test_sources_with_other_columns_mix_on_the_needed_ones(write_lines):
    a = write_lines("a.jsonl", [row | {"meta": {"deep": 1}} for row in rows(4)])
    b = write_lines("b.jsonl", [row | {"meta": "text"} for row in rows(4, "b")])
    mixed = mixture(f"{a},{b}", "0.5,0.5")
    assert sorted(mixed.column_names) == ["input", "output"]


def test_rounded_probabilities_are_made_to_sum_to_one():
    assert sum(parse_probabilities("0.33,0.33,0.33", 3, "--dataset")) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("probs", "message"),
    [
        ("1.0", "1 values for the 2 data sets"),
        ("0.5,0.6", "add up to 1.1"),
        ("-0.5,1.5", "are not negative"),
        ("half,half", "not a list of numbers"),
        ("nan,1", "are not negative, and finite"),
        ([0.5, 0.6], "add up to 1.1"),
    ],
)
def test_malformed_probabilities_name_their_flag(probs, message):
    with pytest.raises(UsageError, match=message) as caught:
        parse_probabilities(probs, 2, "--dataset")
    assert "--dataset_probs" in str(caught.value)


def config(path, **options):
    return SFTDataConfig(**({"dataset": str(path), "output_key": "output"} | options))


def test_without_an_eval_split_three_percent_of_train_are_used_and_said(write_lines, caplog):
    path = write_lines("a.jsonl", rows(100))
    with caplog.at_level(logging.WARNING):
        train, evaluation = load_train_eval(config(path), 0, "first_exhausted")
    assert (len(train), evaluation["input"][:]) == (100, ["a0", "a1", "a2"])
    assert "trained on too" in caplog.text and "--eval_dataset" in caplog.text


def test_the_three_percent_are_at_least_one_row(write_lines):
    _, evaluation = load_train_eval(config(write_lines("a.jsonl", rows(5))), 0, "first_exhausted")
    assert len(evaluation) == 1


def test_eval_dataset_is_used_when_it_is_given(write_lines):
    held_out = write_lines("held.jsonl", rows(4, "h"))
    _, evaluation = load_train_eval(
        config(write_lines("a.jsonl", rows(9)), eval_dataset=str(held_out)), 0, "first_exhausted"
    )
    assert marks(evaluation) == {"h": 4}


def test_an_unknown_split_lists_the_splits_there(write_lines, tmp_path):
    write_lines("d/train.jsonl", rows(3))
    write_lines("d/test.jsonl", rows(3))
    with pytest.raises(DataError, match="no split 'prefs'; splits there: test, train"):
        mixture(tmp_path / "d", split="prefs")


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"input": "x", "output": }', r"a.jsonl:3: bad JSON at column 26"),
        ("[1, 2]", r"a.jsonl:3: expected a JSON object, found list"),
        ({"prompt": "x", "output": "y"}, r"a.jsonl:3: no key 'input'; found: prompt, output; set --input_key"),
        ({"input": "x"}, r"a.jsonl:3: no key 'output'; found: input; set --output_key"),
        (
            {"input": [{"role": "user", "content": "x"}], "output": "y"},
            r"a.jsonl:3: 'input' is a list here and a str in .*a.jsonl:1",
        ),
        (
            {"input": 7, "output": "y"},
            r"a.jsonl:3: 'input' \(--input_key\): expected text or a list of messages",
        ),
        ('{"input": "\\ud800", "output": "y"}', r"a.jsonl:3: half of a surrogate pair"),
        ('{"input": "x", "output": NaN}', r"a.jsonl:3: bad JSON \(NaN is not JSON\)"),
    ],
)
def test_a_broken_line_is_named_by_file_and_line(write_lines, broken, message):
    path = write_lines("a.jsonl", [*rows(2), broken, *rows(2)])
    with pytest.raises(DataError, match=message):
        mixture(path)


def test_bytes_that_are_not_utf8_are_named_by_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"input": "x", "output": "y"}\n{"input": "\xff", "output": "y"}\n')
    with pytest.raises(DataError, match="a.jsonl:2: not UTF-8"):
        mixture(tmp_path / "a.jsonl")


def test_unicode_blank_lines_a_byte_order_mark_and_crlf_survive_loading(tmp_path):
    texts = ["emoji 🤖👩‍👩‍👧", "שלום עולם", "zero\u200bwidth", "nul\u0000inside", "é\u0301", "line\nbreak"]
    lines = "".join(json.dumps({"input": text, "output": "y"}, ensure_ascii=False) + "\r\n\r\n" for text in texts)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert mixture(tmp_path / "a.jsonl")["input"][:] == texts


def test_csv_and_parquet_without_the_key_name_the_columns(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\n1,2\n")
    with pytest.raises(DataError, match="a.csv:1: no key 'input'; found: question, answer; set --input_key"):
        mixture(tmp_path / "a.csv")
    datasets.Dataset.from_list([{"question": "x"}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no key 'input'; found: question; set --input_key"):
        mixture(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "empty.json"])
def test_an_empty_file_is_a_data_error(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="no rows"):
        mixture(tmp_path / name)


def test_a_missing_file_suggests_the_nearest_name(write_lines, tmp_path):
    write_lines("train_data.jsonl", rows(1))
    with pytest.raises(DataError, match="no such file or folder; perhaps you meant .*train_data.jsonl"):
        mixture(tmp_path / "trian_data.jsonl")


def test_dataset_scripts_are_refused(tmp_path):
    (tmp_path / "script.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match="scripts are not run"):
        mixture(tmp_path / "script.py")
    folder = tmp_path / "named"
    folder.mkdir()
    (folder / "named.py").write_text("raise SystemExit('ran')")
    with pytest.raises(DataError, match="scripts are not run"):
        mixture(folder)


def test_a_hub_name_that_cannot_be_loaded_is_a_data_error(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/no-such-dataset: cannot be loaded"):
        mixture("nobody/no-such-dataset")


def test_loading_rows_does_not_import_torch(write_lines):
    path = write_lines("a.jsonl", rows(3))
    code = (
        "import sys; from openrlhf.datasets.blending import load_mixture; import openrlhf.datasets.templates\n"
        f"load_mixture({str(path)!r}, '1.0', split='train', max_samples=9, seed=0, stopping='first_exhausted')\n"
        "sys.exit(int('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_answers_in_a_csv_file_stay_the_text_they_are(tmp_path):
    answers = ["007", "72", "None", "NA", "1e5", "true", " x ", "1,000", "two\nlines"]
    quoted = "".join(f'q,"{answer}",{number}\n' for number, answer in enumerate(answers))
    (tmp_path / "a.csv").write_text("\ufeffinput,output,margin\n" + quoted, encoding="utf-8")
    table = mixture(tmp_path / "a.csv")
    assert table["output"][:] == answers
    assert table["margin"][:] == list(range(len(answers)))


def test_packed_lines_are_read_and_checked_too(tmp_path):
    text = "".join(json.dumps(row) + "\n" for row in [*rows(2), {"input": "x"}])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:3: no key 'output'"):
        mixture(tmp_path / "a.jsonl.gz")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.rsplit("{", 1)[0].encode()))
    assert len(mixture(tmp_path / "b.jsonl.gz")) == 2


def test_a_line_may_be_long_but_not_endless(tmp_path, monkeypatch):
    monkeypatch.setattr("openrlhf.datasets.local_files.LINE_LIMIT", 1000)
    line = json.dumps({"input": "x" * 900, "output": "y"})
    (tmp_path / "a.jsonl").write_text(f"{line}\n{line}\n")
    assert len(mixture(tmp_path / "a.jsonl")) == 2
    (tmp_path / "a.jsonl").write_text(f"{line}\n{json.dumps({'input': 'x' * 1000, 'output': 'y'})}\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer than"):
        mixture(tmp_path / "a.jsonl")


def test_a_hub_that_does_not_answer_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr("datasets.config.HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            DataError, match="--dataset nobody/none: no such file or folder here, and the hub cannot be"
        ):
            mixture("nobody/none")


def test_a_margin_is_a_number_in_pairs_and_any_column_elsewhere(write_lines):
    path = write_lines("a.jsonl", [{"input": "x", "output": "y", "margin": "wide"}])
    assert len(mixture(path)) == 1
    with pytest.raises(DataError, match="a.jsonl:1: 'margin' is a number; found str"):
        mixture(path, required={"input": "--chosen_key", "output": "--rejected_key"})
