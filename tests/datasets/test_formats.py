"""TRL's standard formats are read without key flags, and key flags win over them."""

from __future__ import annotations

import json

import pytest

from openrlhf.config.groups import PreferenceDataConfig, SFTDataConfig
from openrlhf.config.ppo import PromptDataConfig
from openrlhf.config.supervised import KDDataConfig, ProcessDataConfig, UnpairedDataConfig
from openrlhf.datasets.blending import load_mixture, load_train_eval, recognised
from openrlhf.datasets.formats import (
    DEMONSTRATIONS,
    PAIRS,
    PROMPTS,
    STEP_END,
    STEPWISE,
    UNPAIRED,
    recognise,
    shared_prompt,
    stepwise_text,
    with_standard_keys,
)
from openrlhf.datasets.prompts import PromptDataset
from openrlhf.datasets.reward import PreferenceDataset
from openrlhf.datasets.sft import SFTDataset
from openrlhf.errors import DataError, UsageError
from tests.datasets.conftest import trained_text

USER, BOT = {"role": "user", "content": "12 + 30?"}, {"role": "assistant", "content": "It is 42."}
WRONG = {"role": "assistant", "content": "It is 72."}


def keys_of(cfg, formats, row):
    changed, words = with_standard_keys(cfg, formats, [("row 0", row)])
    return {name: getattr(changed, name) for name in vars(cfg) if name.endswith("_key")}, words


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [USER, BOT]}, "--input_key messages --apply_chat_template"),
        ({"prompt": "a", "completion": "b"}, "--input_key prompt --output_key completion"),
        (
            {"prompt": [USER], "completion": [BOT]},
            "--input_key prompt --output_key completion --apply_chat_template",
        ),
        ({"messages": [USER, BOT], "prompt": "a", "prompt_id": "7"}, "--input_key messages --apply_chat_template"),
        ({"input": "a", "messages": [USER, BOT]}, ""),
        ({"input": "a", "prompt": "a", "completion": "b"}, ""),
        ({"question": "a", "answer": "b"}, ""),
        ({"prompt": "a"}, ""),
        ({}, ""),
    ],
)
def test_demonstrations(row, words):
    assert keys_of(SFTDataConfig(dataset="d"), DEMONSTRATIONS, row)[1] == words


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"input_key": "question"}, ""),
        ({"output_key": "prompt"}, ""),
        ({"input_key": "prompt"}, "--output_key completion"),
        ({"output_key": "completion"}, "--input_key prompt"),
        ({"pretrain_mode": True}, "--input_key text"),
        ({"pretrain_mode": True, "input_key": "prompt"}, ""),
    ],
)
def test_a_key_flag_that_is_set_wins(flags, words):
    row = {"prompt": "a", "completion": "b", "text": "a b"}
    assert keys_of(SFTDataConfig(dataset="d", **flags), DEMONSTRATIONS, row)[1] == words


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--prompt_key prompt"),
        (
            {"prompt": [USER], "chosen": [BOT], "rejected": [WRONG]},
            "--prompt_key prompt --apply_chat_template",
        ),
        ({"chosen": [USER, BOT], "rejected": [USER, WRONG]}, "--apply_chat_template"),
        (
            {"prompt": "12 + 30?", "chosen": [USER, BOT], "rejected": [USER, WRONG]},
            "--apply_chat_template",
        ),
        ({"chosen": "a b", "rejected": "a c"}, ""),
        ({"prompt": "a", "chosen": "a b", "rejected": "a c"}, ""),
        ({"prompt": "a", "chosen": "a b", "rejected": "c"}, "--prompt_key prompt"),
        ({"prompt": "a", "good": "b", "bad": "c"}, ""),
    ],
)  # fmt: skip
def test_pairs(row, words):
    assert keys_of(PreferenceDataConfig(dataset="d"), PAIRS, row)[1] == words


def test_pairs_whose_keys_are_given_are_read_as_they_say():
    row = {"prompt": [USER], "chosen": [BOT], "rejected": [WRONG], "better": [BOT]}
    assert keys_of(PreferenceDataConfig(dataset="d", chosen_key="better"), PAIRS, row)[1] == ""
    cfg = PreferenceDataConfig(dataset="d", prompt_key="better")
    assert with_standard_keys(cfg, PAIRS, [("row 0", row)]) == (cfg, "")


