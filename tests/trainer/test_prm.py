"""Process reward models on a tiny model."""

import pytest
import torch

from openrlhf.config.supervised import ProcessDataConfig
from openrlhf.datasets.process_reward import ProcessRewardDataset
from openrlhf.trainer.prm import ProcessRewardModelTrainer
from tests.helpers import tiny_folder, tiny_tokenizer
from tests.trainer.language import trainer_of, transformers_model

TEXTS = ["1 * 2 * 3 *", "4 *", "5 * 6 *", "7 * 8 * 9 * 0 *", "1 1 *"]
HARD = [["+", "-", "+"], ["-"], ["+", "+"], ["-", "+", "-", "+"], ["+"]]
SOFT = [[0.9, 0.2, 0.6], [0.0], [1.0, 0.7], [0.1, 0.8, 0.3, 1.0], [0.75]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base"))


def steps(tokenizer, labels, tokens):
    config = ProcessDataConfig(dataset="d", placeholder_token="*", reward_tokens=tokens)
    rows = [{"input": text, "label": label} for text, label in zip(TEXTS, labels, strict=True)]
    return ProcessRewardDataset(rows, tokenizer, config)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize(("labels", "tokens"), [(HARD, None), (HARD, ("+", "-")), (SOFT, ("+", "-"))])
def test_an_evaluation_is_the_formula_over_all_steps(folder, tmp_path, micro, labels, tokens):
    tokenizer = tiny_tokenizer(tmp_path)
    data, model = steps(tokenizer, labels, tokens), transformers_model(folder)
    names = dict(zip("+-", tokenizer.convert_tokens_to_ids(["+", "-"]), strict=True))
    competing = list(names.values()) if tokens else list(range(model.config.vocab_size))
    losses, right = [], []
    for text, row_labels in zip(TEXTS, labels, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        ends = [t for t, token in enumerate(ids) if token == tokenizer.convert_tokens_to_ids("*")]
        for end, label in zip(ends, row_labels, strict=True):
            log_probs = logits[end, competing].log_softmax(-1)
            by_token = dict(zip(competing, log_probs.tolist(), strict=True))
            shares = {label: 1.0} if isinstance(label, str) else {"+": label, "-": 1 - label}
            losses.append(-sum(share * by_token[names[name]] for name, share in shares.items()))
            right.append(max(by_token, key=by_token.get) == names[max(shares, key=shares.get)])
    trainer = trainer_of(ProcessRewardModelTrainer, folder, data, data, micro=micro, reward_ids=data.reward_ids)
    values = trainer.evaluate()
    assert values["eval prm_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert values["eval acc"] == pytest.approx(sum(right) / len(right))


def test_training_brings_the_loss_down(folder, tmp_path):
    data = steps(tiny_tokenizer(tmp_path), HARD, ("+", "-"))
    trainer = trainer_of(ProcessRewardModelTrainer, folder, data, data, reward_ids=data.reward_ids)
    before = trainer.evaluate()["eval prm_loss"]
    trainer.fit()
    assert trainer.evaluate()["eval prm_loss"] < before
