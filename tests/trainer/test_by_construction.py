"""What all six supervised commands do because their loop, models and data do it: adapters, 4-bit weights, mixtures."""

from __future__ import annotations

import pytest
import torch

from openrlhf.cli import train_dpo, train_kd, train_kto, train_prm, train_rm, train_sft
from openrlhf.config.arguments import parse
from openrlhf.models.adapters import trained_names
from openrlhf.strategy.export import export_model
from tests.cli.supervised import answers, demonstrations, pairs, steps, weights_of, write_rows
from tests.helpers import tiny_folder
from tests.trainer.language import Recorder, solo

SHAPE = "--eval_split train --max_len 64 --learning_rate 1e-2 --train_batch_size 8 --micro_train_batch_size 3"
COMMANDS = {
    "train_sft": (train_sft.command, demonstrations, "--input_key prompt --output_key answer"),
    "train_rm": (train_rm.command, pairs, "--prompt_key prompt"),
    "train_dpo": (train_dpo.command, pairs, "--prompt_key prompt"),
    "train_kto": (train_kto.command, answers, "--input_key prompt --output_key answer"),
    "train_kd": (train_kd.command, demonstrations, "--input_key prompt --output_key answer"),
    "train_prm": (train_prm.command, steps, "--placeholder_token * --reward_tokens + -"),
}
EVERY = pytest.mark.parametrize("name", COMMANDS)
MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return the folders of a plain model and of a mixture of experts."""
    plain, mixture = (tmp_path_factory.mktemp(name) for name in ("plain", "mixture"))
    return {"plain": tiny_folder(plain), "mixture": tiny_folder(mixture, "mixtral", **MIXTURE)}


def run(name, pretrain, folder, *words):
    """Train as the words say; return the engine, the tokenizer, the metrics of all steps and of an evaluation."""
    command, rows, keys = COMMANDS[name]
    data = write_rows(folder / "rows.jsonl", rows(10))
    own = ["--teacher_model", pretrain] if name == "train_kd" else []
    sources = ["--pretrain", pretrain, "--dataset", data, "--eval_dataset", data, "--max_epochs", "1"]
    config = parse(command.config_class, [*sources, *SHAPE.split(), *keys.split(), *own, *words], name)[0]
    recipe, strategy, seen = command.recipe(config), solo(), Recorder()
    inputs = recipe.read(config)
    engine = strategy.prepare_train(recipe.model(config, strategy, inputs), config.optim, 6)
    options = recipe.options(config, strategy, inputs, engine)
    trainer = recipe.trainer(engine, strategy, inputs.train, inputs.evaluation, config.batch, [seen], **options)
    trainer.fit()
    return engine, inputs.tokenizer, seen.steps, trainer.evaluate()


@EVERY
@pytest.mark.parametrize("words", ["--lora_rank 4", "--lora_rank 4 --load_in_4bit --bf16"], ids=["lora", "qlora"])
def test_every_command_trains_adapters_and_writes_them_alone(name, words, folders, tmp_path):
    engine, tokenizer, metrics, _ = run(name, folders["plain"], tmp_path, *words.split())
    model = engine.module.model
    trained = trained_names(model)
    assert trained == {key for key, _ in model.named_parameters() if ".lora_" in key or key == "score.weight"}
    assert metrics[-1]["grad_norm"] > 0
    export_model(engine, solo(), tmp_path / "model", tokenizer)
    assert (tmp_path / "model" / "adapter_config.json").exists()
    weights = weights_of(tmp_path / "model")
    assert len(weights) == len(trained) and all(tensor.any() for tensor in weights.values())


@EVERY
def test_every_command_balances_the_experts_of_a_mixture(name, folders, tmp_path):
    with_loss, _, metrics, evaluation = run(name, folders["mixture"], tmp_path, "--aux_loss_coef", "0.5")
    without = run(name, folders["mixture"], tmp_path)[0]
    assert all(step["aux_loss"] > 0.4 for step in metrics) and "aux_loss" not in evaluation
    routers = [
        [weight for key, weight in engine.module.named_parameters() if key.endswith("mlp.gate.weight")]
        for engine in (with_loss, without)
    ]
    assert len(routers[0]) == len(routers[1]) > 0
    assert not any(torch.equal(one, other) for one, other in zip(*routers))