def test_unpaired_answers_and_solutions_in_steps():
    row = {"prompt": "a", "completion": "b", "label": True}
    keys, _ = keys_of(UnpairedDataConfig(), UNPAIRED, row)
    assert (row[keys["input_key"]], row[keys["output_key"]], row[keys["label_key"]]) == ("a", "b", True)
    assert keys_of(UnpairedDataConfig(label_key="score"), UNPAIRED, row)[1] == ""
    talk = {"prompt": [USER], "completion": [BOT], "label": False}
    assert "--apply_chat_template" in keys_of(UnpairedDataConfig(), UNPAIRED, talk)[1]
    steps = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}
    keys, words = keys_of(ProcessDataConfig(), STEPWISE, steps)
    assert words == "--input_key prompt --steps_key completions --label_key labels"
    assert (steps[keys["steps_key"]], steps[keys["label_key"]]) == (["b", "c"], [True, False])
    assert recognise(ProcessDataConfig(), STEPWISE, {**steps, "input": "x"}) == {}


def test_steps_and_labels_come_through_a_file_as_lists(write_lines):
    steps = {"prompt": "a", "completions": ["b", "c"], "labels": [True, False], "more": 1}
    required = {"prompt": "--input_key", "completions": "--steps_key", "labels": "--label_key"}
    path = write_lines("a.jsonl", [steps] * 2)
    data = load_mixture(
        str(path), None, split="train", max_samples=9, seed=0, stopping="first_exhausted", required=required
    )
    assert data[0] == {"prompt": "a", "completions": ["b", "c"], "labels": [True, False]}


def test_a_format_may_take_the_default_of_a_key_away():
    talk = {"messages": [USER, BOT]}
    keys, words = keys_of(KDDataConfig(), DEMONSTRATIONS, talk)
    assert (keys["output_key"], words) == (None, "--input_key messages --apply_chat_template")
    assert keys_of(KDDataConfig(), DEMONSTRATIONS, talk | {"output": "x"})[1] == ""


def test_a_solution_in_steps_becomes_a_text_with_a_mark_a_step():
    assert stepwise_text(["2 + 3", "= 5"], [True, True], "row 0") == f"2 + 3 {STEP_END}\n= 5 {STEP_END}"


@pytest.mark.parametrize(
    ("steps", "labels", "message"),
    [
        (["a", "b", "c"], [True, False], "row 7: 3 steps and 2 labels"),
        (["a"], None, "row 7: 1 steps and NoneType labels"),
        ("a", [True], "row 7: the steps of a solution are a list of texts; found str"),
        (["a", 3], [True, False], "row 7: the steps of a solution"),
    ],
)
def test_steps_and_labels_that_do_not_fit_name_the_row(steps, labels, message):
    with pytest.raises(DataError, match=message):
        stepwise_text(steps, labels, "row 7")


def test_two_conversations_share_what_stands_before_their_first_different_answer():
    system, thanks = {"role": "system", "content": "s"}, {"role": "user", "content": "Thanks"}
    assert shared_prompt([USER, BOT], [USER, WRONG]) == 1
    assert shared_prompt([system, USER, BOT], [system, USER, WRONG]) == 2
    assert shared_prompt([USER, BOT, thanks, BOT], [USER, WRONG, thanks, BOT]) == 1
    assert shared_prompt([USER, BOT, USER, BOT], [USER, BOT, thanks, BOT]) == 1
    assert shared_prompt([USER, BOT, USER, BOT], [USER, BOT]) == 1
    assert shared_prompt([USER, BOT], [USER, BOT]) == 1
    assert shared_prompt([BOT], [WRONG]) == 0


