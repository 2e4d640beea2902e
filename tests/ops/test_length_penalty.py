"""Penalties for length, against numbers by hand."""

import pytest
import torch

from openrlhf.ops.length_penalty import overlong_penalty, stop_properly


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (85, -0.5), (90, -1.0), (100, -2.0), (120, -2.0)]
)
def test_the_penalty_grows_evenly_through_the_buffer(length, penalty):
    assert overlong_penalty(torch.tensor([length]), 100, 20, 2.0).tolist() == pytest.approx([penalty])


def test_the_penalty_equals_the_formula_for_every_length():
    lengths = torch.arange(1, 40)
    found = overlong_penalty(lengths, 30, 7.0, 0.6)
    for length, penalty in zip(lengths.tolist(), found.tolist(), strict=True):
        expected = -min(length - (30 - 7), 7) / 7 * 0.6
        assert penalty == pytest.approx(min(expected, 0.0), abs=1e-6)
    assert found.dtype == torch.float32


@pytest.mark.parametrize(("coef", "expected"), [(1.0, 2.0), (0.5, 1.0), (0.0, 0.0), (-3.0, -3.0)])
def test_only_answers_that_were_cut_off_are_punished(coef, expected):
    scores = torch.tensor([2.0, 2.0, -1.0])
    cut = torch.tensor([True, False, False])
    assert stop_properly(scores, cut, coef).tolist() == [expected, 2.0, -1.0]
