import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf.config.groups import ModelConfig
from openrlhf.errors import DataError
from openrlhf.models.loading import check_path, load_causal_lm, load_value_model
from tests.helpers import tiny_causal_lm, tiny_folder

PLAIN = ModelConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


def rewrite(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_weights_are_float32_without_bf16_and_bfloat16_with_it(folder):
    assert load_causal_lm(folder, PLAIN).dtype == torch.float32
    assert load_causal_lm(folder, ModelConfig(bf16=True)).dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_loading_gives_the_saved_weights(tmp_path, tied):
    model = tiny_causal_lm(tmp_path, "llama", tied=tied)
    loaded = load_causal_lm(str(tmp_path), PLAIN).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in model.state_dict().items())


def test_a_missing_folder_is_a_data_error_that_names_the_flag(tmp_path):
    with pytest.raises(DataError, match="--pretrain .*nothing.*no such folder"):
        load_causal_lm(str(tmp_path / "nothing"), PLAIN)
    with pytest.raises(DataError, match="--critic_pretrain"):
        load_causal_lm(str(tmp_path / "nothing"), PLAIN, flag="--critic_pretrain")


def test_no_path_at_all_is_a_data_error():
    with pytest.raises(DataError, match="--pretrain is missing"):
        load_causal_lm(None, PLAIN)


def test_a_hub_name_is_passed_through(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="somebody/no-such-model: no such folder here, and the hub"):
        load_causal_lm("somebody/no-such-model", PLAIN)


def test_pickled_weights_are_named_and_never_read(tmp_path):
    tiny_causal_lm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(DataError, match=r"pytorch_model\.bin.*save_pretrained"):
        load_causal_lm(str(tmp_path), PLAIN)


def test_a_folder_without_weights_is_a_data_error(tmp_path):
    tiny_causal_lm(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        load_causal_lm(str(tmp_path), PLAIN)


def test_a_folder_without_a_config_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"config\.json"):
        load_causal_lm(str(tmp_path), PLAIN)


def test_a_broken_config_is_a_data_error(tmp_path):
    tiny_causal_lm(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match="not a JSON file"):
        load_causal_lm(str(tmp_path), PLAIN)


def test_code_of_a_model_is_not_run_unasked(tmp_path):
    tiny_causal_lm(tmp_path)
    rewrite(tmp_path, model_type="my_own", auto_map={"AutoModelForCausalLM": "modeling.MyOwn"})
    (tmp_path / "modeling.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(DataError, match="--trust_remote_code"):
        load_causal_lm(str(tmp_path), PLAIN)


def test_a_checkpoint_with_missing_weights_is_a_data_error(tmp_path):
    tiny_causal_lm(tmp_path, "llama", layers=2)
    rewrite(tmp_path, num_hidden_layers=3)
    with pytest.raises(DataError, match="no weights for model.layers.2"):
        load_causal_lm(str(tmp_path), PLAIN)


def test_weights_of_other_shapes_are_a_data_error(tmp_path):
    tiny_causal_lm(tmp_path, "llama")
    rewrite(tmp_path, intermediate_size=48)
    with pytest.raises(DataError, match="shapes"):
        load_causal_lm(str(tmp_path), PLAIN)


def test_the_load_happens_inside_the_given_context(folder):
    events = []

    @contextlib.contextmanager
    def context():
        events.append("in")
        yield
        events.append("out")

    load_causal_lm(folder, PLAIN, context=context)
    load_value_model(folder, PLAIN, context=context)
    assert events == ["in", "out"] * 2


def test_gradient_checkpointing_follows_the_flag(folder):
    assert not load_causal_lm(folder, PLAIN).is_gradient_checkpointing
    assert load_causal_lm(folder, ModelConfig(gradient_checkpointing=True)).is_gradient_checkpointing


def test_nothing_is_printed_while_loading(folder, capfd):
    load_value_model(folder, PLAIN)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "score" not in captured.err


def test_importing_the_package_does_not_import_torch():
    code = "import sys, openrlhf.models; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_public_names_are_found_and_others_are_not():
    import openrlhf.models

    assert openrlhf.models.Actor.__module__ == "openrlhf.models.actor"
    assert openrlhf.models.get_llm_for_sequence_regression.__module__ == "openrlhf.models.value_head"
    with pytest.raises(AttributeError):
        openrlhf.models.nothing  # noqa: B018


def test_only_the_index_that_is_read_needs_its_files(tmp_path):
    path = str(tiny_folder(tmp_path))
    other = Path(path, "consolidated.safetensors.index.json")
    other.write_text(json.dumps({"weight_map": {"a": "consolidated-1.safetensors"}}))
    assert check_path(path, trust_remote_code=False, flag="--pretrain")
    stale = Path(path, "model.safetensors.index.json")
    stale.write_text(other.read_text())
    assert check_path(path, trust_remote_code=False, flag="--pretrain")
    Path(path, "model.safetensors").rename(Path(path, "model-1.safetensors"))
    with pytest.raises(DataError, match="has no consolidated-1.safetensors"):
        check_path(path, trust_remote_code=False, flag="--pretrain")


@pytest.mark.parametrize("text", ["[]", "null", "7"])
def test_a_config_that_is_no_object_is_named(tmp_path, text):
    path = str(tiny_folder(tmp_path))
    Path(path, "config.json").write_text(text)
    with pytest.raises(DataError, match="config.json: holds no JSON object"):
        check_path(path, trust_remote_code=False, flag="--pretrain")