def read(write_lines, rows, dataset, cfg_class, tokenizer, **flags):
    path = write_lines("data.jsonl", rows)
    cfg = cfg_class(dataset=str(path), max_len=256, **flags)
    cfg = recognised(cfg, dataset.FORMATS, cfg.dataset, cfg.train_split)
    return dataset(load_train_eval(cfg, 0, "first_exhausted")[0], tokenizer, cfg)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, BOT]},
        {"prompt": [USER], "completion": [BOT]},
    ],
)
def test_messages_are_read_through_the_chat_template(write_lines, chatml, caplog, row):
    data = read(write_lines, [row] * 2, SFTDataset, SFTDataConfig, chatml)
    assert data[0].text == "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\nIt is 42.<|im_end|>"
    assert trained_text(chatml, data[0]) == "It is 42.<|im_end|>"
    assert "its columns say what they hold, read with --input_key" in caplog.text


def test_texts_are_read_as_with_the_key_flags(write_lines, chatml):
    rows = [{"prompt": "12 + 30?", "completion": "It is 42."}] * 2
    data = read(write_lines, rows, SFTDataset, SFTDataConfig, chatml)
    given = read(write_lines, rows, SFTDataset, SFTDataConfig, chatml, input_key="prompt", output_key="completion")
    assert data[0] == given[0]
    raw = read(write_lines, [{"text": "12"}] * 2, SFTDataset, SFTDataConfig, chatml, pretrain_mode=True)
    assert raw[0].text == "12" and all(raw[0].loss_mask)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [BOT], "rejected": [WRONG]},
        {"chosen": [USER, BOT], "rejected": [USER, WRONG]},
        {"prompt": "12 + 30?", "chosen": [USER, BOT], "rejected": [USER, WRONG]},
    ],
)
def test_explicit_and_implicit_prompts_give_the_same_pair(write_lines, chatml, row):
    data = read(write_lines, [row] * 2, PreferenceDataset, PreferenceDataConfig, chatml)
    start = "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    pair = data[0]
    assert chatml.decode(pair.chosen) == start + "It is 42.<|im_end|>"
    assert chatml.decode(pair.rejected) == start + "It is 72.<|im_end|>"
    prompt = len(chatml(start, add_special_tokens=False)["input_ids"])
    assert (pair.chosen_prompt, pair.rejected_prompt) == (prompt, prompt)


def test_conversations_that_part_early_are_answers_from_there_on(write_lines, chatml):
    more = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]
    row = {"chosen": [USER, BOT, *more], "rejected": [USER, WRONG, *more]}
    pair = read(write_lines, [row] * 2, PreferenceDataset, PreferenceDataConfig, chatml)[0]
    assert pair.chosen_prompt == pair.rejected_prompt
    rest = "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"
    assert chatml.decode(pair.chosen[pair.chosen_prompt :]) == "It is 42." + rest
    assert chatml.decode(pair.rejected[pair.rejected_prompt :]) == "It is 72." + rest


def test_prompts_for_generation_are_found_too(write_lines, chatml):
    path = write_lines("p.jsonl", [{"prompt": [USER]}])
    cfg = recognised(PromptDataConfig(prompt_data=str(path)), PROMPTS, str(path), "train", "--prompt_data")
    (prompt,) = PromptDataset([{"prompt": [USER]}], chatml, cfg, 64)
    assert prompt.text == "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a.json", "folder", "saved"])
def test_columns_are_found_in_every_kind_of_source(tmp_path, name):
    import datasets

    table = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 3)
    path = tmp_path / name
    if name == "a.csv":
        table.to_csv(path)
    elif name == "a.parquet":
        table.to_parquet(path)
    elif name == "a.json":
        path.write_text(json.dumps(table.to_list()))
    elif name == "folder":
        path.mkdir()
        table.to_json(path / "train.jsonl")
    else:
        table.save_to_disk(path)
    cfg = recognised(SFTDataConfig(dataset=f"{path},{path}"), DEMONSTRATIONS, f"{path},{path}", "train")
    assert (cfg.input_key, cfg.output_key) == ("prompt", "completion")


def test_text_without_an_answer_is_an_error_that_names_the_flags(write_lines, chatml):
    with pytest.raises(UsageError, match="--output_key is missing: name the column of the answer"):
        read(write_lines, [{"input": "a", "output": "b"}], SFTDataset, SFTDataConfig, chatml)


