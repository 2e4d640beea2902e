import pytest

from openrlhf.config.ppo import PromptDataConfig
from openrlhf.datasets.prompts import PromptDataset, preprocess_data
from openrlhf.errors import DataError, UsageError


def config(**options):
    return PromptDataConfig(**({"prompt_data": "d"} | options))


def test_prompts_carry_uid_text_tokens_label_and_source(chatml):
    rows = [{"input": "12 + 30?", "answer": 42}, {"input": "May?", "answer": "72", "datasource": "gsm8k"}]
    prompts = list(PromptDataset(rows, chatml, config(input_template="Q: {}\n"), 64, "answer"))
    assert [(p.uid, p.text, p.label, p.source) for p in prompts] == [
        ("0", "Q: 12 + 30?\n", "42", "default"),
        ("1", "Q: May?\n", "72", "gsm8k"),
    ]
    assert list(prompts[0].token_ids) == chatml("Q: 12 + 30?\n", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("value", ["Hi", [{"role": "user", "content": "Hi"}]])
def test_chat_prompts_end_with_the_generation_prompt(chatml, value):
    dataset = PromptDataset([{"input": value}], chatml, config(apply_chat_template=True), 64)
    assert dataset[0].text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert dataset[0].label == ""


def test_a_long_prompt_keeps_its_first_tokens_and_is_counted(chatml, caplog):
    dataset = PromptDataset([{"input": "1 2 3 4 5 6 7 8"}], chatml, config(), 4)
    assert list(dataset[0].token_ids) == chatml("1 2 3 4 5 6 7 8", add_special_tokens=False)["input_ids"][:4]
    assert "1 cut at --prompt_max_len 4" in caplog.text


def test_empty_prompts_are_dropped_and_the_others_keep_their_row_number(chatml):
    dataset = PromptDataset([{"input": " "}, {"input": None}, {"input": "a"}], chatml, config(), 8)
    assert ([prompt.uid for prompt in dataset], dataset.dropped) == (["2"], {"empty prompt": 2})


def test_equal_prompts_with_other_labels_stay_apart(chatml):
    prompts = list(PromptDataset([{"input": "a", "l": "1"}, {"input": "a", "l": "2"}], chatml, config(), 8, "l"))
    assert [(prompt.uid, prompt.label) for prompt in prompts] == [("0", "1"), ("1", "2")]


def test_a_missing_label_key_names_the_flag(chatml):
    with pytest.raises(DataError, match="no key 'gold'; found: input; set --label_key"):
        PromptDataset([{"input": "a"}], chatml, config(), 8, "gold")


def test_preprocess_data_keeps_the_public_signature(chatml):
    row = {"input": "Hi", "q": "Ho", "label": "x"}
    assert preprocess_data(row) == "Hi"
    assert preprocess_data(row, "Q: {}", "q") == "Q: Ho"
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert preprocess_data(row, None, "input", chatml.apply_chat_template) == rendered
    assert preprocess_data(row, "Q: {}", label_key="label") == ("Q: Hi", "x")


@pytest.mark.parametrize(
    ("policy", "uids"), [("cut", ["0", "1", "2", "3"]), ("drop", ["0", "2", "3"]), ("error", None)]
)
def test_one_long_prompt_of_four_is_cut_dropped_or_refused(chatml, policy, uids):
    rows = [{"input": text} for text in ("1 2", "1 2 3 4 5 6 7 8", "3", "4")]
    if uids is None:
        with pytest.raises(DataError, match="row 1 has 15 tokens, more than --prompt_max_len 6"):
            PromptDataset(rows, chatml, config(too_long=policy), 6)
        return
    dataset = PromptDataset(rows, chatml, config(too_long=policy), 6)
    assert [prompt.uid for prompt in dataset] == uids
    assert max(len(prompt.token_ids) for prompt in dataset) <= 6
    assert (dataset.truncated, sum(dataset.dropped.values())) == ((1, 0) if policy == "cut" else (0, 1))


def test_the_end_of_all_prompts_is_not_cut(chatml):
    rows = [{"input": "1 2 3 4 5 6 7 8"}, {"input": "1 2"}]
    long, short = PromptDataset(rows, chatml, config(), 6, end=" A")
    assert (long.text, short.text) == ("1 2 3 4 5 6 7 8 A", "1 2 A")
    whole, end = (chatml(text, add_special_tokens=False)["input_ids"] for text in ("1 2 3 4 5 6 7 8", " A"))
    assert list(long.token_ids) == whole[: 6 - len(end)] + end
    assert list(short.token_ids) == chatml("1 2 A", add_special_tokens=False)["input_ids"]
    with pytest.raises(UsageError, match="--prompt_max_len 1 has no room for a prompt before its end ' A'"):
        PromptDataset(rows, chatml, config(), 1, end=" A")
