"""KTO: the drift is that of the whole step, and answers of one kind are enough."""

import math

import pytest
import torch

from openrlhf.config.supervised import UnpairedDataConfig
from openrlhf.datasets.unpaired_preference import UnpairedPreferenceDataset
from openrlhf.errors import DataError, NumericError, Preempted
from openrlhf.strategy import signals
from openrlhf.trainer.kto import KTOTrainer
from openrlhf.trainer.mismatched import partners
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
    pairs = zip(order, [*order[1:], order[0]], strict=True)
    ratios = [log_ratio(folders, data.mismatched(*pair)) for pair in pairs]
    return max(0.0, sum(ratios) / len(ratios))


def log_ratio(folders, row):
    policy, reference = (transformers_model(folder) for folder in folders)
    return answer_log_prob(policy, row) - answer_log_prob(reference, row)


def loss_of(folders, row, kl):
    return 1 - 1 / (1 + math.exp(-BETA * (log_ratio(folders, row) - kl) * (1 if row.desirable else -1)))


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


def test_a_step_of_one_row_borrows_the_answer_of_another_step(folders, tmp_path):
    data, found = answers(tmp_path, labels=(True,)), []
    for both in (folders, folders[::-1]):
        trainer, borrowed = kto(both, data), log_ratio(both, data.mismatched(6, 0))
        trainer.before_step([[6]], stoppable=False)
        assert float(trainer.drift) == pytest.approx(max(0.0, borrowed), rel=1e-4, abs=1e-6)
        found.append(borrowed)
    assert found[0] == -found[1] and abs(found[0]) > 0.1


def test_a_row_that_several_ranks_name_is_not_its_own_partner():
    assert partners([4, 0, 2, 4, 0, 2], 7).tolist() == [[0, 2], [2, 4], [4, 0]]
    assert partners([6, 6], 7).tolist() == [[6, 0]]


def test_data_of_one_row_is_refused(folders, tmp_path):
    data = answers(tmp_path, count=1, labels=(True,))
    with pytest.raises(DataError, match="give two rows"):
        kto(folders, data, micro=1, rows=2).fit()


class Counting:
    """A reference that notes the tokens of its batches, and asks the run to stop in the call of a number."""

    def __init__(self, folder, asked_at=None):
        self._said, self._asked_at, self.tokens = reference_of(folder), asked_at, []

    def __call__(self, batch):
        self.tokens.append(int(batch.attention_mask.sum()))
        if len(self.tokens) == self._asked_at:
            signals.ask("SIGTERM")
        return self._said(batch)


def test_a_budget_of_tokens_holds_for_the_reference_and_leaves_the_drift_as_it_is(folders, tmp_path):
    data, budget = answers(tmp_path), 150
    both = max((folders, folders[::-1]), key=lambda both: drift(both, data, range(len(data))))
    seen, reference = Recorder(), Counting(both[1])
    trainer = trainer_of(
        KTOTrainer, both[0], data, data, rows=8, budget=budget, callbacks=[seen], reference=reference, beta=BETA
    )
    step = sorted(trainer.sampler.step_rows(0, 0))
    trainer.fit()
    assert seen.steps[0]["kl"] == pytest.approx(drift(both, data, step), rel=1e-4)
    trainer.evaluate()
    assert max(data.lengths) < budget / 2 < max(reference.tokens) <= budget


def test_a_step_is_left_while_its_drift_is_measured(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_state", signals._State())
    data, reference = answers(tmp_path), Counting(folders[1], asked_at=3)
    trainer = trainer_of(KTOTrainer, folders[0], data, (), micro=1, rows=8, reference=reference, beta=BETA)
    with pytest.raises(Preempted, match="stopped by SIGTERM after step 0"):
        trainer.fit()
    assert len(reference.tokens) == 3


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
