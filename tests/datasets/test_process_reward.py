"""Answers in steps with a label each."""

import pytest
import torch

from openrlhf.config.supervised import ProcessDataConfig
from openrlhf.datasets.process_reward import ProcessRewardDataset
from openrlhf.errors import DataError, UsageError

ROW = {"input": "1 + 1 = 2 * 2 + 2 = 5 *", "label": ["+", "-"]}
SOFT = ROW | {"label": [0.75, 0.25]}


def config(**options):
    basic = {"dataset": "d", "placeholder_token": "*", "reward_tokens": ("+", "-"), "max_len": 64}
    return ProcessDataConfig(**(basic | options))


def marked(tokenizer, batch, row=0):
    """Return the token that each marked place stands on, and its label."""
    places = batch.loss_mask[row].nonzero().squeeze(1)
    return tokenizer.convert_ids_to_tokens(batch.sequences[row][places]), batch.labels[row][places].tolist()


def one_id(tokenizer, text):
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return token


def test_the_labels_stand_where_the_token_after_a_placeholder_is_predicted(chatml):
    data = ProcessRewardDataset([ROW], chatml, config())
    batch = data.collate([data[0]])
    assert marked(chatml, batch) == (["*", "*"], [one_id(chatml, "+"), one_id(chatml, "-")])
    assert batch.labels.dtype == torch.int64
    assert data[0].token_ids[-1] == chatml.eos_token_id, "the last placeholder has a token after it"
    assert data.reward_ids == [one_id(chatml, "+"), one_id(chatml, "-")]


@pytest.mark.parametrize("label", [[0.75, 0.25], [True, False], [1, 0]])
def test_numbers_are_probabilities_of_the_first_reward_token(chatml, label):
    data = ProcessRewardDataset([ROW | {"label": label}], chatml, config())
    batch = data.collate([data[0]])
    assert batch.labels.dtype == torch.float32 and marked(chatml, batch)[1] == [float(value) for value in label]


def test_rows_of_other_length_are_padded_and_no_rows_are_a_dummy(chatml):
    data = ProcessRewardDataset([ROW, {"input": "3 *", "label": ["-"]}], chatml, config())
    batch = data.collate([data[0], data[1]])
    assert batch.loss_mask.sum(1).tolist() == [2, 1]
    assert marked(chatml, batch, 1) == (["*"], [one_id(chatml, "-")])
    dummy = data.collate([])
    assert not dummy.loss_mask.any() and dummy.labels.dtype == torch.int64


def test_steps_beyond_max_len_lose_their_labels(chatml):
    whole = ProcessRewardDataset([ROW], chatml, config())[0]
    data = ProcessRewardDataset([ROW], chatml, config(max_len=whole.places[1]))
    assert (len(data[0].token_ids), data[0].places, data.truncated) == (whole.places[1], whole.places[:1], 1)
    exact = ProcessRewardDataset([ROW], chatml, config(max_len=len(whole.token_ids)))
    assert exact[0] == whole and exact.truncated == 0


def test_rows_that_cannot_be_used_are_dropped_and_counted(chatml):
    rows = [
        ROW,
        {"input": "nothing", "label": []},
        {"input": "1 " * 70 + "*", "label": ["+"]},
    ]
    data = ProcessRewardDataset(rows, chatml, config())
    assert len(data) == 1
    assert data.dropped == {
        "no placeholder": 1,
        "no placeholder within --max_len 64": 1,
    }


def test_long_rows_are_refused_where_that_is_asked(chatml):
    rows = [{"input": "1 " * 70 + "*", "label": ["+"]}]
    with pytest.raises(DataError, match="row 0 has .* tokens, more than --max_len 64"):
        ProcessRewardDataset(rows, chatml, config(too_long="error"))


def test_without_reward_tokens_a_label_is_any_token(chatml):
    data = ProcessRewardDataset([ROW | {"label": ["a", "b"]}], chatml, config(reward_tokens=None))
    assert data[0].labels == [one_id(chatml, "a"), one_id(chatml, "b")] and data.reward_ids is None


