"""DPO and its kin on a tiny model: what is logged is the formula."""

from functools import partial

import pytest
import torch

from openrlhf.config.groups import PreferenceDataConfig
from openrlhf.datasets.reward import PreferenceDataset
from openrlhf.ops.preference_loss import dpo_loss, orpo_loss, paired_kto_loss
from openrlhf.trainer.dpo import DPOTrainer
from openrlhf.trainer.frozen import answer_log_probs
from tests.cli.supervised import pairs
from tests.helpers import tiny_folder, tiny_tokenizer
from tests.trainer.language import Recorder, actor, reference_of, trainer_of, transformers_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [tiny_folder(tmp_path_factory.mktemp(name), seed=seed) for name, seed in (("policy", 0), ("frozen", 1))]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return PreferenceDataset(pairs(7), tokenizer, PreferenceDataConfig(prompt_key="prompt"))


def sides(folder, data):
    """Return ``(log-probs of chosen answers, of rejected answers, tokens of both)`` by transformers alone."""
    model, found = transformers_model(folder), []
    for row in (data[index] for index in range(len(data))):
        for ids, prompt in ((row.chosen, row.chosen_prompt), (row.rejected, row.rejected_prompt)):
            with torch.no_grad():
                log_probs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            answer = range(prompt, len(ids))
            found.append((sum(log_probs[t - 1, ids[t]].item() for t in answer), len(answer)))
    sums, counts = (torch.tensor(values, dtype=torch.float64) for values in zip(*found))
    return sums[::2], sums[1::2], counts[::2], counts[1::2]


@pytest.mark.parametrize("micro", [2, 4])
def test_an_evaluation_is_the_formula_over_all_pairs(folders, data, micro):
    options = {"pair_loss": partial(dpo_loss, beta=0.1), "beta": 0.1, "nll_loss_coef": 0.5}
    trainer = trainer_of(
        DPOTrainer, folders[0], data, data, micro=micro, reference=reference_of(folders[1]), **options
    )
    chosen, rejected, length, _ = sides(folders[0], data)
    ref_chosen, ref_rejected, _, _ = sides(folders[1], data)
    z = (chosen - rejected) - (ref_chosen - ref_rejected)
    expected = -torch.nn.functional.logsigmoid(0.1 * z).mean() - 0.5 * (chosen / length).mean()
    values = trainer.evaluate()
    assert values["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert values["acc_mean"] == pytest.approx((z > 0).double().mean().item())


def test_rewards_are_log_ratios_to_the_reference_times_beta(folders, data):
    seen = Recorder()
    options = {"pair_loss": partial(dpo_loss, beta=0.2), "beta": 0.2, "reference": reference_of(folders[1])}
    trainer_of(DPOTrainer, folders[0], data, rows=7, callbacks=[seen], **options).fit()
    ratios = [ours - theirs for ours, theirs in zip(sides(folders[0], data)[:2], sides(folders[1], data)[:2])]
    assert seen.steps[0]["chosen_reward"] == pytest.approx(0.2 * ratios[0].mean().item(), rel=1e-4)
    assert seen.steps[0]["reject_reward"] == pytest.approx(0.2 * ratios[1].mean().item(), rel=1e-4)
    assert seen.steps[0]["acc"] == pytest.approx((ratios[0] > ratios[1]).double().mean().item())


def test_a_loss_without_reference_reads_means_over_tokens(folders, data):
    trainer = trainer_of(DPOTrainer, folders[0], data, data, pair_loss=partial(orpo_loss, beta=0.3), beta=0.3)
    chosen, rejected, *counts = sides(folders[0], data)
    expected = orpo_loss(chosen / counts[0], rejected / counts[1], beta=0.3) / len(data)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("micro", [1, 4])
def test_kto_on_pairs_measures_its_divergences_over_all_pairs_before_the_loss(folders, data, micro):
    positive = 0
    for both in (folders, folders[::-1]):
        loss, seen = partial(paired_kto_loss, beta=0.1), Recorder()
        options = {"pair_loss": loss, "measures_divergences": True, "beta": 0.1, "reference": reference_of(both[1])}
        trainer = trainer_of(DPOTrainer, both[0], data, data, micro=micro, rows=7, callbacks=[seen], **options)
        ratios = [ours - theirs for ours, theirs in zip(sides(both[0], data)[:2], sides(both[1], data)[:2])]
        names = ("chosen_kl", "rejected_kl")
        kl = {name: side.mean().clamp(min=0) for name, side in zip(names, ratios, strict=True)}
        expected = loss(*ratios, **kl).item() / len(data)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        trainer.fit()
        assert seen.steps[0]["loss"] == pytest.approx(expected, rel=1e-5)
        assert {name: seen.steps[0][name] for name in kl} == pytest.approx(
            {name: value.item() for name, value in kl.items()}, rel=1e-4, abs=1e-6
        )
        positive += sum(value > 0 for value in kl.values())
    assert positive


def test_the_reference_stays_as_it_was(folders, data):
    reference = actor(folders[1])
    before = [parameter.detach().clone() for parameter in reference.parameters()]
    options = {
        "pair_loss": partial(dpo_loss, beta=0.1),
        "beta": 0.1,
        "reference": partial(answer_log_probs, reference),
    }
    trainer = trainer_of(DPOTrainer, folders[0], data, **options)
    trainer.fit()
    assert all(map(torch.equal, before, reference.parameters()))
    assert all(parameter.grad is None for parameter in reference.parameters())
