"""What is exported loads in transformers with the same outputs, and a folder never holds a mixture of two models."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from openrlhf.errors import InfraError
from openrlhf.strategy import export, files
from openrlhf.strategy.export import export_model
from tests.helpers import tiny_causal_lm, tiny_folder, tiny_tokenizer
from tests.strategy import programs
from tests.strategy.ranks import run_ranks
from tests.strategy.test_checkpoint import Killed, killing


def logits(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        return model(torch.arange(12)[None] * 9 % 300).logits


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_loads_with_the_same_outputs_and_tokenizer(tied, tmp_path):
    model = tiny_causal_lm(tied=tied)
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    with torch.no_grad():
        expected = model(torch.arange(12)[None] * 9 % 300).logits
    export_model(model, programs.strategy_of(zero_stage=0), tmp_path / "out", tokenizer)
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("12 + 30") == tokenizer.encode("12 + 30")
    assert not list(tmp_path.glob("*.part")) and (tmp_path / "out" / "model.safetensors").exists()


def test_exporting_into_a_folder_keeps_what_else_is_there_and_removes_old_shards(tmp_path, monkeypatch):
    strategy = programs.strategy_of(zero_stage=0)
    (tmp_path / "ckpt" / "checkpoints_sft").mkdir(parents=True)
    (tmp_path / "ckpt" / "checkpoints_sft" / "keep.txt").write_text("x")
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "20KB")
    export_model(tiny_causal_lm(seed=1), strategy, tmp_path / "ckpt")
    assert len(list((tmp_path / "ckpt").glob("model-*.safetensors"))) > 1
    monkeypatch.setattr(export, "MAX_SHARD_SIZE", "5GB")
    export_model(tiny_causal_lm(seed=2), strategy, tmp_path / "ckpt")
    weights = sorted(path.name for path in (tmp_path / "ckpt").glob("model*"))
    assert weights == ["model.safetensors"]
    assert (tmp_path / "ckpt" / "checkpoints_sft" / "keep.txt").exists()
    assert not (tmp_path / "ckpt" / ".export.tmp").exists()


@pytest.mark.parametrize(("old", "new"), [("5GB", "5GB"), ("20KB", "20KB"), ("20KB", "5GB"), ("5GB", "20KB")])
def test_a_kill_at_any_call_leaves_the_old_model_the_new_one_or_none(old, new, tmp_path):
    sources = {}
    for seed, size in ((1, old), (2, new)):
        tiny_causal_lm(seed=seed).save_pretrained(tmp_path / str(seed), max_shard_size=size)
        sources[seed] = logits(tmp_path / str(seed))
    at, finished, seen = 1, False, set()
    while not finished:
        target, staging = tmp_path / f"out{at}", tmp_path / f"staging{at}"
        shutil.copytree(tmp_path / "1", target)
        shutil.copytree(tmp_path / "2", staging)
        with pytest.MonkeyPatch.context() as patch:
            calls = killing(patch, at)
            for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "rmdir")):
                patch.setattr(owner, name, counted(getattr(owner, name), calls, at))
            try:
                files.publish_model(staging, target)
                finished = True
            except Killed:
                at += 1
        seen.add(which(target, sources))
    assert seen <= {"none", 1, 2} and 2 in seen


def counted(original, calls, at):
    def call(*args, **kwargs):
        calls["count"] += 1
        if calls["count"] == at:
            raise Killed
        return original(*args, **kwargs)

    return call


def which(folder, sources):
    """Return the seed of the model that ``folder`` loads, "none", or "mixture"."""
    try:
        found = logits(folder)
    except (OSError, ValueError):
        return "none"
    return next((seed for seed, expected in sources.items() if torch.equal(found, expected)), "mixture")


def test_a_full_disk_is_said_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    model = tiny_causal_lm()

    def refuse(folder, **options):
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", refuse)
    with pytest.raises(InfraError, match="No space left on device"):
        export_model(model, programs.strategy_of(zero_stage=0), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_sharded_policies_train_and_export_like_whole_ones(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    expected = programs.sharded_model(folder, str(tmp_path / "whole"), value=False, stage=0)
    results = run_ranks(
        "tests.strategy.programs:sharded_model", 2, folder=folder, out=str(tmp_path / "shards"), value=False
    )
    for found in results:
        assert found["sharded"] and not expected["sharded"]
        assert found["read"] == pytest.approx(expected["read"], rel=1e-5)
        assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert found["sum"] == pytest.approx(expected["sum"], abs=1e-3)
    torch.testing.assert_close(logits(tmp_path / "shards"), logits(tmp_path / "whole"), rtol=1e-3, atol=1e-3)


@pytest.mark.full
def test_sharded_value_models_train_and_export_like_whole_ones(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    expected = programs.sharded_model(folder, str(tmp_path / "whole"), value=True, stage=0)
    found = run_ranks(
        "tests.strategy.programs:sharded_model", 2, folder=folder, out=str(tmp_path / "shards"), value=True
    )[0]
    assert found["sharded"] and found["read"] == pytest.approx(expected["read"], rel=1e-4)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    for name in ("whole", "shards"):
        from safetensors.torch import load_file

        assert "value_head.weight" in load_file(tmp_path / name / "model.safetensors")
        loaded = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / name, key_mapping={"^value_head": "score"}, output_loading_info=True
        )
        assert loaded[0].config.num_labels == 1 and not loaded[1]["missing_keys"]
