"""What ``--multiturn`` trains under five styles of chat template, token for token.

A rendering is written out whole, with what is trained between « and ». Every byte is a token, so that it says exactly
which tokens are meant.
"""

from __future__ import annotations

import re

import pytest

from openrlhf.config.groups import SFTDataConfig
from openrlhf.datasets.sft import SFTDataset
from openrlhf.errors import DataError

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
QWEN3 = (
    "{%- set ns = namespace(last_query_index=-1) %}"
    "{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last_query_index = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role != 'assistant' %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- else %}{%- set content = message.content %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last_query_index and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|User|>' + message['content'] }}"
    "{% else %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
)
STYLES = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>"]),
    "llama3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": (MISTRAL, "<s>", "</s>", []),
    "gemma": (GEMMA, "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"]),
    "qwen3": (QWEN3, None, "<|im_end|>", ["<|im_start|>"]),
    "deepseek": (DEEPSEEK_R1, "<|begin|>", "<|end|>", ["<|User|>", "<|Assistant|>"]),
}

TALK = [
    {"role": "user", "content": "12 + 30?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Half?"},
    {"role": "assistant", "content": "21, naïve 🙂"},
]
GOLDEN = {
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n«It is 42.<|im_end|>»\n"
    "<|im_start|>user\nHalf?<|im_end|>\n<|im_start|>assistant\n«21, naïve 🙂<|im_end|>»",
    "llama3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n12 + 30?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«It is 42.<|eot_id|>»"
    "<|start_header_id|>user<|end_header_id|>\n\nHalf?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n«21, naïve 🙂<|eot_id|>»",
    "mistral": "<s>[INST] 12 + 30? [/INST]« It is 42.</s>»[INST] Half? [/INST]« 21, naïve 🙂</s>»",
    "gemma": "<bos><start_of_turn>user\n12 + 30?<end_of_turn>\n<start_of_turn>model\n«It is 42.<end_of_turn>»\n"
    "<start_of_turn>user\nHalf?<end_of_turn>\n<start_of_turn>model\n«21, naïve 🙂<end_of_turn><eos>»",
}
THOUGHTS = [
    TALK[0],
    {"role": "assistant", "content": "<think>\n10 + 2 + 30\n</think>\n\nIt is 42."},
    TALK[2],
    {"role": "assistant", "content": "<think>\n42 / 2\n</think>\n\n21."},
]
FIRST_ANSWER = (
    "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n"
    "«<think>\n10 + 2 + 30\n</think>\n\nIt is 42.<|im_end|>»"
)
SECOND_ANSWER = (
    "<|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\nIt is 42.<|im_end|>\n"
    "<|im_start|>user\nHalf?<|im_end|>\n<|im_start|>assistant\n«<think>\n42 / 2\n</think>\n\n21.<|im_end|>»"
)


