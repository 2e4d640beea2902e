"""A model folder of a stranger runs no code unasked, unpickles nothing, and names nothing outside itself."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from openrlhf.config.groups import ModelConfig
from openrlhf.errors import DataError
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.tokenizer import load_tokenizer
from tests.helpers import tiny_causal_lm, tiny_folder, tiny_tokenizer
from tests.security.canary import Canary, code, pickled

TRUSTED = ModelConfig(trust_remote_code=True)
CLASSES = """
from transformers import Qwen2Config, Qwen2ForCausalLM, PreTrainedTokenizerFast
class OwnConfig(Qwen2Config):
    model_type = "own_qwen"
class OwnModel(Qwen2ForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model folder whose config, model and tokenizer come with code that writes ``canary``."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(tiny_folder(tmp_path / "model"))
    (folder / "own.py").write_text(code(tmp_path / "canary") + CLASSES)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    rewrite(folder / "config.json", model_type="own_qwen", architectures=["OwnModel"], auto_map=names)
    mapped = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    rewrite(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=mapped)
    return folder, tmp_path / "canary"


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: load_tokenizer(folder),
        lambda folder: load_causal_lm(folder, ModelConfig()),
        lambda folder: load_value_model(folder, ModelConfig()),
    ],
    ids=["tokenizer", "policy", "reward model"],
)
def test_code_of_a_model_folder_is_not_run_and_the_error_names_the_flag(with_code, load):
    folder, canary = with_code
    with pytest.raises(DataError, match="brings code of its own.*--trust_remote_code"):
        load(str(folder))
    assert not canary.exists()


def test_code_of_a_tokenizer_alone_is_not_run(with_code):
    folder, canary = with_code
    tiny_causal_lm(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="its tokenizer brings code of its own.*--trust_remote_code"):
        load_tokenizer(str(folder))
    assert not canary.exists()


def test_with_the_flag_the_code_runs(with_code):
    folder, canary = with_code
    assert type(load_causal_lm(str(folder), TRUSTED)).__name__ == "OwnModel"
    assert canary.exists()
    canary.unlink()
    assert load_tokenizer(str(folder), trust_remote_code=True).eos_token_id == 2


@pytest.mark.full
def test_vllm_runs_the_code_with_the_flag_only(with_code):
    pytest.importorskip("vllm")
    from openrlhf.rollout.vllm_engine import VLLMEngine

    folder, canary = with_code
    with pytest.raises(DataError, match="vLLM cannot serve"):
        VLLMEngine(str(folder), dtype="float32", max_model_len=64)
    assert not canary.exists()
    with contextlib.suppress(DataError):  # whether vLLM can serve that class is another matter
        VLLMEngine(str(folder), dtype="float32", max_model_len=64, trust_remote_code=True)
    assert canary.exists()