EXPLICIT = {"prompt": "Hi", "chosen": "b", "rejected": "c"}
TALK = {"prompt": [USER], "chosen": [BOT], "rejected": [WRONG]}


@pytest.mark.parametrize("odd", [0, 20, 39])
@pytest.mark.parametrize(
    ("usual", "other", "read"),
    [
        (EXPLICIT, {"prompt": "Hi", "chosen": "Hi b", "rejected": "Hi c"}, "with --prompt_key prompt"),
        (TALK, TALK | {"chosen": [USER, BOT], "rejected": [USER, WRONG]}, "with --apply_chat_template"),
    ],
)
def test_rows_of_two_formats_are_an_error_that_names_one_of_each(write_lines, odd, usual, other, read):
    rows = [usual] * 40
    rows[odd] = other
    path = write_lines("a.jsonl", rows)
    cfg = PreferenceDataConfig(dataset=str(path))
    second = odd + 1 if odd else 5
    with pytest.raises(DataError, match=rf"a\.jsonl:1 is to be read .*a\.jsonl:{second} ") as caught:
        recognised(cfg, PAIRS, str(path), "train")
    assert read in str(caught.value) and "make them alike" in str(caught.value)


def test_a_first_row_without_a_prompt_does_not_take_the_prompts_of_the_others_away(write_lines):
    path = write_lines("a.jsonl", [{"chosen": "b", "rejected": "c"}, EXPLICIT])
    with pytest.raises(
        DataError, match=r"a\.jsonl:1 is to be read as the flags say, but .*:2 with --prompt_key prompt"
    ):
        recognised(PreferenceDataConfig(dataset=str(path)), PAIRS, str(path), "train")


@pytest.mark.parametrize("other", [{"chosen": "b", "rejected": "c"}, TALK, {"messages": [USER, BOT]}])
def test_columns_that_are_missing_or_of_another_type_are_left_to_the_loader(write_lines, other):
    path = write_lines("a.jsonl", [EXPLICIT, other])
    cfg = recognised(PreferenceDataConfig(dataset=str(path)), PAIRS, str(path), "train")
    with pytest.raises(DataError, match=r"a\.jsonl:2: (no key 'prompt'|'\w+' is a list here and a str in)"):
        load_train_eval(cfg, 0, "first_exhausted")


def test_the_sources_of_a_mixture_have_one_format(write_lines, tmp_path):
    import datasets

    path = write_lines("a.jsonl", [EXPLICIT])
    held = EXPLICIT | {"chosen": "Hi b", "rejected": "Hi c"}
    datasets.Dataset.from_list([held] * 30).to_parquet(tmp_path / "b.parquet")
    spec = f"{path},{tmp_path / 'b.parquet'}"
    with pytest.raises(
        DataError, match=r"a\.jsonl:1 is to be read .*, but --dataset .*b\.parquet: row 0 as the flags"
    ):
        recognised(PreferenceDataConfig(dataset=spec), PAIRS, spec, "train")


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (EXPLICIT | {"prompt": None}, "--prompt_key prompt"),
        (EXPLICIT | {"prompt": " "}, "--prompt_key prompt"),
        ({"chosen": None}, "--prompt_key prompt"),
    ],
)
def test_rows_with_a_blank_column_do_not_say_what_the_others_are(odd, words):
    for rows in ([odd, EXPLICIT], [EXPLICIT, odd]):
        pairs = [(f"row {number}", row) for number, row in enumerate(rows)]
        assert with_standard_keys(PreferenceDataConfig(dataset="d"), PAIRS, pairs)[1] == words
    talks = [{"messages": []}, {"messages": [USER, BOT]}]
    pairs = [(f"row {number}", row) for number, row in enumerate(talks)]
    assert "--apply_chat_template" in with_standard_keys(SFTDataConfig(dataset="d"), DEMONSTRATIONS, pairs)[1]


@pytest.mark.parametrize("content", ["", "\n", "[]", "[1]\n", "7\n"])
def test_a_file_without_rows_changes_no_keys(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    cfg = SFTDataConfig(dataset=str(tmp_path / "a.json"))
    assert recognised(cfg, DEMONSTRATIONS, cfg.dataset, "train") == cfg
