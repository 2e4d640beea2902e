"""KTO: the drift is that of the whole step, and answers of one kind are enough."""

import math

import pytest
import torch

from openrlhf.config.supervised import UnpairedDataConfig
from openrlhf.datasets.unpaired_preference import UnpairedPreferenceDataset
from openrlhf.errors import NumericError
from openrlhf.trainer.kto import KTOTrainer
from tests.cli.supervised import pairs
from tests.helpers import tiny_folder, tiny_tokenizer
from tests.trainer.language import Recorder, answer_log_prob, reference_of, trainer_of, transformers_model

BETA = 0.1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, and a reference that it has drifted from."""
    return [tiny_folder(tmp_path_factory.mktemp(name), seed=seed) for name, seed in (("policy", 0), ("frozen", 1))]


def answers(tokenizer_folder, count=7, labels=(True, False)):
    rows = [
        {"input": row["prompt"], "output": row[side], "label": label}
        for row in pairs(count)
        for side, label in (("chosen", True), ("rejected", False))
        if label in labels
    ]
    config = UnpairedDataConfig(dataset="d", output_key="output", input_template=None)
    return UnpairedPreferenceDataset(rows, tiny_tokenizer(tokenizer_folder), config)


def kto(folders, data, eval_data=(), **options):
    return trainer_of(
        KTOTrainer, folders[0], data, eval_data, reference=reference_of(folders[1]), beta=BETA, **options
    )


def drift(folders, data, order):
    """Return the mean log-ratio of each row's prompt with the next one's answer, not below 0."""
    models = [transformers_model(folder) for folder in folders]
    pairs = zip(order, [*order[1:], order[0]], strict=True)
    rows = [data.mismatched(*pair) for pair in pairs]
    return max(0.0, sum(answer_log_prob(models[0], row) - answer_log_prob(models[1], row) for row in rows) / len(rows))


def loss_of(folders, row, kl):
    models = [transformers_model(folder) for folder in folders]
    ratio = answer_log_prob(models[0], row) - answer_log_prob(models[1], row)
    return 1 - 1 / (1 + math.exp(-BETA * (ratio - kl) * (1 if row.desirable else -1)))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("micro", [1, 2, 5])
def test_the_first_step_measures_the_drift_over_its_rows_however_they_are_cut(folders, tmp_path, micro, order):
    data, seen = answers(tmp_path), Recorder()
    both = [folders[side] for side in order]
    trainer = kto(both, data, micro=micro, rows=8, callbacks=[seen])
    step = sorted(trainer.sampler.step_rows(0, 0))
    trainer.fit()
    expected = drift(both, data, step)
    assert seen.steps[0]["kl"] == pytest.approx(expected, rel=1e-4)
    losses = [loss_of(both, data[row], expected) for row in step]
    assert seen.steps[0]["kto_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_one_of_both_directions_has_a_drift(folders, tmp_path):
    data = answers(tmp_path)
    drifts = [drift(both, data, range(len(data))) for both in (folders, folders[::-1])]
    assert max(drifts) > 0.1 and min(drifts) == 0


@pytest.mark.parametrize("micro", [1, 4])
def test_an_evaluation_measures_the_drift_over_all_of_its_rows(folders, tmp_path, micro):
    data = answers(tmp_path, count=5)
    both = max((folders, folders[::-1]), key=lambda both: drift(both, data, range(len(data))))
    values = kto(both, data, data, micro=micro).evaluate()
    kl = drift(both, data, range(len(data)))
    losses = [loss_of(both, data[row], kl) for row in range(len(data))]
    assert values["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert kl > 0.1 and set(values) == {"eval_loss", "chosen_reward", "reject_reward"}


@pytest.mark.parametrize(("label", "missing"), [(True, "reject_reward"), (False, "chosen_reward")])
def test_answers_of_one_kind_give_no_figure_for_the_other(folders, tmp_path, label, missing):
    data, seen = answers(tmp_path, labels=(label,)), Recorder()
    trainer = kto(folders, data, data, callbacks=[seen])
    trainer.fit()
    for values in (*seen.steps, trainer.evaluate()):
        assert missing not in values and all(math.isfinite(value) for value in values.values())


def test_a_single_row_is_its_own_partner(folders, tmp_path):
    data, seen = answers(tmp_path, count=1, labels=(True,)), Recorder()
    kto(folders, data, micro=1, rows=1, callbacks=[seen]).fit()
    assert seen.steps[0]["kl"] == pytest.approx(drift(folders, data, [0]), rel=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_drift_that_is_no_number_stops_before_the_weights_change(folders, tmp_path, value):
    data, said = answers(tmp_path), reference_of(folders[1])

    def reference(batch):
        """Say nothing of the mismatched rows, which follow the others."""
        found = said(batch)
        found[len(found) // 2 :] = value
        return found

    trainer = trainer_of(KTOTrainer, folders[0], data, (), reference=reference, beta=BETA, rows=8)
    before = [weight.clone() for weight in trainer.engine.module.parameters()]
    with pytest.raises(NumericError, match="loss"):
        trainer.fit()
    assert all(map(torch.equal, before, trainer.engine.module.parameters()))
