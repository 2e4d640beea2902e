"""Mixtures of experts: the load-balancing loss of every kind of model, against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch

from openrlhf.config.groups import BatchConfig, LoRAConfig, ModelConfig, OptimConfig
from openrlhf.errors import UsageError
from openrlhf.models.actor import Actor
from openrlhf.models.adapters import trained_names
from openrlhf.models.backbone import enable_gradient_checkpointing
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel
from openrlhf.trainer.sft import SFTTrainer
from tests.helpers import tiny_causal_lm, tiny_folder
from tests.strategy.programs import BETAS, first_gradients, strategy_of
from tests.trainer.gradient_programs import sequences, sft_rows

MIXTURES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        **{"shared_expert_intermediate_size": 32, "mlp_only_layers": [0], "layers": 3},
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "head_dim": 16},
}
TOKENS = torch.arange(33).view(3, 11) * 7 % 300 + 3
MASK = torch.arange(11) < torch.tensor([11, 6, 2])[:, None]
COEF = 0.25
KINDS = pytest.mark.parametrize("arch", MIXTURES)


def of_transformers(model, tokens=TOKENS, mask=MASK):
    """Return the loss that transformers computes on a padded batch, without any of our code."""
    return model(tokens * mask, attention_mask=mask.long(), output_router_logits=True, use_cache=False).aux_loss


def router_gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if name.endswith("mlp.gate.weight")}


@KINDS
@pytest.mark.parametrize("packed", [True, False])
def test_a_policy_has_the_loss_of_transformers_over_the_real_tokens(arch, packed):
    model = tiny_causal_lm(None, arch, **MIXTURES[arch])
    twin = copy.deepcopy(model)
    actor = Actor(model, aux_loss_coef=COEF)
    actor.verify()
    assert actor.packed
    if not packed:
        actor.packed = False
        model.set_attn_implementation("sdpa")
    aux_loss = actor(TOKENS, MASK).aux_loss
    expected = COEF * of_transformers(twin)
    torch.testing.assert_close(aux_loss, expected, atol=1e-6, rtol=1e-5)
    aux_loss.backward()
    expected.backward()
    ours, theirs = router_gradients(model), router_gradients(twin)
    assert len(ours) == 2 and ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=1e-4, msg=name)


@KINDS
def test_recomputed_layers_keep_its_gradient(arch):
    plain, recomputed = (Actor(tiny_causal_lm(None, arch, **MIXTURES[arch]), aux_loss_coef=COEF) for _ in range(2))
    enable_gradient_checkpointing(recomputed)
    for actor in (plain, recomputed):
        actor.train()
        actor(TOKENS, MASK).aux_loss.backward()
    for one, other in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(other.grad, one.grad)


@KINDS
def test_a_value_model_has_the_loss_of_the_language_model_it_came_from(arch, tmp_path):
    folder = tiny_folder(tmp_path, arch, **MIXTURES[arch])
    critic = ValueModel(load_value_model(folder, ModelConfig(), pad_token_id=0), aux_loss_coef=COEF)
    values, aux_loss = critic(TOKENS, MASK, with_aux_loss=True)
    expected = COEF * of_transformers(load_causal_lm(folder, ModelConfig()))
    torch.testing.assert_close(aux_loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(values, critic(TOKENS, MASK))
    rewards, of_rewards = critic(TOKENS, MASK, read="last", with_aux_loss=True)
    assert rewards.shape == (3,)
    torch.testing.assert_close(of_rewards, aux_loss)


def test_without_gradients_or_without_a_coefficient_nothing_is_computed():
    model = tiny_causal_lm(None, "mixtral", **MIXTURES["mixtral"])
    with torch.no_grad():
        assert Actor(model, aux_loss_coef=COEF)(TOKENS, MASK).aux_loss == 0
    aux_loss = Actor(model)(TOKENS, MASK).aux_loss
    assert aux_loss == 0 and not aux_loss.requires_grad


@pytest.mark.parametrize("make", [Actor, ValueModel])
def test_a_model_without_experts_is_told_from_a_mixture(make, tmp_path):
    folder = tiny_folder(tmp_path)
    load = load_causal_lm if make is Actor else load_value_model
    with pytest.raises(UsageError, match=r"--aux_loss_coef .*qwen2 \(Qwen2For.*leave it at 0"):
        make(load(folder, ModelConfig()), aux_loss_coef=COEF)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_trained_step_applies_the_gradient_of_both_losses(stage, tmp_path):
    folder = tiny_folder(tmp_path, "mixtral", **MIXTURES["mixtral"])
    tokens, real, counted = sequences(1)
    twin = load_causal_lm(folder, ModelConfig())
    logits = twin(tokens, attention_mask=real.long(), use_cache=False).logits[:, :-1].log_softmax(-1)
    loss = -logits.gather(2, tokens[:, 1:, None])[..., 0][counted].mean()
    (loss + COEF * of_transformers(twin, tokens, real)).backward()
    strategy = strategy_of(zero_stage=stage)
    actor = Actor(load_causal_lm(folder, ModelConfig()), aux_loss_coef=COEF)
    config = OptimConfig(learning_rate=1e-3, lr_scheduler="constant", adam_betas=BETAS)
    engine = strategy.prepare_train(actor, config, 1)
    trainer = SFTTrainer(engine, strategy, sft_rows(), (), BatchConfig(micro_train_batch_size=8, train_batch_size=8))
    seen = []
    trainer.callbacks.on_step_end = lambda trainer, metrics: seen.append(metrics)
    trainer.fit()
    expected = {f"model.{name}": p.grad for name, p in twin.named_parameters()}
    for name, gradient in first_gradients(engine).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-3, msg=name)
    assert seen[0]["aux_loss"] > 0


@KINDS
def test_all_linear_leaves_router_and_stacked_experts_as_they_are(arch, tmp_path):
    folder = tiny_folder(tmp_path, arch, **MIXTURES[arch])
    actor = Actor(load_causal_lm(folder, ModelConfig(), lora=LoRAConfig(lora_rank=2)), aux_loss_coef=COEF)
    trained = trained_names(actor.model)
    assert trained and not [name for name in trained if ".experts." in name or ".mlp.gate." in name]
    actor.train()(TOKENS, MASK).aux_loss.backward()
    b = actor.model.model.layers[0].self_attn.v_proj.lora_B.default.weight
    assert b.grad.abs().max() > 0, "the router's choices depend on the adapters below it"
