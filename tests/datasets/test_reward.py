import pytest

from openrlhf.config.groups import PreferenceDataConfig
from openrlhf.datasets.reward import PreferenceDataset
from openrlhf.errors import DataError, UsageError

ROW = {"prompt": "12 + 30?", "chosen": "It is 42.", "rejected": "It is 72."}


def config(**options):
    return PreferenceDataConfig(**({"dataset": "d", "prompt_key": "prompt", "max_len": 128} | options))


def sides(tokenizer, dataset, index=0):
    return tokenizer.decode(dataset[index].chosen), tokenizer.decode(dataset[index].rejected)


def answers(tokenizer, batch):
    return [tokenizer.decode(row[1:][mask]) for row, mask in zip(batch.sequences, batch.loss_mask, strict=True)]


def test_plain_pairs_are_prompt_answer_and_one_eos(chatml):
    dataset = PreferenceDataset([ROW], chatml, config(input_template="Q: {}\n"))
    assert sides(chatml, dataset) == ("Q: 12 + 30?\nIt is 42.<|im_end|>", "Q: 12 + 30?\nIt is 72.<|im_end|>")


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        {
            "prompt": [{"role": "user", "content": "12 + 30?"}],
            "chosen": [{"role": "assistant", "content": "It is 42."}],
            "rejected": [{"role": "assistant", "content": "It is 72."}],
        },
    ],
)
def test_chat_pairs_take_text_and_message_lists_alike(chatml, row):
    dataset = PreferenceDataset([row], chatml, config(apply_chat_template=True))
    start = "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert sides(chatml, dataset) == (start + "It is 42.<|im_end|>", start + "It is 72.<|im_end|>")
    assert answers(chatml, dataset.collate([dataset[0]])) == ["It is 42.<|im_end|>", "It is 72.<|im_end|>"]


def test_whole_conversations_without_a_prompt_key_bring_their_own_prompt(chatml):
    conversation = [{"role": "user", "content": "12 + 30?"}]
    row = {name: [*conversation, {"role": "assistant", "content": ROW[name]}] for name in ("chosen", "rejected")}
    own = PreferenceDataset([row], chatml, config(prompt_key=None, apply_chat_template=True))
    given = PreferenceDataset([ROW], chatml, config(apply_chat_template=True))
    assert own[0] == given[0]


def test_plain_texts_without_a_prompt_key_begin_with_their_prompt(chatml):
    rows = [
        {"chosen": "Human: 12 + 30?\nAI: 42.", "rejected": "Human: 12 + 30?\nAI: 72."},
        {"chosen": "4", "rejected": "42"},
    ]
    dataset = PreferenceDataset(rows, chatml, config(prompt_key=None))
    assert sides(chatml, dataset)[0] == "Human: 12 + 30?\nAI: 42.<|im_end|>"
    expected = ["42.<|im_end|>", "<|im_end|>", "72.<|im_end|>", "2<|im_end|>"]
    assert answers(chatml, dataset.collate([dataset[0], dataset[1]])) == expected


def test_a_batch_holds_chosen_rows_then_rejected_rows_with_answers_masked(chatml):
    other = {"prompt": "a", "chosen": "b", "rejected": "c d e f", "margin": 2}
    dataset = PreferenceDataset([ROW | {"margin": None}, other], chatml, config())
    batch = dataset.collate([dataset[0], dataset[1]])
    expected = ["It is 42.", "b", "It is 72.", "c d e f"]
    assert answers(chatml, batch) == [text + "<|im_end|>" for text in expected]
    assert batch.margin.tolist() == [0.0, 2.0]
    assert batch.attention_mask[:, 0].all()
    assert dataset.lengths.tolist() == [len(row.chosen) + len(row.rejected) for row in (dataset[0], dataset[1])]


def test_both_sides_end_with_eos_after_truncation(chatml):
    row = {"prompt": "a", "chosen": "1 " * 50, "rejected": "2 " * 50}
    dataset = PreferenceDataset([row], chatml, config(max_len=16))
    pair = dataset[0]
    assert (len(pair.chosen), len(pair.rejected), dataset.truncated) == (16, 16, 1)
    assert (pair.chosen[-1], pair.rejected[-1]) == (chatml.eos_token_id, chatml.eos_token_id)


def test_pairs_without_a_difference_and_empty_answers_are_dropped_and_counted(chatml):
    rows = [
        ROW,
        ROW | {"rejected": ROW["chosen"]},
        {"prompt": "long " * 60, "chosen": "a", "rejected": "b"},
        {"prompt": "a", "chosen": "x " * 90 + "1", "rejected": "x " * 90 + "2"},
        ROW | {"chosen": "  "},
        ROW | {"rejected": None},
        ROW | {"prompt": None},
        ROW | {"prompt": " \n"},
    ]
    dataset = PreferenceDataset(rows, chatml, config(max_len=64))
    assert len(dataset) == 1
    assert dataset.dropped == {
        "chosen equals rejected": 1,
        "equal after the cut at --max_len 64": 2,
        "empty answer": 2,
        "empty prompt": 2,
    }


def test_no_pair_left_is_an_error(chatml):
    with pytest.raises(DataError, match="the data: no row can be used; 1 dropped .chosen equals rejected: 1"):
        PreferenceDataset([ROW | {"rejected": ROW["chosen"]}], chatml, config())


def test_text_answers_with_a_chat_template_need_a_prompt_key(chatml):
    with pytest.raises(UsageError, match="--prompt_key"):
        PreferenceDataset([ROW], chatml, config(prompt_key=None, apply_chat_template=True))


def test_a_missing_key_and_a_bad_margin_are_named(chatml):
    with pytest.raises(DataError, match="no key 'better'; found: prompt, chosen, rejected; set --chosen_key"):
        PreferenceDataset([ROW], chatml, config(chosen_key="better"))
    with pytest.raises(DataError, match="row 0: 'margin' is a number; found str"):
        PreferenceDataset([ROW | {"margin": "big"}], chatml, config())


def test_no_pairs_collate_to_a_pair_of_weight_zero(chatml):
    batch = PreferenceDataset([ROW], chatml, config()).collate([])
    assert batch.sequences.shape == (2, 2)
    assert batch.margin.shape == (1,)
    assert not batch.loss_mask.any()


@pytest.mark.parametrize(("policy", "kept"), [("cut", 3), ("drop", 2), ("error", 0)])
def test_a_pair_over_max_len_is_cut_dropped_or_refused(chatml, policy, kept):
    rows = [ROW, ROW | {"chosen": "1 " * 60}, ROW]
    if not kept:
        with pytest.raises(DataError, match="row 1 has .* tokens, more than --max_len 40"):
            PreferenceDataset(rows, chatml, config(max_len=40, too_long=policy))
        return
    dataset = PreferenceDataset(rows, chatml, config(max_len=40, too_long=policy))
    assert (len(dataset), sum(dataset.dropped.values()), dataset.truncated) == (kept, 3 - kept, kept - 2)


def test_pairs_that_differ_only_beyond_max_len_are_an_error_where_that_is_asked(chatml):
    row = {"prompt": "a", "chosen": "x " * 90 + "1", "rejected": "x " * 90 + "2"}
    with pytest.raises(DataError, match="row 0 has .* tokens, more than --max_len 64"):
        PreferenceDataset([row], chatml, config(max_len=64, too_long="error"))
