import json
import socket
import time

import pytest
from safetensors.torch import load_file, save_file

from openrlhf.errors import DataError
from openrlhf.models.suitability import check_language_model, check_model, check_reward_model, weight_names
from tests.helpers import tiny_causal_lm
from tests.trainer.ppo.harness import tiny_reward_model


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm")
    tiny_causal_lm(path)
    return str(path)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return tiny_reward_model(tmp_path_factory.mktemp("rm"), mean=0.1, std=2.0)


def reward(path, prefix="score", normalize=False):
    check_reward_model(
        path, trust_remote_code=False, value_head_prefix=prefix, normalize_reward=normalize, flag="--reward_pretrain"
    )


def configure(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_each_kind_suits_its_role(language_model, reward_model):
    check_language_model(language_model, trust_remote_code=False)
    reward(reward_model, normalize=True)


def test_each_kind_is_refused_in_the_role_of_the_other(language_model, reward_model):
    with pytest.raises(DataError, match=r"--pretrain .*a reward model or critic \(Qwen2ForSequenceClassification"):
        check_language_model(reward_model, trust_remote_code=False)
    with pytest.raises(DataError, match="--reward_pretrain .*no value head `score`.*random"):
        reward(language_model)


def test_a_reward_model_may_be_trained_further(reward_model):
    assert check_model(reward_model, trust_remote_code=False)


@pytest.mark.parametrize("name", ["RewardModel", "CriticModel"])
def test_the_names_that_openrlhf_gave_its_models_are_known(name, tmp_path):
    tiny_causal_lm(tmp_path)
    configure(tmp_path, architectures=[name])
    with pytest.raises(DataError, match=f"a reward model or critic .{name} in config.json"):
        check_language_model(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize(("name", "tied"), [("Qwen2Model", True), ("GPT2LMHeadModel", False)])
def test_a_bare_model_with_tied_embeddings_and_one_with_a_head_suit(name, tied, tmp_path):
    tiny_causal_lm(tmp_path)
    configure(tmp_path, architectures=[name], tie_word_embeddings=tied)
    check_language_model(str(tmp_path), trust_remote_code=False)


def test_a_head_of_another_name_is_found_by_its_flag_or_by_the_config(tmp_path):
    path = tiny_reward_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="--value_head_prefix"):
        reward(path)
    reward(path, prefix="value_head")
    configure(tmp_path, value_head_prefix="value_head")
    reward(path)


def test_normalising_needs_mean_and_std(tmp_path):
    with pytest.raises(DataError, match="--normalize_reward needs `mean` and `std` in config.json"):
        reward(tiny_reward_model(tmp_path), normalize=True)


def test_a_model_that_transformers_does_not_know_is_named(tmp_path):
    tiny_causal_lm(tmp_path)
    configure(tmp_path, model_type="mine")
    with pytest.raises(DataError, match="does not know the model_type 'mine' of config.json"):
        check_model(str(tmp_path), trust_remote_code=False)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_damaged_weights_are_named(keep, tmp_path):
    tiny_causal_lm(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"model\.safetensors: damaged"):
        weight_names(tmp_path, "--pretrain")


@pytest.fixture
def closed_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_hub_that_does_not_answer_is_said_at_once(closed_port, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr("urllib.request.getproxies", dict)
    started = time.monotonic()
    with pytest.raises(
        DataError, match="--pretrain somebody/model: no such folder here, and the hub cannot be reached"
    ):
        check_model("somebody/model", trust_remote_code=False)
    assert time.monotonic() - started < 5


def test_a_hub_that_answers_is_left_to_its_client(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not check_model("somebody/model", trust_remote_code=False)