def test_a_family_that_transformers_knows_is_loaded_without_the_code_beside_it(with_code):
    folder, canary = with_code
    tiny_folder(folder)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    rewrite(folder / "config.json", auto_map=names)
    assert type(load_causal_lm(str(folder), ModelConfig())).__name__ == "Qwen2ForCausalLM"
    load_tokenizer(str(folder))
    assert not canary.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(tmp_path, name):
    folder = Path(tiny_folder(tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickled(tmp_path / "canary"))
    with pytest.raises(DataError, match=f"{name}.*save_pretrained"):
        load_causal_lm(str(folder), ModelConfig())
    assert not (tmp_path / "canary").exists()


def test_pickles_beside_good_files_are_not_read(tmp_path):
    folder = Path(tiny_folder(tmp_path / "model"))
    for name in ("pytorch_model.bin", "vocab.pkl", "tokenizer.pkl", "training_args.bin", "added_tokens.pt"):
        torch.save(Canary(tmp_path / "canary"), folder / name)
    load_tokenizer(str(folder), use_fast=False)
    load_tokenizer(str(folder))
    load_value_model(str(folder), ModelConfig())
    load_causal_lm(str(folder), ModelConfig())
    assert not (tmp_path / "canary").exists()


def sharded(folder: Path) -> Path:
    """Save a tiny model in two shards and return its index."""
    tiny_causal_lm(folder, "llama", tied=False)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    table = {name: file for file, part in parts.items() for name in part}
    index.write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return index


def test_a_sharded_model_loads(tmp_path):
    sharded(tmp_path)
    load_causal_lm(str(tmp_path), ModelConfig())


BAD_NAMES = [
    ("../outside.safetensors", "leads out of the folder"),
    ("../../outside.safetensors", "leads out of the folder"),
    ("sub/../../outside.safetensors", "leads out of the folder"),
    ("sub/../model-00001-of-00002.safetensors", "leads out of the folder"),
    ("..", "leads out of the folder"),
    ("{outside}", "leads out of the folder"),
    ("//{outside}", "leads out of the folder"),
    ("linked.safetensors", "leads out of the folder"),
    ("linked/outside.safetensors", "leads out of the folder"),
    ("loop", "cannot be followed"),
    ("~/outside.safetensors", "the folder has no"),
    ("missing.safetensors", "the folder has no"),
    ("a" * 5000, "is not the name of a file"),
    ("nul\0.safetensors", "is not the name of a file"),
    ("", "is not the name of a file"),
    (".", "the folder has no"),
    (None, "is not the name of a file"),
    (7, "is not the name of a file"),
    (["model-00001-of-00002.safetensors"], "not an index of weights"),
]


@pytest.mark.parametrize(("name", "message"), BAD_NAMES, ids=[repr(row[0])[:40] for row in BAD_NAMES])
def test_an_index_names_only_files_of_its_folder(tmp_path, name, message):
    outside = tmp_path / "outside.safetensors"
    save_file({"lm_head.weight": torch.zeros(320, 32)}, outside, {"format": "pt"})
    folder = tmp_path / "model"
    index = sharded(folder)
    (folder / "sub").mkdir()
    (folder / "linked.safetensors").symlink_to(outside)
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop").symlink_to("loop")
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = name.format(outside=outside) if isinstance(name, str) else name
    index.write_text(json.dumps(content))
    if name != "linked.safetensors":
        (folder / "linked.safetensors").unlink()
    with pytest.raises(DataError, match=message):
        load_causal_lm(str(folder), ModelConfig())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "7"])
def test_a_broken_index_is_a_data_error(tmp_path, text):
    sharded(tmp_path).write_text(text)
    with pytest.raises(DataError, match="not an index of weights"):
        load_causal_lm(str(tmp_path), ModelConfig())


def test_weights_that_are_a_link_to_another_folder_are_refused(tmp_path):
    tiny_causal_lm(tmp_path / "other")
    tiny_causal_lm(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "other" / "model.safetensors")
    with pytest.raises(DataError, match="model.safetensors' leads out of the folder"):
        load_causal_lm(str(tmp_path / "model"), ModelConfig())


def test_the_links_of_the_hub_cache_and_a_link_to_the_folder_itself_are_followed(tmp_path):
    cached = tmp_path / "models--a--b"
    snapshot = cached / "snapshots" / "1234"
    tiny_causal_lm(snapshot)
    tiny_tokenizer(snapshot)
    (cached / "blobs").mkdir()
    os.rename(snapshot / "model.safetensors", cached / "blobs" / "5678")
    (snapshot / "model.safetensors").symlink_to("../../blobs/5678")
    (tmp_path / "link").symlink_to(snapshot)
    load_causal_lm(str(snapshot), ModelConfig())
    load_causal_lm(str(tmp_path / "link"), ModelConfig())


def test_a_folder_that_the_hub_filled_with_links_into_its_cache_loads(tmp_path):
    blobs, folder = tmp_path / "hub" / "models--a--b" / "blobs", tmp_path / "downloaded"
    blobs.mkdir(parents=True)
    tiny_causal_lm(folder)
    tiny_tokenizer(folder)
    os.rename(folder / "model.safetensors", blobs / "5678")
    (folder / "model.safetensors").symlink_to(blobs / "5678")
    load_causal_lm(str(folder), ModelConfig())
    (blobs / "inner").mkdir()
    os.rename(blobs / "5678", blobs / "inner" / "5678")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(blobs / "inner" / "5678")
    with pytest.raises(DataError, match="leads out of the folder"):
        load_causal_lm(str(folder), ModelConfig())
