"""LoRA and QLoRA on tiny models: what is trained, what it computes, what is written, and plain peft reading it."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from openrlhf.config.groups import LoRAConfig, ModelConfig
from openrlhf.errors import DataError, UsageError
from openrlhf.models import adapters
from openrlhf.models.actor import Actor
from openrlhf.models.backbone import enable_gradient_checkpointing
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel, get_llm_for_sequence_regression
from openrlhf.strategy.export import export_model
from tests.helpers import tiny_causal_lm, tiny_folder, tiny_tokenizer
from tests.strategy.programs import strategy_of

LORA = LoRAConfig(lora_rank=4, lora_alpha=8)
QLORA = replace(LORA, load_in_4bit=True)
TOKENS = torch.arange(33).view(3, 11) * 7 % 300 + 3
MASK = torch.arange(11) < torch.tensor([11, 6, 2])[:, None]
DTYPES = [False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model"), hidden=64)


def moved(model, scale=0.3):
    """Make the adapters, and the head where there is one, far from nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def policy(folder, lora=LORA, bf16=False, **options):
    return Actor(load_causal_lm(folder, ModelConfig(bf16=bf16, **options), lora=lora))


def critic(folder, lora=LORA, bf16=False):
    return ValueModel(load_value_model(folder, ModelConfig(bf16=bf16), lora=lora, pad_token_id=0))


@pytest.mark.parametrize("bf16", DTYPES)
@pytest.mark.parametrize("lora", [LORA, QLORA], ids=["lora", "qlora"])
def test_fresh_adapters_change_nothing_and_are_all_that_is_trained(folder, lora, bf16):
    adapted = policy(folder, lora, bf16)
    base = policy(folder, replace(lora, lora_rank=0), bf16)
    torch.testing.assert_close(
        adapted(TOKENS, MASK).log_probs, base(TOKENS, MASK).log_probs, atol=1e-6, rtol=1e-6
    )  # fmt: skip
    assert adapted.packed and adapted.has_adapter and not base.has_adapter
    trained = adapters.trained_names(adapted.model)
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)


@pytest.mark.parametrize("four_bits", [False, True])
def test_the_public_names_take_the_arguments_of_adapters(folder, four_bits):
    own = {"lora_rank": 2, "lora_alpha": 6, "lora_dropout": 0.25, "target_modules": ["q_proj"]}
    models = [
        Actor(folder, False, False, four_bits, *own.values()),
        get_llm_for_sequence_regression(
            folder, "reward", bf16=False, load_in_4bit=four_bits, init_value_head=True, **own
        ),
    ]
    for model, head in zip(models, (set(), {"score.weight"}), strict=True):
        settings = model.model.peft_config[adapters.ADAPTER]
        assert (settings.r, settings.lora_alpha, settings.lora_dropout) == (2, 6, 0.25)
        trained = adapters.trained_names(model.model)
        assert head < trained and all("q_proj.lora_" in name for name in trained - head)
        assert any(hasattr(weight, "quant_state") for weight in model.model.parameters()) == four_bits
    everything = Actor(folder, bf16=False, lora_rank=2, target_modules="all-linear")
    assert adapters.trained_names(everything.model) == adapters.trained_names(
        Actor(folder, bf16=False, lora_rank=2).model
    )
    assert not Actor(folder, bf16=False).has_adapter


@pytest.mark.parametrize("lora", [LORA, QLORA], ids=["lora", "qlora"])
def test_without_its_adapter_the_policy_is_its_base_also_between_a_forward_and_its_backward(folder, lora):
    adapted = moved(policy(folder, lora)).train()
    base = policy(folder, replace(lora, lora_rank=0))
    expected = base(TOKENS, MASK).log_probs
    loss = adapted(TOKENS, MASK).log_probs.sum()
    with torch.no_grad(), adapted.without_adapter():
        reference = adapted(TOKENS, MASK).log_probs
    assert torch.equal(reference, expected)
    assert (adapted(TOKENS, MASK).log_probs - expected).abs().max() > 0.1
    loss.backward()
    inside = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    other = moved(policy(folder, lora)).train()
    other(TOKENS, MASK).log_probs.sum().backward()
    assert len(inside) == 28
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(inside[name], parameter.grad), name


def test_a_model_without_adapters_cannot_leave_them_out(folder):
    with pytest.raises(UsageError, match="--lora_rank"), policy(folder, None).without_adapter():
        pass


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_pass_recomputed_layers_below_frozen_weights(folder, reentrant):
    plain, recomputed = (moved(policy(folder)).train() for _ in range(2))
    enable_gradient_checkpointing(recomputed, reentrant)
    for model in (plain, recomputed):
        model(TOKENS, MASK).log_probs.sum().backward()
    for (name, one), other in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if one.requires_grad:
            assert one.grad.abs().sum() > 0, name
            torch.testing.assert_close(other.grad, one.grad, msg=name)


