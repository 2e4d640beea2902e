"""A reference that says everything once gives the training that a reference in memory gives, and is then gone."""

import gc
import shutil
from dataclasses import replace

import pytest
import torch

from openrlhf.cli import train_dpo, train_kto
from openrlhf.config.arguments import parse
from openrlhf.models.actor import Actor
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.frozen import ANSWERS, answer_log_probs
from openrlhf.trainer.known import KnownAnswers, ask_about
from openrlhf.trainer.mismatched import mismatched_sets
from tests.cli.supervised import answers, pairs, without_speed, write_rows
from tests.helpers import tiny_folder
from tests.trainer.language import Recorder, reference_of, solo, transformers_model

SHAPE = "--eval_split train --max_len 64 --learning_rate 3e-3 --train_batch_size 8 --micro_train_batch_size 3"
COMMANDS = {
    "train_dpo": (train_dpo.command, pairs, "--prompt_key prompt"),
    "train_kto": (train_kto.command, answers, "--input_key prompt --output_key answer --beta 0.1"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [tiny_folder(tmp_path_factory.mktemp(name), seed=seed) for name, seed in (("policy", 0), ("frozen", 1))]


def config_of(name, folders, folder, *words, own_reference=True):
    command, rows, keys = COMMANDS[name]
    data = write_rows(folder / "rows.jsonl", rows(11))
    own = ["--ref_pretrain", folders[1]] if name == "train_dpo" and own_reference else []
    places = ["--save_path", str(folder / "model"), "--ckpt_path", str(folder / "ckpt"), "--max_epochs", "2"]
    sources = ["--pretrain", folders[0], "--dataset", data, "--eval_dataset", data]
    return parse(command.config_class, [*sources, *SHAPE.split(), *keys.split(), *own, *places, *words], name)[0]


def trained(name, config):
    """Return the metrics of every step of a run, and of an evaluation after it."""
    recipe = COMMANDS[name][0].recipe(config)
    inputs, strategy, seen = recipe.read(config), solo(), Recorder()
    engine = strategy.prepare_train(recipe.model(config, strategy, inputs), config.optim, 6)
    options = recipe.options(config, strategy, inputs, engine)
    trainer = recipe.trainer(engine, strategy, inputs.train, inputs.evaluation, config.batch, [seen], **options)
    trainer.fit()
    return [*without_speed(seen.steps), trainer.evaluate()]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_with_what_the_reference_said_before_is_the_run_that_asks_it(name, folders, tmp_path):
    asked = trained(name, config_of(name, folders, tmp_path))
    known = trained(name, config_of(name, folders, tmp_path, "--precompute_ref_log_probs"))
    assert len(asked) == len(known) > 3
    for one, other in zip(asked, known, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def weights_in_memory():
    """Return how many numbers all parameters of this process hold, shards of them too."""
    gc.collect()
    parameters = [thing for thing in gc.get_objects() if type(thing) is torch.nn.Parameter]
    return sum(one.numel() + (one.ds_tensor.numel() if hasattr(one, "ds_tensor") else 0) for one in parameters)


@pytest.mark.parametrize("stage", [0, 3])
def test_the_reference_is_gone_once_it_said_everything(folders, tmp_path, stage):
    config = config_of("train_dpo", folders, tmp_path, "--precompute_ref_log_probs")
    config = replace(config, deepspeed=replace(config.deepspeed, zero_stage=stage))
    recipe = train_dpo.command.recipe(config)
    inputs = recipe.read(config)
    strategy = DeepSpeedStrategy(config.deepspeed, param_persistence_threshold=0)
    strategy.setup_distributed()
    before = weights_in_memory()
    reference = recipe.options(config, strategy, inputs, None)["reference"]
    assert isinstance(reference, KnownAnswers) and len(reference) == 2 * len(inputs.train)
    assert weights_in_memory() == before
    whole = recipe.options(replace(config, precompute_ref_log_probs=False), strategy, inputs, None)["reference"]
    assert weights_in_memory() >= before + 20_000 and callable(whole)


@pytest.mark.parametrize(("words", "bytes_each"), [("", 4), ("--bf16", 2)])
def test_the_memory_of_a_model_that_never_learns_is_told_before_the_first_step(
    words, bytes_each, folders, tmp_path, caplog
):
    caplog.set_level("INFO")
    config = config_of("train_dpo", folders, tmp_path, *words.split())
    recipe = train_dpo.command.recipe(config)
    recipe.options(config, solo(), recipe.read(config), None)
    count = sum(parameter.numel() for parameter in transformers_model(folders[1]).parameters())
    [said] = [line for line in caplog.messages if line.startswith("frozen")]
    assert said == (
        f"frozen   {folders[1]} (--ref_pretrain): {count:,} parameters; "
        f"about {bytes_each * count / 2**20:.1f} MiB more a rank"
    )


ADAPTERS = ["--lora_rank", "4", "--lora_dropout", "0.5", "--learning_rate", "3e-2"]


@pytest.mark.parametrize("words", [[], ["--precompute_ref_log_probs"]], ids=["asked", "known"])
@pytest.mark.parametrize("name", COMMANDS)
def test_with_adapters_the_reference_is_the_policy_without_its_own(name, words, folders, tmp_path):
    config = config_of(name, folders, tmp_path, *ADAPTERS, *words, own_reference=False)
    recipe, strategy = COMMANDS[name][0].recipe(config), solo()
    inputs = recipe.read(config)
    engine = strategy.prepare_train(recipe.model(config, strategy, inputs), config.optim, 6)
    before = weights_in_memory()
    options = recipe.options(config, strategy, inputs, engine)
    assert weights_in_memory() == before, "no second copy"
    recipe.trainer(engine, strategy, inputs.train, inputs.evaluation, config.batch, **options).fit()
    batch = inputs.train.collate([inputs.train[index] for index in range(4)])
    said = options["reference"](batch)
    assert engine.module.training, "training goes on after the reference was asked"
    torch.testing.assert_close(said, reference_of(folders[0])(batch))
    engine.eval()
    assert not torch.allclose(said, answer_log_probs(engine, batch), rtol=1e-2)


def test_another_reference_than_the_policy_is_a_model_of_its_own_beside_adapters(folders, tmp_path):
    config = config_of("train_dpo", folders, tmp_path, *ADAPTERS)
    recipe, strategy = train_dpo.command.recipe(config), solo()
    inputs = recipe.read(config)
    engine = strategy.prepare_train(recipe.model(config, strategy, inputs), config.optim, 6)
    before = weights_in_memory()
    reference = recipe.options(config, strategy, inputs, engine)["reference"]
    assert weights_in_memory() > before
    batch = inputs.train.collate([inputs.train[0]])
    torch.testing.assert_close(reference(batch), reference_of(folders[1])(batch))


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_a_loss_without_reference_loads_none(folders, tmp_path, loss):
    config = config_of("train_dpo", folders, tmp_path, "--loss", loss)
    recipe = train_dpo.command.recipe(config)
    assert recipe.options(config, solo(), recipe.read(config), None)["reference"] is None


def test_an_answer_that_was_not_asked_about_is_an_error_and_a_dummy_is_none(folders, tmp_path):
    config = config_of("train_dpo", folders, tmp_path)
    data = train_dpo.command.read(config).train
    reference = KnownAnswers.of([])
    assert torch.equal(reference(data.collate([])), torch.zeros(2))
    with pytest.raises(KeyError):
        reference(data.collate([data[0]]))


def kept_reference(name, folders, folder, *words):
    """Return ``(reference, rows, whether it was asked)`` of a command that starts in the run folder of ``folder``."""
    config = config_of(name, folders, folder, "--precompute_ref_log_probs", *words, own_reference=name == "train_dpo")
    recipe, strategy = COMMANDS[name][0].recipe(config), solo()
    inputs = recipe.read(config, folder / "run")
    engine = strategy.prepare_train(recipe.model(config, strategy, inputs), config.optim, 6)
    asked, forward = [], Actor.forward

    def noted(model, *batch, **options):
        asked.append(batch)
        return forward(model, *batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Actor, "forward", noted)
        reference = recipe.options(config, strategy, inputs, engine)["reference"]
    return reference, inputs.train, bool(asked)


@pytest.mark.parametrize(
    "words", [[], ["--use_dynamic_batch", "--train_max_tokens_per_gpu", "300"]], ids=["", "budget"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_that_goes_on_does_not_ask_the_reference_again(name, words, folders, tmp_path):
    first, rows, asked = kept_reference(name, folders, tmp_path, *words)
    second, _, asked_again = kept_reference(name, folders, tmp_path, *words)
    batch = rows.collate([rows[index] for index in range(len(rows))])
    assert asked and not asked_again
    assert torch.equal(first(batch), second(batch)) and first(batch).all()


@pytest.mark.parametrize("change", ["weights", "data", "settings", "file"])
def test_what_another_reference_said_or_of_other_rows_is_not_used(change, folders, tmp_path):
    frozen = tmp_path / "frozen"
    shutil.copytree(folders[1], frozen)
    both = [folders[0], str(frozen)]
    kept_reference("train_dpo", both, tmp_path)
    words = []
    if change == "weights":
        tiny_folder(frozen, seed=2)
    elif change == "data":
        words = ["--max_samples", "10"]
    elif change == "settings":
        words = ["--bf16"]
    else:
        path = tmp_path / "run" / "tokens" / ANSWERS
        content = bytearray(path.read_bytes())
        content[0] ^= 1
        path.write_bytes(content)
    reference, rows, asked = kept_reference("train_dpo", both, tmp_path, *words)
    batch = rows.collate([rows[0]])
    assert asked
    if change != "settings":
        torch.testing.assert_close(reference(batch), reference_of(both[1])(batch))


class Watched:
    """A reference that notes the tokens of its batches."""

    def __init__(self):
        self.tokens = []

    def __call__(self, batch):
        self.tokens.append(int(batch.attention_mask.sum()))
        return torch.zeros(len(batch.sequences))


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_asked_before_training_keeps_to_the_budget_of_tokens(name, folders, tmp_path):
    budget = 200
    config = config_of(name, folders, tmp_path, "--use_dynamic_batch", "--train_max_tokens_per_gpu", str(budget))
    inputs, ask = COMMANDS[name][0].read(config), Watched()
    sets = inputs.sets()
    if name == "train_kto":
        sets += mismatched_sets(inputs.train, inputs.evaluation, config.batch)
    ask_about(sets, ask, config.batch, solo())
    assert max(inputs.train.lengths) < budget / 2 < max(ask.tokens) <= budget
