"""What a supervised run reads before its model: once, with the columns that the data names."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from openrlhf.cli import train_kto
from openrlhf.config.supervised import KTOConfig, ProcessDataConfig, SFTConfig, UnpairedDataConfig
from openrlhf.datasets.process_reward import ProcessRewardDataset
from openrlhf.datasets.sft import SFTDataset
from openrlhf.errors import DataError
from openrlhf.trainer.inputs import read_inputs
from tests.helpers import tiny_folder


@pytest.fixture
def config(tmp_path):
    """A model folder, and conversations in two files of a folder."""
    tiny_folder(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for name, count in (("train", 6), ("test", 2)):
        talks = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "Ho"}] for n in range(count)]
        lines = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines)
    plain = SFTConfig()
    model = replace(plain.model, pretrain=str(tmp_path / "model"))
    return replace(plain, model=model, data=replace(plain.data, dataset=str(tmp_path / "data")))


class Counted(SFTDataset):
    made = 0

    def _add(self, batch):
        Counted.made += 1
        super()._add(batch)


def test_rows_are_tokenised_once_and_kept_in_the_run_folder(config, tmp_path, caplog):
    Counted.made = 0
    first, second = (read_inputs(config, Counted, "first_exhausted", run_path=tmp_path / "run") for _ in range(2))
    assert Counted.made == 2  # training and evaluation rows
    assert (len(first.train), len(first.evaluation)) == (6, 2)
    assert second.train.digest == first.train.digest != first.evaluation.digest == second.evaluation.digest
    kept = sorted(path.name for path in (tmp_path / "run" / "tokens").glob("*.rows"))
    assert kept == ["eval.rows", "train.rows"]
    assert first.train[0].text.endswith("assistant\nHo<|im_end|>")
    assert "read with --input_key messages --apply_chat_template" in caplog.text


@pytest.mark.parametrize(("train", "asked"), [(1, False), (6, True), (6, False)])
def test_a_set_of_one_row_is_too_small_where_rows_are_compared(config, tmp_path, caplog, train, asked):
    for name, count in (("train", train), ("test", 1)):
        rows = [json.dumps({"input": f"{n}", "output": "Ho", "label": n % 2}) + "\n" for n in range(count)]
        (tmp_path / "data" / f"{name}.jsonl").write_text("".join(rows))
    folder = str(tmp_path / "data")
    data = UnpairedDataConfig(dataset=folder, eval_dataset=folder if asked else None, output_key="output")
    config = KTOConfig(model=replace(KTOConfig().model, pretrain=config.model.pretrain), data=data)
    if train == 1 or asked:
        with pytest.raises(DataError, match=f"--{'eval_' * asked}dataset {folder}: 1 row is not enough, .*: give 2"):
            train_kto.recipe(config).read(config)
    else:
        assert not train_kto.recipe(config).read(config).evaluation
        assert "1 row is not enough" in caplog.text and "the run does not evaluate" in caplog.text


def test_solutions_in_steps_need_no_key_flags(config, tmp_path, caplog):
    steps = {"prompt": "1 + 1?", "completions": ["2", "3"], "labels": [True, False]}
    (tmp_path / "steps.jsonl").write_text(f"{json.dumps(steps)}\n" * 3)
    data = ProcessDataConfig(dataset=str(tmp_path / "steps.jsonl"), placeholder_token="*", reward_tokens=("+", "-"))
    inputs = read_inputs(
        replace(config, data=data), ProcessRewardDataset, "first_exhausted", run_path=tmp_path / "run"
    )
    assert "read with --input_key prompt --steps_key completions --label_key labels" in caplog.text
    assert inputs.train[2].labels == [1.0, 0.0]
    assert (tmp_path / "run" / "tokens" / "train.rows").exists()


def test_without_a_run_folder_nothing_is_written(config, tmp_path):
    before = set(tmp_path.rglob("*"))
    assert len(read_inputs(config, SFTDataset, "first_exhausted").train) == 6
    assert set(tmp_path.rglob("*")) == before
