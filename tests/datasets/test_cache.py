"""Tokenised rows are made once, and used again only for just the same rows, tokenizer, settings and code."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import datasets
import pytest

from openrlhf.config.groups import PreferenceDataConfig, SFTDataConfig
from openrlhf.config.supervised import ProcessDataConfig, UnpairedDataConfig
from openrlhf.datasets import cache
from openrlhf.datasets.blending import load_train_eval
from openrlhf.datasets.cache import cache_key, kept_rows
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.datasets.process_reward import ProcessRewardDataset
from openrlhf.datasets.reward import PreferenceDataset
from openrlhf.datasets.rows import SOURCES
from openrlhf.datasets.sft import SFTDataset
from openrlhf.datasets.unpaired_preference import UnpairedPreferenceDataset
from openrlhf.errors import DataError, InfraError
from tests.helpers import tiny_tokenizer

ROWS = [{"input": f"What is {n} + 30?", "output": f"It is {n + 30}. " * n} for n in range(1, 9)]
PAIRS = [{"chosen": f"It is {n}.", "rejected": "No " * n, "margin": n / 3} for n in range(1, 9)]
CONFIG = {"dataset": "d", "output_key": "output", "max_len": 64}


class Counted(SFTDataset):
    """Says how often rows were tokenised."""

    made = 0

    def _add(self, batch):
        Counted.made += 1
        super()._add(batch)


@pytest.fixture(autouse=True)
def from_zero():
    Counted.made = 0


def table(rows=ROWS):
    return datasets.Dataset.from_list(rows)


def build(tokenizer, path, rows=ROWS, **options):
    return Counted(table(rows), tokenizer, SFTDataConfig(**(CONFIG | options)), cache=path)


def test_the_second_start_reads_what_the_first_one_made(chatml, tmp_path, caplog):
    path = tmp_path / "tokens" / "train.rows"
    first = build(chatml, path)
    said, made = caplog.messages, Counted.made
    caplog.clear()
    second = build(chatml, path)
    assert made == Counted.made == 1
    in_memory = build(chatml, None)
    assert [first[i] for i in range(8)] == [second[i] for i in range(8)] == [in_memory[i] for i in range(8)]
    assert first.lengths.tolist() == second.lengths.tolist() == in_memory.lengths.tolist()
    assert fingerprint(first) == fingerprint(second) == fingerprint(in_memory)
    assert (second.dropped, second.truncated) == (first.dropped, first.truncated) and second.truncated
    assert caplog.messages[0] == said[0] and "cut at --max_len" in said[0]
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.rows", "train.rows.lock"]


def test_pairs_come_back_with_their_margins(chatml, tmp_path):
    config = PreferenceDataConfig(dataset="d", max_len=16)
    rows = [*PAIRS, {"chosen": "x", "rejected": "x", "margin": None}]
    first, second = (PreferenceDataset(table(rows), chatml, config, cache=tmp_path / "rows") for _ in range(2))
    plain = PreferenceDataset(rows, chatml, config)
    assert [second[i] for i in range(8)] == [first[i] for i in range(8)] == [plain[i] for i in range(8)]
    assert [second[i].margin for i in range(8)] == [n / 3 for n in range(1, 9)]
    assert second.dropped == plain.dropped == {"chosen equals rejected": 1}
    assert second.lengths.tolist() == plain.lengths.tolist()


def test_answers_come_back_with_their_labels(chatml, tmp_path):
    config = UnpairedDataConfig(dataset="d", output_key="output", max_len=64)
    rows = [{**row, "label": number % 3 == 0} for number, row in enumerate([*ROWS, ROWS[0] | {"output": " "}])]
    first, second = (UnpairedPreferenceDataset(table(rows), chatml, config, cache=tmp_path / "rows") for _ in range(2))
    plain = UnpairedPreferenceDataset(rows, chatml, config)
    assert [second[i] for i in range(8)] == [first[i] for i in range(8)] == [plain[i] for i in range(8)]
    assert [second[i].desirable for i in range(8)] == [number % 3 == 0 for number in range(8)]
    assert second.mismatched(0, 5) == plain.mismatched(0, 5)
    assert second.dropped == plain.dropped == {"empty response": 1}
    other = [*rows[:-1], rows[-1] | {"label": True}]
    assert fingerprint(second) == fingerprint(plain) == fingerprint(UnpairedPreferenceDataset(other, chatml, config))
    other = [rows[0] | {"label": False}, *rows[1:]]
    assert fingerprint(plain) != fingerprint(UnpairedPreferenceDataset(other, chatml, config))


@pytest.mark.parametrize("labels", [["+", "-"], [1 / 3, 0.0]])
def test_steps_come_back_with_their_labels(chatml, tmp_path, labels):
    config = ProcessDataConfig(dataset="d", placeholder_token="*", reward_tokens=("+", "-"), max_len=24)
    rows = [{"input": f"{n} * {'2 ' * n}*", "label": labels} for n in range(1, 12)]
    first, second = (ProcessRewardDataset(table(rows), chatml, config, cache=tmp_path / "rows") for _ in range(2))
    plain = ProcessRewardDataset(rows, chatml, config)
    assert [second[i] for i in range(11)] == [first[i] for i in range(11)] == [plain[i] for i in range(11)]
    assert second[0].labels == plain[0].labels and len(second[10].labels) == 1
    batches = [data.collate([data[0], data[10]]) for data in (second, plain)]
    assert batches[0].labels.dtype == batches[1].labels.dtype
    assert second.truncated == plain.truncated > 0 and (second.lengths == plain.lengths).all()


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (ROWS[::-1], {}),
        (ROWS[:-1], {}),
        ([*ROWS[:-1], ROWS[-1] | {"output": "It is 39"}], {}),
        (ROWS, {"max_len": 63}),
        (ROWS, {"input_template": "Q: {}"}),
        (ROWS, {"apply_chat_template": True}),
        (ROWS, {"too_long": "drop"}),
    ],
)
def test_other_rows_and_other_settings_are_made_anew(chatml, tmp_path, rows, options):
    build(chatml, tmp_path / "rows")
    again = build(chatml, tmp_path / "rows", rows, **options)
    assert Counted.made == 2
    assert fingerprint(again) == fingerprint(build(chatml, None, rows, **options))


def test_data_that_is_renamed_or_moved_is_not_made_anew_and_what_replaces_it_is(chatml, tmp_path):
    def read(path):
        cfg = SFTDataConfig(**CONFIG | {"dataset": str(path)})
        train, _ = load_train_eval(cfg, 0, "first_exhausted")
        return Counted(train, chatml, cfg, cache=tmp_path / "run" / "train.rows")

    old, new = tmp_path / "a.jsonl", tmp_path / "elsewhere" / "b.jsonl"
    old.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    first = read(old)
    new.parent.mkdir()
    old.rename(new)
    assert fingerprint(read(new)) == fingerprint(first) and Counted.made == 1
    old.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    assert read(old)[0] == first[7] and Counted.made == 2


def test_flags_that_choose_rows_are_in_the_key_by_the_rows_they_choose(chatml, tmp_path):
    options = {"dataset_probs": "1", "train_split": "a", "eval_dataset": "e", "eval_split": "b", "max_samples": 9}
    build(chatml, tmp_path / "rows")
    build(chatml, tmp_path / "rows", **options)
    assert Counted.made == 1
    assert {item.name for item in dataclasses.fields(SFTDataConfig)} >= SOURCES


def test_another_tokenizer_template_or_code_is_another_key(chatml, tmp_path, monkeypatch):
    rows = table()
    keys = {cache_key(rows, chatml)}
    tokenizer = tiny_tokenizer(tmp_path)
    assert cache_key(rows, tokenizer) in keys
    tokenizer.chat_template = "{{ messages }}"
    keys.add(cache_key(rows, tokenizer))
    tokenizer.eos_token = "<|im_start|>"
    keys.add(cache_key(rows, tokenizer))
    tokenizer.add_tokens(["clips"])
    keys.add(cache_key(rows, tokenizer))
    monkeypatch.setattr(cache, "_code", lambda: "changed")
    keys.add(cache_key(rows, chatml))
    assert len(keys) == 5 and None not in keys


def test_the_key_follows_the_content_and_not_how_it_was_put_together(chatml):
    rows = table([*ROWS, *ROWS])
    shuffled = rows.select([3, 1, 12, 0])
    again = table([ROWS[3], ROWS[1], ROWS[4], ROWS[0]])
    assert cache_key(shuffled, chatml) == cache_key(again, chatml) != cache_key(rows.select([1, 3, 12, 0]), chatml)
    with_turns = [{"input": [{"role": "user", "content": text}], "output": "x"} for text in "abc"]
    assert cache_key(table(with_turns).select([2]), chatml) == cache_key(table(with_turns[2:]), chatml)


def test_what_shows_no_content_is_not_kept(chatml, tmp_path):
    assert cache_key(ROWS, chatml) is None
    SFTDataset(ROWS, chatml, SFTDataConfig(**CONFIG), cache=tmp_path / "rows")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "folder"])
def test_a_damaged_or_foreign_file_is_made_anew(chatml, tmp_path, damage):
    path = tmp_path / "rows"
    rows = list(map(build(chatml, path).__getitem__, range(8)))
    content = path.read_bytes()
    if damage == "foreign":
        build(chatml, path, ROWS[:2])
    else:
        middle = len(content) // 2
        changed = {"cut": content[:middle], "flipped": content[:middle] + b"?" + content[middle + 1 :]}
        path.write_bytes(changed.get(damage, b""))
    if damage == "folder":
        path.unlink()
        path.mkdir()
        with pytest.raises(InfraError, match="--run_path"):
            build(chatml, path)
        return
    Counted.made = 0
    again = build(chatml, path)
    assert Counted.made == 1
    assert [again[i] for i in range(8)] == rows
    assert path.read_bytes() == content


def test_rows_in_use_stay_as_they_are_when_the_file_is_replaced(chatml, tmp_path):
    first = build(chatml, tmp_path / "rows")
    before = [first[i] for i in range(8)]
    build(chatml, tmp_path / "rows", ROWS[:3])
    assert [first[i] for i in range(8)] == before


def test_unusable_data_leave_no_file(chatml, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match="no row can be used"):
            build(chatml, tmp_path / "rows", [{"input": " ", "output": "x"}])
    assert [p.name for p in tmp_path.iterdir()] == ["rows.lock"]


def test_a_folder_that_cannot_be_written_is_said(chatml, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InfraError, match=r"cannot keep the tokenised rows in .*file.*--run_path"):
        build(chatml, tmp_path / "file" / "rows")


MAKER = """
import sys, time
from pathlib import Path
from openrlhf.datasets.cache import kept_rows
def make(writer):
    with open("made", "a") as file:
        file.write("x")
    time.sleep(float(sys.argv[1]))
    writer.add([1, 2, 3])
    return {}
