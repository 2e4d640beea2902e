"""Answers to be rated: what a reward model reads, and what stands in the file behind."""

from __future__ import annotations

import pytest

from openrlhf.config.inference import InferenceDataConfig
from openrlhf.datasets.answers import AnswerDataset
from openrlhf.errors import DataError

CHAT = [{"role": "user", "content": "12 + 30?"}, {"role": "assistant", "content": "42"}]


def answers(tokenizer, rows, **options):
    return AnswerDataset(rows, tokenizer, InferenceDataConfig(**options))


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_and_answer_are_one_text_closed_by_one_end_token(chatml):
    rows = [{"input": "A", "output": " b"}, {"input": "A", "output": " b<|im_end|>"}]
    first, second = answers(chatml, rows, input_template="Q: {}\n")
    expected = (*ids_of(chatml, "Q: A\n b"), chatml.eos_token_id)
    assert first.token_ids == second.token_ids == expected
    assert (first.uid, first.prompt, first.answer) == ("0", "Q: A\n", " b")
    assert second.answer == " b<|im_end|>"


def test_empty_answers_and_prompts_are_kept_as_they_are(chatml):
    rows = [{"input": "A", "output": ""}, {"input": "", "output": "b\n"}, {"input": None, "output": None}]
    found = list(answers(chatml, rows))
    assert [(answer.prompt, answer.answer) for answer in found] == [("A", ""), ("", "b\n"), ("", "")]
    assert [len(answer.token_ids) for answer in found] == [2, 2, 1]
    assert all(answer.token_ids[-1] == chatml.eos_token_id for answer in found)


@pytest.mark.parametrize(("policy", "uids"), [("cut", ["0", "1"]), ("drop", ["1"]), ("error", None)])
def test_what_is_too_long_is_cut_before_its_end_token_dropped_or_refused(chatml, policy, uids):
    rows = [{"input": "1 2 3 4", "output": " 5 6 7"}, {"input": "1", "output": "2"}]
    if uids is None:
        with pytest.raises(DataError, match="row 0 has .* tokens, more than --max_len 5"):
            answers(chatml, rows, max_len=5, too_long=policy)
        return
    found = answers(chatml, rows, max_len=5, too_long=policy)
    assert [answer.uid for answer in found] == uids
    if policy == "cut":
        assert found[0].token_ids == (*ids_of(chatml, "1 2 3 4 5 6 7")[:4], chatml.eos_token_id)
        assert found[0].answer == " 5 6 7" and found.truncated == 1


@pytest.mark.parametrize(
    "row", [{"input": CHAT, "output": "x"}, {"input": "12 + 30?", "output": "42"}, {"input": CHAT[:1], "output": CHAT}]
)
def test_a_chat_template_renders_both_sides(chatml, row):
    own_answer = row["output"] == "x"
    options = {"output_key": ""} if own_answer else {}
    found = answers(chatml, [row], apply_chat_template=True, **options)[0]
    assert found.prompt == "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    assert found.answer == "42<|im_end|>"
    assert found.token_ids == tuple(ids_of(chatml, found.prompt + found.answer))


def test_text_without_a_column_of_answers_names_the_flag(chatml):
    with pytest.raises(DataError, match="'input' is no list of messages.*--output_key"):
        answers(chatml, [{"input": "text"}], output_key="", apply_chat_template=True)


def test_a_missing_column_names_the_flag(chatml):
    with pytest.raises(DataError, match="no key 'output'; found: input; set --output_key"):
        answers(chatml, [{"input": "text"}])
