"""Weights for samples of an engine that is off, against loops over actions."""

import math

import pytest
import torch

from openrlhf.config.ppo_algorithm import CORRECTIONS
from openrlhf.ops.rollout_correction import rollout_correction

LOW, HIGH = 0.5, 5.0
every_kind = pytest.mark.parametrize("kind", CORRECTIONS)


def a_batch():
    generator = torch.Generator().manual_seed(0)
    log_probs, engine = (torch.randn(6, 8, generator=generator) for _ in range(2))
    mask = torch.rand(6, 8, generator=generator) < 0.6
    mask[1] = False
    engine[3] -= 2.0
    return log_probs, engine, mask


def corrected(kind, *batch):
    return rollout_correction(*batch, kind=kind, low=LOW, high=HIGH)


def by_hand(kind, gaps):
    """The weights of one sequence, and which of them are cut, with plain numbers."""
    raw = [math.exp(gap) for gap in gaps]
    if kind == "tis":
        return [min(max(w, LOW), HIGH) for w in raw], [not LOW <= w <= HIGH for w in raw]
    if kind == "icepop":
        return [w if LOW <= w <= HIGH else 0.0 for w in raw], [not LOW <= w <= HIGH for w in raw]
    inside = LOW <= math.exp(sum(gaps) / len(gaps)) <= HIGH
    return [w if inside else 0.0 for w in raw], [not inside for _ in raw]


@every_kind
def test_weights_and_metrics_equal_a_loop_over_actions(kind):
    log_probs, engine, mask = a_batch()
    found = corrected(kind, log_probs, engine, mask)
    total, cut, drift = 0.0, 0, 0.0
    for row in range(6):
        places = mask[row].nonzero().flatten().tolist()
        gaps = [float(log_probs[row, t] - engine[row, t]) for t in places]
        weights, outside = by_hand(kind, gaps) if gaps else ([], [])
        assert found.weights[row, mask[row]].tolist() == pytest.approx(weights, rel=1e-5)
        total, cut, drift = total + sum(weights), cut + sum(outside), drift - sum(gaps)
    assert not found.weights[~mask].any()
    sums = {name: float(value) for name, (value, _) in found.metrics.items()}
    assert sums == pytest.approx({"vllm_kl": drift, "is_weight": total, "is_outside": cut}, rel=1e-4)
    assert cut > 0 and {int(count) for _, count in found.metrics.values()} == {int(mask.sum())}


@every_kind
def test_an_engine_that_agrees_has_weights_of_one(kind):
    log_probs, _, mask = a_batch()
    assert torch.equal(corrected(kind, log_probs, log_probs, mask).weights, mask.float())


@every_kind
@pytest.mark.parametrize("gap", [200.0, -200.0, math.inf])
def test_a_weight_that_would_overflow_stays_finite(kind, gap):
    log_probs, engine, mask = a_batch()
    mask[0, 0] = True
    engine[0, 0] = log_probs[0, 0] - gap
    found = corrected(kind, log_probs, engine, mask)
    assert found.weights.isfinite().all() and found.metrics["is_weight"][0].isfinite()


@every_kind
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_what_is_off_the_mask_padding_and_the_order_of_rows_change_nothing(kind, poison):
    log_probs, engine, mask = a_batch()
    clean = corrected(kind, log_probs, engine, mask).weights
    dirty = corrected(kind, log_probs.masked_fill(~mask, poison), engine.masked_fill(~mask, poison), mask)
    assert torch.equal(dirty.weights, clean)
    pad, order = torch.nn.functional.pad, torch.tensor([5, 2, 0, 1, 4, 3])
    wide = corrected(kind, *(pad(x, (0, 2), value=3.0) for x in (log_probs, engine)), pad(mask, (0, 2)))
    torch.testing.assert_close(wide.weights, pad(clean, (0, 2)))
    assert torch.equal(corrected(kind, log_probs[order], engine[order], mask[order]).weights, clean[order])


def test_weights_have_no_gradient_and_an_unknown_kind_is_an_error():
    log_probs, engine, mask = a_batch()
    assert not corrected("tis", log_probs.requires_grad_(), engine, mask).weights.requires_grad
    with pytest.raises(ValueError, match="unknown correction 'mis'"):
        corrected("mis", log_probs, engine, mask)
