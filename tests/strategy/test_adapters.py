"""Adapters on several ranks: they train, leave out, merge and export as on one."""

from __future__ import annotations

import pytest
import torch

from openrlhf.config.groups import LoRAConfig, ModelConfig, OptimConfig
from openrlhf.errors import DataError
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm, load_value_model
from openrlhf.models.value_head import ValueModel
from openrlhf.strategy import universal
from tests.helpers import tiny_folder
from tests.strategy.adapter_programs import MASK, TOKENS, train_adapter
from tests.strategy.programs import strategy_of
from tests.strategy.ranks import run_ranks

PROGRAM = "tests.strategy.adapter_programs:train_adapter"


def loaded(folder: str, adapter: str, value: bool) -> torch.Tensor:
    """Return what plain peft makes of the base and the exported adapter."""
    from peft import PeftModel

    if value:
        base = load_value_model(folder, ModelConfig(), pad_token_id=0, seed=9)
        model = ValueModel(PeftModel.from_pretrained(base, adapter).merge_and_unload(), read="last").eval()
        with torch.no_grad():
            return model(TOKENS, MASK)
    base = load_causal_lm(folder, ModelConfig())
    with torch.no_grad():
        return Actor(PeftModel.from_pretrained(base, adapter).merge_and_unload())(TOKENS, MASK).log_probs


@pytest.mark.parametrize("value", [False, True], ids=["policy", "reward"])
def test_sharded_adapters_learn_and_export_as_whole_ones(tmp_path, value):
    folder = tiny_folder(tmp_path / "base")
    whole, sharded = (
        train_adapter(folder, str(tmp_path / str(stage)), stage, value, bf16=False, four_bits=False)
        for stage in (0, 3)
    )
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    torch.testing.assert_close(sharded["after"], whole["after"], atol=1e-3, rtol=1e-3)
    assert sharded["merged"] == pytest.approx(whole["merged"], abs=1e-2)
    torch.testing.assert_close(loaded(folder, str(tmp_path / "3"), value), sharded["after"], atol=1e-4, rtol=1e-4)
    if not value:
        torch.testing.assert_close(sharded["without"], whole["without"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sharded["again"], sharded["after"])


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stage", "value", "bf16", "four_bits"),
    [
        (2, False, False, False),
        (3, False, False, False),
        (3, True, False, False),
        (3, False, True, False),
        (2, True, False, True),
        (1, False, True, True),
    ],
)
def test_adapters_on_two_ranks_learn_as_on_one(tmp_path, stage, value, bf16, four_bits):
    folder = tiny_folder(tmp_path / "base", hidden=64)
    common = {"folder": folder, "value": value, "bf16": bf16, "four_bits": four_bits}
    first, second = run_ranks(PROGRAM, 2, out=str(tmp_path / "two"), stage=stage, **common)
    alone = run_ranks(PROGRAM, 1, out=str(tmp_path / "one"), stage=0, **common)[0]
    loose, close = (0.05, 0.2) if bf16 else (1e-4, 1e-3)
    assert first["losses"] == pytest.approx(alone["losses"], rel=loose)
    assert first["norms"] == pytest.approx(alone["norms"], rel=loose)
    torch.testing.assert_close(first["after"], alone["after"], atol=close, rtol=close)
    torch.testing.assert_close(second["after"], first["after"])
    assert first["merged"] == pytest.approx(alone["merged"], rel=1e-2 if bf16 else 1e-4) and second["merged"] == 0
    if not value:
        torch.testing.assert_close(first["again"], first["after"])
        base = Actor(load_causal_lm(folder, ModelConfig(bf16=bf16)))
        if not four_bits:
            with torch.no_grad():
                torch.testing.assert_close(first["without"], base(TOKENS, MASK).log_probs, atol=close, rtol=close)
    if not (bf16 or four_bits):
        torch.testing.assert_close(loaded(folder, str(tmp_path / "two"), value), first["after"], atol=1e-4, rtol=1e-4)


def trained_engine(folder: str, stage: int, steps: int):
    """Return an engine that trained adapters for so many steps."""
    strategy = strategy_of(zero_stage=stage)
    actor = Actor(load_causal_lm(folder, ModelConfig(), lora=LoRAConfig(lora_rank=4)))
    engine = strategy.prepare_train(actor, OptimConfig(learning_rate=2e-2, lr_scheduler="constant"), 10)
    for _ in range(steps):
        step(engine)
    return engine


def step(engine) -> float:
    engine.train()
    engine.backward(-engine(TOKENS, MASK).log_probs.sum(), 24)
    return engine.step().grad_norm


@pytest.mark.parametrize("stages", [(1, 2), (2, 3)], ids=str)
def test_a_checkpoint_of_adapters_goes_on_under_another_stage(tmp_path, stages):
    folder = tiny_folder(tmp_path / "base")
    before = trained_engine(folder, stages[0], 2)
    before.save(tmp_path / "saved")
    universal.convert(tmp_path / "saved", tmp_path / "converted")
    after = trained_engine(folder, stages[1], 0)
    after.load(tmp_path / "converted")
    assert step(after) == pytest.approx(step(before), rel=1e-5)
    assert step(after) == pytest.approx(step(before), rel=1e-5)


def test_a_checkpoint_holds_what_is_trained_and_no_other_fits(tmp_path):
    folder = tiny_folder(tmp_path / "base")
    engine = trained_engine(folder, 2, 1)
    engine.save(tmp_path / "saved")
    saved = torch.load(next((tmp_path / "saved").glob("mp_rank*")), weights_only=True)["module"]
    assert len(saved) == 28 and all(".lora_" in name for name in saved)
    fewer = LoRAConfig(lora_rank=4, target_modules=("q_proj",))
    strategy = strategy_of(zero_stage=2)
    actor = Actor(load_causal_lm(folder, ModelConfig(), lora=fewer))
    other = strategy.prepare_train(actor, OptimConfig(lr_scheduler="constant"), 10)
    with pytest.raises(DataError, match="does not hold the weights that this model trains"):
        other.load(tmp_path / "saved")
