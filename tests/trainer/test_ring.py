"""Ranks that share sequences, and micro-batches cut by tokens, report what one rank alone reports of whole rows."""

from __future__ import annotations

import pytest

from tests.helpers import tiny_folder
from tests.strategy.ranks import run_ranks
from tests.trainer.ring_programs import trained


def assert_like_one_rank(folder, ranks: int, ways: list[list[int]]) -> None:
    expected = trained(tiny_folder(folder), 1, 0)
    found = run_ranks("tests.trainer.ring_programs:trained_each_way", ranks, folder=str(folder), ways=ways)
    for results in found:
        for way, programs in zip(ways, results, strict=True):
            for program, lines in programs.items():
                for line, plain in zip(lines, expected[program], strict=True):
                    assert line == pytest.approx(plain, rel=1e-4, abs=1e-6), (program, way)


def test_two_ranks_that_share_sequences_report_what_one_reports(tmp_path):
    assert_like_one_rank(tmp_path, 2, [[2, 0], [2, 30]])


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "ways"), [(2, [[1, 60]]), (4, [[4, 0], [2, 0], [2, 30], [1, 30]])])
def test_so_do_more_ranks_in_every_way(tmp_path, ranks, ways):
    assert_like_one_rank(tmp_path, ranks, ways)