@pytest.mark.parametrize(
    ("row", "options", "error", "says"),
    [
        (ROW, {"placeholder_token": "ab ab"}, UsageError, "--placeholder_token: 'ab ab' is . tokens"),
        (ROW, {"reward_tokens": ("+", "no way")}, UsageError, "--reward_tokens: 'no way' is . tokens"),
        (ROW | {"label": ["+", "no way"]}, {}, DataError, r"row 0: 'label' \(--label_key\): 'no way' is . tokens"),
        (ROW | {"label": ["+", "x"]}, {}, DataError, "the label 'x' is not one of --reward_tokens"),
        (ROW | {"label": "+"}, {}, DataError, r"row 0: 'label' \(--label_key\) is a list .*found str"),
        (ROW | {"label": [0.5, 1.5]}, {}, DataError, "a number from 0 to 1; found 1.5"),
        (ROW | {"label": [0.5, "+"]}, {}, DataError, "true or false, or a number from 0 to 1; found '\\+'"),
        (ROW | {"label": ["+"]}, {}, DataError, "row 0: 1 labels and 2 placeholders; give one label a step"),
        (ROW | {"label": ["+"] * 3}, {}, DataError, "row 0: 3 labels and 2 placeholders"),
        (ROW | {"label": []}, {}, DataError, "row 0: 0 labels and 2 placeholders"),
        (SOFT, {"reward_tokens": None}, UsageError, "name two --reward_tokens"),
        (SOFT, {"reward_tokens": ("+", "-", "0")}, UsageError, "name two --reward_tokens"),
    ],
)
def test_what_is_wrong_is_named(chatml, row, options, error, says):
    with pytest.raises(error, match=says):
        ProcessRewardDataset([row], chatml, config(**options))


def test_two_kinds_of_labels_are_refused(chatml):
    with pytest.raises(DataError, match="row 1: .* some rows have tokens for labels and some have numbers"):
        ProcessRewardDataset([ROW, SOFT], chatml, config())


def test_a_placeholder_that_is_a_special_token_counts_in_conversations_too(chatml):
    turns = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2<|pad|> 3<|pad|>"}]
    cfg = config(placeholder_token="<|pad|>", apply_chat_template=True)
    data = ProcessRewardDataset([ROW | {"input": turns}], chatml, cfg)
    batch = data.collate([data[0]])
    assert marked(chatml, batch)[0] == ["<|pad|>", "<|pad|>"]
    assert chatml.decode(data[0].token_ids).endswith("3<|pad|><|im_end|>")


def test_a_template_is_filled_with_the_text(chatml):
    data = ProcessRewardDataset([ROW], chatml, config(input_template="Q: {}\n"))
    assert chatml.decode(data[0].token_ids) == f"Q: {ROW['input']}\n<|im_end|>"


STEPS = {"prompt": "1 + 1 + 2?", "completions": ["1 + 1 = 2", "2 + 2 = 5"], "labels": [True, False]}
KEYS = {"input_key": "prompt", "steps_key": "completions", "label_key": "labels"}


def test_steps_in_a_list_are_each_closed_with_the_placeholder(chatml):
    data = ProcessRewardDataset([STEPS], chatml, config(**KEYS))
    assert data.preview(0) == ["1 + 1 + 2?\\n1 + 1 = 2 «*»\\n2 + 2 = 5 «*»<|im_end|>", "labels: 1.0 0.0"]
    data = ProcessRewardDataset([STEPS], chatml, config(**KEYS, input_template="Q: {}"))
    assert chatml.decode(data[0].token_ids).startswith("Q: 1 + 1 + 2?\n1 + 1 = 2 *")