def test_a_lora_gradient_is_that_of_the_formula(folder):
    adapted = moved(policy(folder)).train()
    layer = adapted.model.model.layers[0].mlp.up_proj
    adapted(TOKENS, MASK).log_probs.sum().backward()
    plain = policy(folder, None)
    state = {weight.name: weight.merged() for weight in adapters.base_weights(adapted.model)}
    plain.model.load_state_dict(state, strict=False)
    plain(TOKENS, MASK).log_probs.sum().backward()
    whole = plain.model.model.layers[0].mlp.up_proj.weight.grad
    scale = LORA.lora_alpha / LORA.lora_rank
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    torch.testing.assert_close(a.grad, scale * b.detach().T @ whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(b.grad, scale * whole @ a.detach().T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [LORA, QLORA], ids=["lora", "qlora"])
def test_packed_and_padded_batches_give_adapters_one_gradient(folder, lora):
    packed, padded = (moved(policy(folder, lora)).train() for _ in range(2))
    packed.verify()
    padded.verified = True
    for model in (packed, padded):
        model(TOKENS, MASK).log_probs.sum().backward()
    assert packed.packed and not padded.packed
    for (name, one), other in zip(packed.named_parameters(), padded.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_adapters_are_the_same_for_one_seed_and_leave_the_random_state_alone(folder):
    before = torch.get_rng_state()
    first, same, other = (
        load_causal_lm(folder, ModelConfig(), lora=LORA, seed=seed).state_dict() for seed in (1, 1, 2)
    )
    name = "model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(first[name], same[name]) and not torch.equal(first[name], other[name])
    assert torch.equal(torch.get_rng_state(), before)


def test_only_the_named_layers_get_adapters(folder):
    trained = adapters.trained_names(policy(folder, replace(LORA, target_modules=("q_proj", "mlp.down_proj"))).model)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained} == {"q_proj", "down_proj"}


@pytest.mark.parametrize("names", [("q_prj",), ("q_proj", "embed_tokens"), ("lm_head",), ("score",)])
def test_a_target_that_names_no_layer_is_an_error_that_lists_what_there_is(folder, names):
    with pytest.raises(UsageError, match=rf"--target_modules {names[-1]}: .*it has down_proj, gate_proj, k_proj"):
        load_value_model(folder, ModelConfig(), lora=replace(LORA, target_modules=names))


def test_an_output_head_of_its_own_can_have_an_adapter(tmp_path):
    base = tiny_folder(tmp_path, tied=False)
    actor = moved(policy(base, replace(LORA, target_modules=("lm_head", "q_proj"))), 0.1)
    log_probs = actor(TOKENS, MASK).log_probs
    plain = policy(base, None)
    state = {weight.name: weight.merged() for weight in adapters.base_weights(actor.model)}
    assert not plain.model.load_state_dict(state).missing_keys
    torch.testing.assert_close(plain(TOKENS, MASK).log_probs, log_probs, atol=1e-5, rtol=1e-5)
    assert not actor.head_is_last and plain.head_is_last


@pytest.mark.parametrize("bf16", DTYPES)
def test_merged_weights_have_the_names_of_the_base_and_compute_what_the_adapter_does(folder, bf16):
    adapted = moved(policy(folder, bf16=bf16), 0.1)
    merged = {weight.name: weight.merged() for weight in adapters.base_weights(adapted.model)}
    plain = policy(folder, None, bf16)
    names = set(plain.model.state_dict()) - {"lm_head.weight"}
    assert set(merged) == names and {tensor.dtype for tensor in merged.values()} == {plain.model.dtype}
    plain.model.load_state_dict(merged, strict=False)
    tolerance = 0.1 if bf16 else 1e-5
    torch.testing.assert_close(
        plain(TOKENS, MASK).log_probs, adapted(TOKENS, MASK).log_probs, atol=tolerance, rtol=tolerance
    )


def test_four_bits_hold_what_nf4_can(folder):
    adapted = policy(folder, QLORA)
    merged = {weight.name: weight.merged() for weight in adapters.base_weights(adapted.model)}
    plain = load_causal_lm(folder, ModelConfig()).state_dict()
    assert set(merged) == set(plain) - {"lm_head.weight"}
    name = "model.layers.0.mlp.up_proj.weight"
    error = (merged[name] - plain[name]).abs()
    # The widest gap between two of NF4's levels is 0.304 of the largest weight in a block of 64.
    blocks = plain[name].reshape(-1, 64).abs().amax(dim=1).repeat_interleave(64).view_as(error)
    assert error.max() > 0 and bool((error <= 0.16 * blocks).all())
    assert torch.equal(merged["model.norm.weight"], plain["model.norm.weight"])
    total, trained = adapters.parameter_counts(adapted)
    assert total - trained == sum(p.numel() for p in load_causal_lm(folder, ModelConfig()).parameters())


def test_four_bit_weights_give_the_same_numbers_in_training_and_in_evaluation(folder):
    adapted = moved(policy(folder, QLORA, bf16=True))
    with torch.no_grad():
        evaluated = adapted.eval()(TOKENS, MASK).log_probs
        assert torch.equal(adapted.train()(TOKENS, MASK).log_probs, evaluated)


@pytest.mark.parametrize("bf16", DTYPES)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_deepspeed_leaves_four_bit_weights_alone_and_trains_the_adapters(folder, stage, bf16):
    from openrlhf.config.groups import OptimConfig

    strategy = strategy_of(zero_stage=stage, bf16=bf16)
    actor = moved(policy(folder, QLORA, bf16), 0.05)
    kept = {name: p.detach().clone() for name, p in actor.named_parameters() if not p.requires_grad}
    engine = strategy.prepare_train(actor, OptimConfig(learning_rate=1e-2, lr_scheduler="constant"), 5)
    engine.train()
    losses = []
    for _ in range(5):
        loss = -engine(TOKENS, MASK).log_probs.sum()
        engine.backward(loss, 16)
        engine.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    dtypes = {p.dtype for p in actor.parameters() if p.requires_grad}
    assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
    for name, p in actor.named_parameters():
        if not p.requires_grad:
            assert torch.equal(p, kept[name]), name


@pytest.mark.parametrize("lora", [LORA, QLORA], ids=["lora", "qlora"])
def test_an_exported_adapter_loads_in_plain_peft_onto_the_base(folder, tmp_path, lora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    actor = moved(policy(folder, lora))
    export_model(actor, strategy_of(zero_stage=0), tmp_path / "out", tiny_tokenizer(tmp_path / "tokenizer"))
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not list((tmp_path / "out").glob("model*.safetensors"))
    base = load_causal_lm(folder, ModelConfig(), lora=replace(lora, lora_rank=0))
    theirs = PeftModel.from_pretrained(base, tmp_path / "out")
    with torch.no_grad():
        expected = actor(TOKENS, MASK).log_probs[0]
        logits = theirs(TOKENS[:1]).logits[0].log_softmax(-1)
    torch.testing.assert_close(logits[:-1].gather(1, TOKENS[0, 1:, None])[:, 0], expected, atol=1e-5, rtol=1e-5)
    if lora is LORA:
        automatic = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        torch.testing.assert_close(automatic(TOKENS[:1]).logits, theirs(TOKENS[:1]).logits, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == folder
    assert settings["target_modules"] == sorted(settings["target_modules"])
    assert settings["target_modules"][:2] == ["down_proj", "gate_proj"] and len(settings["target_modules"]) == 7


@pytest.mark.parametrize("lora", [LORA, QLORA], ids=["lora", "qlora"])
def test_the_head_of_a_reward_model_is_trained_and_comes_with_its_adapter(folder, tmp_path, lora):
    from peft import PeftModel

    model = critic(folder, lora)
    assert "score.weight" in adapters.trained_names(model.model)
    assert type(model.head) is torch.nn.Linear
    moved(model)
    model.config.mean, model.config.std = 0.25, 2.0
    export_model(model, strategy_of(zero_stage=0), tmp_path)
    base = load_value_model(folder, ModelConfig(), lora=replace(lora, lora_rank=0), pad_token_id=0, seed=7)
    assert not torch.equal(base.score.weight, model.head.weight)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        scores = theirs(input_ids=TOKENS * MASK, attention_mask=MASK.long()).logits[:, 0]
        torch.testing.assert_close(scores, model.reward(TOKENS, MASK), atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["mean"], config["std"], config["value_head_prefix"]) == (0.25, 2.0, "score")
    assert "quantization_config" not in config
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_an_adapter_takes_the_place_of_a_whole_model_and_the_other_way_round(folder, tmp_path):
    strategy, whole = strategy_of(zero_stage=0), tiny_causal_lm(hidden=64)
    for source, there, gone in [(whole, "model", "adapter_model"), (policy(folder), "adapter_model", "model")] * 2:
        export_model(source, strategy, tmp_path)
        assert (tmp_path / f"{there}.safetensors").exists() and not (tmp_path / f"{gone}.safetensors").exists()
        assert (tmp_path / "adapter_config.json").exists() == (there == "adapter_model")


def test_an_adapter_folder_is_no_model_to_start_from(folder, tmp_path):
    export_model(policy(folder), strategy_of(zero_stage=0), tmp_path)
    with pytest.raises(DataError, match="holds an adapter.*lora_combiner"):
        load_causal_lm(str(tmp_path), ModelConfig())


def test_a_policy_with_adapters_generates(folder):
    actor = moved(policy(folder, QLORA))
    output = actor.generate(input_ids=TOKENS[:, :4], max_new_tokens=3, do_sample=False)
    assert output.shape == (3, 7)
