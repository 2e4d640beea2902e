"""An adapter merged into its base: what users load without peft computes what was trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from openrlhf.cli.common import run
from openrlhf.cli.lora_combiner import combine, plan
from openrlhf.config.combiner import CombinerConfig
from openrlhf.config.groups import LoRAConfig, ModelConfig
from openrlhf.errors import DataError
from openrlhf.models.loading import load_value_model
from openrlhf.models.merging import merge_adapter
from openrlhf.strategy.export import export_model, write_model
from tests.helpers import tiny_folder, tiny_tokenizer
from tests.models.test_adapters import LORA, MASK, TOKENS, critic, moved, policy
from tests.strategy.programs import strategy_of


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"), hidden=64, tied=request.param)


def exported(model, folder, tokenizer=True):
    export_model(model, strategy_of(zero_stage=0), folder, tiny_tokenizer(folder.parent / "t") if tokenizer else None)
    return str(folder)


def test_a_merged_policy_loads_anywhere_and_computes_what_its_adapter_did(base, tmp_path):
    actor = moved(policy(base), 0.1)
    model, tokenizer = merge_adapter(base, exported(actor, tmp_path / "adapter"))
    write_model(model, tmp_path / "merged", tokenizer)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    with torch.no_grad():
        logits = theirs(TOKENS).logits
        expected = actor.model(TOKENS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "<|pad|>"


def test_a_merged_reward_model_scores_as_its_adapter_did(base, tmp_path):
    model = moved(critic(base), 0.1)
    model.config.mean, model.config.std = 0.5, 2.0
    merged, tokenizer = merge_adapter(base, exported(model, tmp_path / "adapter"), is_rm=True)
    write_model(merged, tmp_path / "merged", tokenizer)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        scores = theirs(TOKENS * MASK, attention_mask=MASK.long()).logits[:, 0]
        torch.testing.assert_close(scores, model.reward(TOKENS, MASK), atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.01
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["mean"], config["std"], config["value_head_prefix"]) == (0.5, 2.0, "score")
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    ours = load_value_model(str(tmp_path / "merged"), ModelConfig(), init_value_head=False, normalize_reward=True)
    assert torch.equal(ours.score.weight, theirs.score.weight)


def test_weights_have_the_type_of_the_base_or_bf16(base, tmp_path):
    adapter = exported(moved(policy(base)), tmp_path / "adapter")
    assert merge_adapter(base, adapter)[0].dtype == torch.float32
    assert merge_adapter(base, adapter, bf16=True)[0].dtype == torch.bfloat16
    half = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    tiny_tokenizer(tmp_path / "half")
    assert merge_adapter(str(tmp_path / "half"), adapter)[0].dtype == torch.bfloat16


def test_without_a_tokenizer_of_its_own_the_merged_model_has_that_of_the_base(base, tmp_path):
    adapter = exported(policy(base), tmp_path / "adapter", tokenizer=False)
    assert merge_adapter(base, adapter)[1].name_or_path == base


def wrong(what, base, folder):
    """Return the arguments of a merge that cannot be done."""
    if what == "kind":
        return (base, exported(critic(base), folder / "a")), {}
    if what == "other kind":
        return (base, exported(policy(base), folder / "a")), {"is_rm": True}
    if what == "nothing":
        return (base, base), {}
    if what == "base":
        return (tiny_folder(folder / "wide", hidden=32), exported(policy(base), folder / "a")), {}
    if what == "layers":
        return (tiny_folder(folder / "deep", hidden=64, layers=3), exported(policy(base), folder / "a")), {}
    adapter = exported(policy(base), folder / "a")
    (folder / "a" / "adapter_model.safetensors").rename(folder / "a" / "adapter_model.bin")
    return (base, adapter), {}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("kind", "adapter of a reward model or critic; add --is_rm"),
        ("other kind", "adapter of a language model; leave out --is_rm"),
        ("nothing", "there is no adapter_config.json"),
        ("base", "does not fit the model of --model_path"),
        ("layers", "does not fit the model of --model_path: .*layers.2"),
        ("pickled", "pickled ones, which can run code"),
    ],
)
def test_what_does_not_belong_together_is_told(what, says, base, tmp_path):
    arguments, options = wrong(what, base, tmp_path)
    with pytest.raises(DataError, match=rf"--lora_path .*{says}"):
        merge_adapter(*arguments, **options)


def test_an_adapter_without_a_head_needs_a_base_with_one(base, tmp_path):
    adapter = exported(policy(base, replace(LORA, target_modules=("q_proj",))), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "task_type": None}))
    with pytest.raises(DataError, match="--model_path .*no value head"):
        merge_adapter(base, adapter, is_rm=True)


@pytest.mark.parametrize("words", [[], ["--model_path", "a", "--lora_path", "b", "--output_path", "a"]])
def test_wrong_flags_are_told_together(words, capsys):
    with pytest.raises(SystemExit) as ended:
        run(CombinerConfig, combine, "lora_combiner", plan, argv=words)
    expected = "--output_path a would overwrite what is merged" if words else "--lora_path is missing"
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_the_command_writes_a_model_and_says_where(tmp_path, capsys):
    base = tiny_folder(tmp_path / "base")
    adapter = exported(policy(base, LoRAConfig(lora_rank=2)), tmp_path / "adapter")
    words = ["--model_path", base, "--lora_path", adapter, "--output_path", str(tmp_path / "merged")]
    run(CombinerConfig, combine, "lora_combiner", plan, argv=[*words, "--dry_run"])
    assert not (tmp_path / "merged").exists()
    run(CombinerConfig, combine, "lora_combiner", plan, argv=words)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"merge the adapter {adapter} into the language model {base}")
    assert said[-1] == f"done: merged model in {tmp_path / 'merged'}"
    assert (tmp_path / "merged" / "model.safetensors").is_file()
