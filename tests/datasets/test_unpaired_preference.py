"""Answers with a label for KTO."""

import pytest

from openrlhf.config.supervised import UnpairedDataConfig
from openrlhf.datasets.unpaired_preference import UnpairedPreferenceDataset
from openrlhf.errors import DataError
from tests.datasets.conftest import trained_text

ROWS = [
    {"input": "12 + 30?", "output": "It is 42.", "label": True},
    {"input": "And in May?", "output": "72 clips.", "label": False},
    {"input": "a", "output": "b", "label": True},
]


def config(**options):
    return UnpairedDataConfig(**({"dataset": "d", "output_key": "output", "max_len": 128} | options))


def text(tokenizer, row):
    return tokenizer.decode(row.token_ids)


def test_rows_are_prompt_and_answer_with_a_label(chatml):
    data = UnpairedPreferenceDataset(ROWS, chatml, config())
    assert [row.desirable for row in data] == [True, False, True]
    assert text(chatml, data[0]) == "User: 12 + 30?\nAssistant: It is 42.<|im_end|>"
    assert trained_text(chatml, data[0]) == "It is 42.<|im_end|>"


def test_conversations_bring_their_answer(chatml):
    turns = [{"role": "user", "content": "12 + 30?"}, {"role": "assistant", "content": "It is 42."}]
    chat = config(output_key=None, apply_chat_template=True)
    data = UnpairedPreferenceDataset([{"input": turns, "label": 1}], chatml, chat)
    assert trained_text(chatml, data[0]) == "It is 42.<|im_end|>" and data[0].desirable


def test_labels_stay_with_their_rows_when_others_are_dropped(chatml):
    rows = [ROWS[0] | {"output": " "}, ROWS[1], ROWS[0] | {"input": "long " * 90}, ROWS[2]]
    data = UnpairedPreferenceDataset(rows, chatml, config())
    assert [row.desirable for row in data] == [False, True]
    assert sum(data.dropped.values()) == 2


@pytest.mark.parametrize(
    ("value", "desirable"), [(1, True), (0.0, False), ("true", True), ("0", False), ("False", False)]
)
def test_a_label_may_be_a_number_or_the_text_of_a_table(chatml, value, desirable):
    data = UnpairedPreferenceDataset([ROWS[0] | {"label": value}], chatml, config())
    assert data[0].desirable is desirable


@pytest.mark.parametrize("value", [None, 2, -1, 0.5, "good", ["true"]])
def test_another_label_is_named_with_its_row(chatml, value):
    with pytest.raises(DataError, match=r"row 1: 'label' \(--label_key\) is .*true or 1"):
        UnpairedPreferenceDataset([ROWS[0], ROWS[1] | {"label": value}], chatml, config())


def test_the_label_key_is_required(chatml):
    with pytest.raises(DataError, match="no key 'good'; found: input, output, label; set --label_key"):
        UnpairedPreferenceDataset(ROWS, chatml, config(label_key="good"))


def test_a_mismatched_row_is_one_prompt_with_the_answer_of_another(chatml):
    data = UnpairedPreferenceDataset(ROWS, chatml, config())
    row = data.mismatched(0, 1)
    assert text(chatml, row) == "User: 12 + 30?\nAssistant: 72 clips.<|im_end|>"
    assert trained_text(chatml, row) == "72 clips.<|im_end|>"
    assert data.mismatched(2, 2).token_ids == data[2].token_ids
    pairs = [(prompt, answer) for prompt in range(3) for answer in range(3)]
    assert [data.mismatched_length(*pair) for pair in pairs] == [
        len(data.mismatched(*pair).token_ids) for pair in pairs
    ]


def test_a_mismatched_row_is_cut_at_max_len(chatml):
    rows = [{"input": "x " * 20, "output": "a", "label": 1}, {"input": "y", "output": "1 " * 20, "label": 0}]
    data = UnpairedPreferenceDataset(rows, chatml, config(max_len=60, input_template=None))
    row = data.mismatched(0, 1)
    assert len(row.token_ids) == data.mismatched_length(0, 1) == 60 and any(row.loss_mask) and not row.loss_mask[0]


def test_a_batch_holds_the_labels_and_no_rows_are_a_dummy(chatml):
    data = UnpairedPreferenceDataset(ROWS, chatml, config())
    batch = data.collate([data[0], data[1]])
    assert batch.desirable.tolist() == [True, False]
    assert batch.loss_mask.sum(1).tolist() == [sum(data[0].loss_mask), sum(data[1].loss_mask)]
    assert not data.collate([]).loss_mask.any() and data.collate([]).desirable.tolist() == [False]


def test_the_preview_shows_label_and_answer(chatml):
    data = UnpairedPreferenceDataset(ROWS, chatml, config(input_template=None))
    assert data.preview(0) == ["desirable   12 + 30?«It is 42.<|im_end|>»"]
    assert data.preview(1) == ["undesirable And in May?«72 clips.<|im_end|>»"]
