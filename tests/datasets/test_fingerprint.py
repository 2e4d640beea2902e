"""The fingerprint of a data set changes with everything that training reads, and with nothing else."""

from dataclasses import replace

import pytest

from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.datasets.prompts import Prompt
from openrlhf.datasets.reward import PreferenceRow
from openrlhf.datasets.sft import SFTRow

DEMONSTRATIONS = [SFTRow([1, 2, 3], [False, True], None), SFTRow([4, 5], [True], None)]
PAIRS = [PreferenceRow([1, 2], [1, 3], 1, 1, 0.5), PreferenceRow([4, 5], [4, 6], 1, 1, 0.0)]
PROMPTS = [Prompt("0", "a", (1, 2), "yes"), Prompt("1", "b", (3,), "no")]


def with_last(rows, **values):
    return [*rows[:-1], replace(rows[-1], **values)]


@pytest.mark.parametrize(
    ("rows", "other"),
    [
        (DEMONSTRATIONS, with_last(DEMONSTRATIONS, token_ids=[4, 6])),
        (DEMONSTRATIONS, with_last(DEMONSTRATIONS, loss_mask=[False])),
        (DEMONSTRATIONS, DEMONSTRATIONS[::-1]),
        (DEMONSTRATIONS, DEMONSTRATIONS[:1]),
        (DEMONSTRATIONS, [*DEMONSTRATIONS, DEMONSTRATIONS[0]]),
        (PAIRS, with_last(PAIRS, margin=0.25)),
        (PAIRS, with_last(PAIRS, chosen=[4, 6], rejected=[4, 5])),
        (PAIRS, with_last(PAIRS, chosen_prompt=2)),
        (PROMPTS, with_last(PROMPTS, label="yes")),
        (PROMPTS, with_last(PROMPTS, text="c")),
        ([[1, 2], [3]], [[1], [2, 3]]),
        ([[1, 2]], [["1", "2"]]),
        ([[]], []),
    ],
)
def test_another_row_another_order_or_another_number_is_seen(rows, other):
    assert fingerprint(rows) != fingerprint(other)


def test_the_tokenizer_object_and_the_container_do_not_matter():
    other = tuple(replace(row, tokenizer=object()) for row in DEMONSTRATIONS)
    assert fingerprint(DEMONSTRATIONS) == fingerprint(other)
