"""Distillation on tiny models."""

import pytest
import torch

from openrlhf.config.supervised import KDDataConfig
from openrlhf.datasets.sft import SFTDataset
from openrlhf.trainer.kd import KDTrainer
from tests.cli.supervised import demonstrations
from tests.helpers import tiny_folder, tiny_tokenizer
from tests.trainer.language import actor, trainer_of, transformers_model


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    cfg = KDDataConfig(dataset="d", input_key="prompt", output_key="answer")
    return SFTDataset(demonstrations(7), tokenizer, cfg)


def expected(student, teacher, data, kd_coef):
    """Return gpt loss, cross-entropy and divergence per token, over the tokens that both models know."""
    models, sums, count = [transformers_model(folder) for folder in (student, teacher)], torch.zeros(3), 0
    for row in (data[index] for index in range(len(data))):
        ids, mask = torch.tensor(row.token_ids), torch.tensor(row.loss_mask)
        with torch.no_grad():
            ours, theirs = (model(ids[None]).logits[0, :-1][mask] for model in models)
        known = min(ours.shape[1], theirs.shape[1])
        log_p, log_t = ours.log_softmax(-1), theirs[:, :known].log_softmax(-1)
        cross = -(log_t.exp() * log_p[:, :known]).sum(-1)
        divergence = (log_t.exp() * (log_t - log_p[:, :known])).sum(-1)
        gpt = -log_p.gather(1, ids[1:][mask][:, None])
        sums += torch.stack([gpt.sum(), cross.sum(), divergence.sum()])
        count += int(mask.sum())
    gpt, cross, divergence = (sums / count).tolist()
    return {
        "eval gpt_loss": gpt,
        "eval distil_loss": cross,
        "eval kl": divergence,
        "eval_loss": (1 - kd_coef) * gpt + kd_coef * cross,
    }


@pytest.mark.parametrize(
    ("options", "micro"),
    [({"hidden": 48}, 3), ({"vocab": 384}, 4), ({"vocab": 384, "arch": "gemma2"}, 2)],
    ids=["larger", "padded vocabulary", "soft-capped logits"],
)
def test_an_evaluation_is_the_formula_over_all_tokens(student, tmp_path, data, options, micro):
    teacher = tiny_folder(tmp_path / "teacher", seed=1, **options)
    trainer = trainer_of(KDTrainer, student, data, data, micro=micro, teacher=actor(teacher), kd_coef=0.3)
    assert trainer.evaluate() == pytest.approx(expected(student, teacher, data, 0.3), rel=1e-4)


def test_a_student_with_a_longer_vocabulary_or_capped_logits_learns_too(student, tmp_path, data):
    larger = tiny_folder(tmp_path / "student", "gemma2", vocab=384, seed=2)
    trainer = trainer_of(KDTrainer, larger, data, data, teacher=actor(student), kd_coef=0.5)
    before = trainer.evaluate()
    assert before == pytest.approx(expected(larger, student, data, 0.5), rel=1e-4)
    trainer.fit()
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"]


def test_a_model_that_is_its_own_teacher_has_nothing_to_learn_from_it(student, data):
    values = trainer_of(KDTrainer, student, data, data, teacher=actor(student), kd_coef=1.0).evaluate()
    assert values["eval kl"] == pytest.approx(0.0, abs=1e-6)
