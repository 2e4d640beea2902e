import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from openrlhf.config.groups import ModelConfig
from openrlhf.errors import DataError, UsageError
from openrlhf.models.loading import load_value_model
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.models.value_head import ValueModel, get_llm_for_sequence_regression
from tests.helpers import tiny_folder

PLAIN = ModelConfig()
TEXTS = ["How many clips did Natalia sell?<|im_end|>", "It is 42.<|im_end|>", "a<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def reward_folder(folder, path, tokenizer, **config):
    """Save a reward model with a head that is far from zero and return its folder."""
    model = load_value_model(folder, PLAIN, pad_token_id=tokenizer.pad_token_id)
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    for name, value in config.items():
        setattr(model.config, name, value)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def encode(tokenizer, side):
    tokenizer.padding_side = side
    encoded = tokenizer(TEXTS, return_tensors="pt", padding=True, add_special_tokens=False)
    tokenizer.padding_side = "right"
    return encoded.input_ids, encoded.attention_mask


@pytest.mark.parametrize("arch", ["qwen2", "llama", "mistral"])
def test_a_saved_reward_model_scores_the_same_however_it_is_read(tmp_path, arch):
    from transformers import AutoModelForSequenceClassification

    base = tiny_folder(tmp_path / "base", arch)
    tokenizer = load_tokenizer(base)
    path = reward_folder(base, tmp_path / "rm", tokenizer)
    ours = ValueModel(load_value_model(path, PLAIN, init_value_head=False))
    theirs = AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        scores = ours.reward(*encode(tokenizer, "right"))
        assert scores.std() > 0.1
        for side in ("left", "right"):
            input_ids, mask = encode(tokenizer, side)
            logits = theirs(input_ids=input_ids, attention_mask=mask).logits.squeeze(-1)
            torch.testing.assert_close(logits, scores, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.reward(input_ids, mask), scores, atol=1e-5, rtol=1e-5)
        input_ids, mask = encode(tokenizer, "left")
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        hidden = theirs.base_model(input_ids, attention_mask=mask, position_ids=positions).last_hidden_state
        snippet = theirs.score(hidden).squeeze(-1)[:, -1]
    torch.testing.assert_close(snippet, scores, atol=1e-5, rtol=1e-5)
    assert ours.packed


def test_the_saved_config_describes_one_label(folder, tokenizer, tmp_path):
    path = reward_folder(folder, tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(tmp_path / "model.safetensors")
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert len(config["id2label"]) == 1
    assert config["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert config.get("problem_type") is None
    assert config["value_head_prefix"] == "score"
    assert weights["score.weight"].shape == (1, 32)
    assert path


def test_a_fresh_head_is_small_and_seeded(folder):
    first = load_value_model(folder, PLAIN, seed=7).score.weight
    assert torch.equal(first, load_value_model(folder, PLAIN, seed=7).score.weight)
    assert not torch.equal(first, load_value_model(folder, PLAIN, seed=8).score.weight)
    assert first.std().item() == pytest.approx(1 / 33, rel=0.4)


def test_an_existing_head_is_kept_unless_a_fresh_one_is_asked_for(folder, tokenizer, tmp_path):
    path = reward_folder(folder, tmp_path, tokenizer)
    saved = load_file(tmp_path / "model.safetensors")["score.weight"]
    assert torch.equal(load_value_model(path, PLAIN).score.weight, saved)
    assert not torch.equal(load_value_model(path, PLAIN, init_value_head=True).score.weight, saved)


def test_a_reward_model_without_a_head_is_a_data_error(folder):
    with pytest.raises(DataError, match=r"--reward_pretrain .*no value head `score`"):
        load_value_model(folder, PLAIN, init_value_head=False, flag="--reward_pretrain")


def test_a_classifier_with_two_labels_is_a_data_error(folder, tokenizer, tmp_path):
    path = reward_folder(folder, tmp_path, tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    weights["score.weight"] = torch.zeros(2, 32)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="shapes"):
        load_value_model(path, PLAIN)


@pytest.mark.parametrize("told_by", ["config", "argument"])
def test_a_head_of_another_name_is_found(folder, tokenizer, tmp_path, told_by):
    path = reward_folder(folder, tmp_path, tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    saved = weights.pop("score.weight")
    save_file({**weights, "value_head.weight": saved}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["value_head_prefix"] = "value_head"
    if told_by == "argument":
        del config["value_head_prefix"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    prefix = "value_head" if told_by == "argument" else "score"
    model = load_value_model(path, PLAIN, init_value_head=False, value_head_prefix=prefix)
    assert torch.equal(model.score.weight, saved)
    value_model = ValueModel(model)
    assert value_model.export_name("score.weight") == "value_head.weight"
    assert value_model.export_name("model.norm.weight") == "model.norm.weight"


def test_rewards_are_normalised_in_evaluation_mode_only_and_values_always(folder, tokenizer, tmp_path):
    path = reward_folder(folder, tmp_path, tokenizer, mean=0.5, std=2.0)
    plain = ValueModel(load_value_model(path, PLAIN))
    scaled = ValueModel(load_value_model(path, PLAIN, normalize_reward=True))
    inputs = encode(tokenizer, "right")
    raw, values = plain.reward(*inputs), plain.values(*inputs)
    assert values.shape == (3, inputs[0].shape[1] - 1)
    torch.testing.assert_close(scaled.reward(*inputs), (raw - 0.5) / 2.0)
    real = inputs[1][:, :-1].bool()
    torch.testing.assert_close(scaled.values(*inputs)[real], ((values - 0.5) / 2.0)[real])
    scaled.train()
    torch.testing.assert_close(scaled.reward(*inputs), raw)
    torch.testing.assert_close(scaled.values(*inputs)[real], ((values - 0.5) / 2.0)[real])


def test_normalising_without_mean_and_std_is_a_data_error(folder, tokenizer, tmp_path):
    path = reward_folder(folder, tmp_path, tokenizer)
    with pytest.raises(DataError, match="--normalize_reward"):
        load_value_model(path, PLAIN, normalize_reward=True)


def test_the_reward_is_the_value_of_the_last_real_token(folder, tokenizer):
    model = ValueModel(load_value_model(folder, PLAIN))
    input_ids, mask = encode(tokenizer, "right")
    values = model(input_ids, mask, read="each")
    last = mask.sum(1) - 1
    torch.testing.assert_close(model(input_ids, mask, read="last"), values.gather(1, last[:, None]).squeeze(1))
    assert not values[~mask.bool()].any()
    assert values.dtype == torch.float32


def test_packed_and_padded_values_and_gradients_agree(folder, tokenizer):
    inputs = encode(tokenizer, "right")
    packed, padded = ValueModel(load_value_model(folder, PLAIN)), ValueModel(load_value_model(folder, PLAIN))
    packed.verify()
    padded.verified = True
    for model in (packed, padded):
        model(*inputs).square().sum().backward()
    assert packed.packed
    assert not padded.packed
    torch.testing.assert_close(packed(*inputs), padded(*inputs), atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(packed.parameters(), padded.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_the_public_function_gives_a_reward_model_or_a_critic(folder, tokenizer):
    inputs = encode(tokenizer, "right")
    reward = get_llm_for_sequence_regression(folder, "reward", bf16=False, init_value_head=True)
    critic = get_llm_for_sequence_regression(folder, "critic", bf16=True, init_value_head=True)
    assert reward(*inputs).shape == (3,)
    assert critic(*inputs).shape == inputs[0].shape
    assert critic.model.dtype == torch.bfloat16
    assert critic(*inputs).dtype == torch.float32
    with pytest.raises(UsageError, match="model_type"):
        get_llm_for_sequence_regression(folder, "policy")


def test_reading_something_else_is_refused(folder, tokenizer):
    model = ValueModel(load_value_model(folder, PLAIN))
    with pytest.raises(ValueError, match="'last' or 'each'"):
        model(*encode(tokenizer, "right"), read="all")


def test_the_head_computes_in_float32_under_bf16_and_learns(folder, tokenizer):
    model = ValueModel(load_value_model(folder, ModelConfig(bf16=True), init_value_head=True))
    inputs = encode(tokenizer, "right")
    seen = []
    model.head.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    values = model(*inputs)
    hidden, output = seen[0]
    assert hidden.dtype == model.head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(output, hidden.float() @ model.head.weight.float().T, atol=1e-6, rtol=1e-6)
    values.sum().backward()
    assert model.head.weight.grad.dtype == torch.bfloat16 and model.head.weight.grad.abs().sum() > 0