def test_steps_in_a_list_are_the_answer_of_a_conversation(chatml):
    data = ProcessRewardDataset([STEPS], chatml, config(**KEYS, apply_chat_template=True))
    text = "<|im_start|>user\n1 + 1 + 2?<|im_end|>\n<|im_start|>assistant\n1 + 1 = 2 *\n2 + 2 = 5 *<|im_end|>"
    assert chatml.decode(data[0].token_ids) == text
    assert marked(chatml, data.collate([data[0]])) == (["*", "*"], [1.0, 0.0])


@pytest.fixture(scope="module")
def merging():
    """A byte-level tokenizer to which ``*``, `` *``, and both with a line break behind them are four tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("Ġ", "*"), ("Ġ*", "Ċ"), ("*", "Ċ"), ("*", "*"), ("Ġ*", "*")]
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")


def shown(tokenizer, rows, **options):
    data = ProcessRewardDataset(rows, tokenizer, config(**options))
    assert not data.dropped
    return [data.preview(number)[0] for number in range(len(data))]


def test_a_placeholder_behind_a_space_is_found_although_it_is_another_token(merging):
    rows = [{"input": f"1 {end}= 2{end}2 + 2 = 5 *", "label": ["+", "-", "-"]} for end in (" *", " *\n")]
    assert shown(merging, rows) == ["1 « *»= 2« *»2 + 2 = 5« *»<|end|>", "1 « *\\n»= 2« *\\n»2 + 2 = 5« *»<|end|>"]
    bare = [{"input": "2 * 3 = 6.*\nOr 7*", "label": ["+", "-"]}]
    assert shown(merging, bare) == ["2 * 3 = 6.«*\\n»Or 7«*»<|end|>"]


def test_steps_in_a_list_end_where_they_end_whatever_else_they_hold(merging):
    row = STEPS | {"completions": ["2 * 3 = 6", "2*3 = 7 ", ""], "labels": [True, False, True]}
    lines = "1 + 1 + 2?\\n2 * 3 = 6« *»\\n2*3 = 7 « *»\\n« *»<|end|>"
    assert shown(merging, [row], **KEYS) == [lines]


def test_one_token_is_the_placeholder_in_all_rows(merging):
    rows = [{"input": "1 + 1 = 2 *", "label": ["+"]}, {"input": "2*3 = 6 *", "label": ["+"]}]
    assert shown(merging, rows) == ["1 + 1 = 2« *»<|end|>", "2*3 = 6« *»<|end|>"]
    rows = [{"input": "1 + 1 = 2*", "label": ["+"]}, {"input": "6 *", "label": ["+"]}]
    with pytest.raises(DataError, match="row 1: 1 labels and 0 placeholders"):
        shown(merging, rows)


def test_a_placeholder_that_is_not_found_says_what_was_looked_for_and_what_is_there(merging):
    says = (
        r"row 0: 1 labels and 0 placeholders.*looked for the token '\*'.* or ' \*'.*has '\*' 2 times, first as '\*\*'"
    )
    with pytest.raises(DataError, match=says):
        shown(merging, [{"input": "1 + 1 = 2**", "label": ["+"]}])
    with pytest.raises(DataError, match="1 labels and 0 placeholders.*; not in the text"):
        shown(merging, [{"input": "1 + 1 = 2", "label": ["+"]}])


def test_a_chat_template_that_hides_steps_is_refused_with_the_row(merging):
    merging.chat_template = (
        "{{ messages[0]['content'] }}{% if messages[1] %}: {{ messages[1]['content'][:9] }}{% endif %}"
    )
    with pytest.raises(DataError, match="row 0: the chat template shows 0 of 2 steps"):
        shown(merging, [STEPS], **KEYS, apply_chat_template=True)


def test_the_preview_marks_the_ends_of_steps_and_names_their_labels(chatml):
    data = ProcessRewardDataset([ROW], chatml, config())
    assert data.preview(0) == ["1 + 1 = 2 «*» 2 + 2 = 5 «*»<|im_end|>", "labels: + -"]
    assert ProcessRewardDataset([SOFT], chatml, config()).preview(0)[1] == "labels: 0.75 0.25"