def byte_tokenizer(style):
    """Return a tokenizer with one token a byte, the special tokens of a style, and its template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    template, bos, eos, special = STYLES[style]
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"bos_token": bos} if bos else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|pad|>", **named)
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.chat_template = template
    return fast


def golden(tokenizer, text):
    """Return ``(token ids, whether each is trained)`` of a rendering with « and »."""
    ids, trained = [], []
    for number, part in enumerate(re.split("[«»]", text)):
        piece = tokenizer(part, add_special_tokens=False)["input_ids"] if part else []
        ids += piece
        trained += [number % 2 == 1] * len(piece)
    return ids, trained


def rows(tokenizer, messages, **options):
    cfg = SFTDataConfig(
        **({"dataset": "d", "max_len": 1000, "apply_chat_template": True, "multiturn": True} | options)
    )
    data = SFTDataset([{"input": messages}], tokenizer, cfg)
    return [(row.token_ids, [False, *row.loss_mask]) for row in map(data.__getitem__, range(len(data)))]


@pytest.mark.parametrize("style", GOLDEN)
def test_every_assistant_turn_is_trained_and_nothing_else(style):
    tokenizer = byte_tokenizer(style)
    assert rows(tokenizer, TALK) == [golden(tokenizer, GOLDEN[style])]


@pytest.mark.parametrize("style", GOLDEN)
def test_without_multiturn_the_last_turn_alone_is_trained(style):
    tokenizer = byte_tokenizer(style)
    before, _, last = GOLDEN[style].rpartition("«")
    text = re.sub("[«»]", "", before) + "«" + last
    assert rows(tokenizer, TALK, multiturn=False) == [golden(tokenizer, text)]


@pytest.mark.parametrize("style", GOLDEN)
def test_a_conversation_that_is_cut_trains_what_is_left_of_each_turn(style):
    tokenizer = byte_tokenizer(style)
    ids, trained = golden(tokenizer, GOLDEN[style])
    most = len(ids) - 9
    assert rows(tokenizer, TALK, max_len=most) == [(ids[:most], trained[:most])]


@pytest.mark.parametrize("style", ["chatml", "llama3", "qwen3"])
def test_a_system_message_and_a_turn_of_the_user_at_the_end_are_not_trained(style):
    tokenizer = byte_tokenizer(style)
    (row,) = rows(tokenizer, [{"role": "system", "content": "Short."}, *TALK[:2], TALK[2]])
    trained = [token for token, kept in zip(*row, strict=True) if kept]
    assert tokenizer.decode(trained).removeprefix("<think>\n\n</think>\n\n") == "It is 42." + tokenizer.eos_token
    assert "Half" not in tokenizer.decode(row[0]) and "Short." in tokenizer.decode(row[0])


def test_a_template_that_takes_earlier_thoughts_away_trains_each_turn_as_it_is_generated():
    tokenizer = byte_tokenizer("qwen3")
    assert rows(tokenizer, THOUGHTS) == [golden(tokenizer, FIRST_ANSWER), golden(tokenizer, SECOND_ANSWER)]
    assert rows(tokenizer, THOUGHTS, multiturn=False) == [golden(tokenizer, SECOND_ANSWER)]


def test_what_such_a_template_adds_by_itself_is_trained_because_it_is_generated():
    tokenizer = byte_tokenizer("qwen3")
    empty = "<think>\n\n</think>\n\n"
    expected = [
        FIRST_ANSWER.replace("<think>\n10 + 2 + 30\n</think>\n\n", empty),
        SECOND_ANSWER.replace("<think>\n42 / 2\n</think>\n\n", empty),
    ]
    plain = [*TALK[:3], {"role": "assistant", "content": "21."}]
    assert rows(tokenizer, plain) == [golden(tokenizer, text) for text in expected]


def test_a_template_that_takes_even_the_last_thought_away_is_refused_with_the_row():
    with pytest.raises(DataError, match="row 0: the chat template renders the prompt differently once the answer is"):
        rows(byte_tokenizer("deepseek"), THOUGHTS)


@pytest.mark.parametrize(("style", "role"), [("gemma", "system"), ("mistral", "system")])
def test_a_role_that_the_template_refuses_names_row_and_roles(style, role):
    with pytest.raises(DataError, match=f"row 0: the chat template refuses the roles {role}, user"):
        rows(byte_tokenizer(style), [{"role": role, "content": "Short."}, *TALK])


@pytest.mark.parametrize("style", GOLDEN)
def test_markers_of_turns_that_a_user_writes_train_nothing(style):
    tokenizer = byte_tokenizer(style)
    evil = "x" + tokenizer.eos_token + "".join(STYLES[style][3])
    clean, typed = (rows(tokenizer, [{"role": "user", "content": text}, *TALK[1:]])[0] for text in ("x", evil))
    special = set(tokenizer.all_special_ids)
    assert [i for i in typed[0] if i in special] == [i for i in clean[0] if i in special]
    texts = [[i for i, kept in zip(*row, strict=True) if kept] for row in (clean, typed)]
    assert texts[0] == texts[1]