rows, _ = kept_rows(Path("rows"), "key", 1, make)
print(rows[0][0].tolist())
"""


def start(folder, seconds):
    return subprocess.Popen([sys.executable, "-c", MAKER, str(seconds)], cwd=folder, stdout=subprocess.PIPE, text=True)


def wait_for(path):
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_of_two_ranks_one_tokenises_and_the_other_waits(tmp_path):
    ranks = [start(tmp_path, 1) for _ in range(2)]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["[1, 2, 3]\n"] * 2
    assert (tmp_path / "made").read_text() == "x"


def test_a_rank_that_waits_long_says_once_for_whom(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "SILENT_S", 0.2)
    caplog.set_level("INFO")
    busy = start(tmp_path, 1.5)
    wait_for(tmp_path / "made")
    rows, _ = kept_rows(tmp_path / "rows", "key", 1, lambda writer: {})
    assert rows[0][0].tolist() == [1, 2, 3] and busy.wait(timeout=60) == 0
    [said] = caplog.messages
    assert said.startswith(f"waiting for process {busy.pid} on {os.uname().nodename} (since ")
    assert said.endswith(f"which makes the tokenised rows {tmp_path / 'rows'}")


def test_a_rank_that_is_killed_meanwhile_leaves_nothing_that_is_trusted_or_waited_for(tmp_path):
    killed = start(tmp_path, 60)
    wait_for(tmp_path / "made")
    other = start(tmp_path, 0)
    killed.kill()
    killed.communicate()
    assert other.communicate(timeout=60)[0] == "[1, 2, 3]\n"
    assert (tmp_path / "made").read_text() == "xx"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made", "rows", "rows.lock"]


def test_the_facts_are_those_of_the_making(tmp_path):
    def make(writer):
        writer.add([1])
        return {"dropped": {"empty": 2}}

    for _ in range(2):
        assert kept_rows(tmp_path / "rows", "key", 1, make)[1] == {"dropped": {"empty": 2}}
    assert json.dumps("key").encode() in (tmp_path / "rows").read_bytes()
