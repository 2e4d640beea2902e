"""Weights in buckets."""

from __future__ import annotations

import pickle

import torch

from openrlhf.rollout.weights import alone, in_buckets


def test_a_bucket_ends_with_the_weight_that_fills_it_and_none_is_lost_or_moved():
    weights = [(str(index), torch.full((size,), float(index))) for index, size in enumerate([3, 1, 9, 0, 2])]
    buckets = list(in_buckets(iter(weights), 16))
    assert [[name for name, _ in bucket] for bucket in buckets] == [["0", "1"], ["2"], ["3", "4"]]
    assert [pair for bucket in buckets for pair in bucket] == weights
    assert list(in_buckets([], 16)) == []


def test_what_is_pickled_of_views_is_their_own_bytes():
    whole = torch.zeros(100_000)
    bucket = [(str(start), whole[start : start + 10]) for start in range(0, 100, 10)]
    assert len(pickle.dumps(bucket)) > whole.nbytes
    assert len(pickle.dumps(alone(bucket))) < 20_000
