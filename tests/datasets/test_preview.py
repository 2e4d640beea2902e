"""What a person sees of the rows before a run."""

from __future__ import annotations

from openrlhf.config.groups import PreferenceDataConfig, SFTDataConfig
from openrlhf.config.ppo import PromptDataConfig
from openrlhf.datasets.preview import marked_text, sample_lines, shortened
from openrlhf.datasets.prompts import PromptDataset
from openrlhf.datasets.reward import PreferenceDataset
from openrlhf.datasets.sft import SFTDataset

PAIR = {"prompt": "12 + 30?", "chosen": "It is 42.", "rejected": "It is 72."}


def sft(tokenizer, rows, **options):
    return SFTDataset(rows, tokenizer, SFTDataConfig(dataset="d", output_key="output", max_len=200, **options))


def test_demonstrations_show_what_is_trained(chatml):
    data = sft(chatml, [{"input": f"{i} + 30?", "output": "42"} for i in range(9)], input_template="User: {}\nAI: ")
    assert sample_lines(data) == [
        "samples  3 of 9 rows as the model reads them, what is trained between « and »",
        r"       1 User: 0 + 30?\nAI: «42<|im_end|>»",
        r"       4 User: 3 + 30?\nAI: «42<|im_end|>»",
        r"       7 User: 6 + 30?\nAI: «42<|im_end|>»",
    ]


def test_pairs_show_both_answers(chatml):
    data = PreferenceDataset([PAIR], chatml, PreferenceDataConfig(dataset="d", prompt_key="prompt"))
    assert sample_lines(data) == [
        "samples  1 of 1 rows as the model reads them, the answer between « and »",
        "       1 chosen   12 + 30?«It is 42.<|im_end|>»",
        "         rejected 12 + 30?«It is 72.<|im_end|>»",
    ]


def test_prompts_show_what_the_policy_reads_and_the_label(chatml):
    config = PromptDataConfig(prompt_data="d", apply_chat_template=True)
    rows = [{"input": "Hi", "gold": 42}]
    start = r"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    labelled = sample_lines(PromptDataset(rows, chatml, config, 64, "gold"))
    assert labelled == ["samples  1 of 1 rows as the model reads them", f"       1 {start}", "         label: 42"]
    assert sample_lines(PromptDataset(rows, chatml, config, 64))[1:] == [f"       1 {start}"]


def test_every_turn_that_is_trained_is_marked(chatml):
    turns = [{"role": role, "content": word} for word in ("a", "b") for role in ("user", "assistant")]
    config = SFTDataConfig(dataset="d", apply_chat_template=True, multiturn=True)
    (line,) = SFTDataset([{"input": turns}], chatml, config).preview(0)
    assert line.count("«") == 2 and "«a<|im_end|>»" in line and line.endswith("«b<|im_end|>»")


def test_long_text_keeps_its_ends_and_one_line(chatml):
    assert shortened("a\tb\n\x00c") == r"a\tb\n\x00c"
    text = shortened("x" * 100 + "the end")
    assert len(text) < 90 and " ... " in text and text.endswith("the end")


def test_a_conversation_of_many_turns_is_cut_in_the_middle(chatml):
    ids = chatml("1 2 3 4 5 6 7 8 9 1 2 3", add_special_tokens=False)["input_ids"]
    text = marked_text(chatml, ids, [t % 2 == 0 for t in range(len(ids))])
    assert f" ... {len(ids) - 8} more ... " in text and text.startswith("«1»")
