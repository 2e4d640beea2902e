"""Tokenizers of two families, built on the spot."""

from __future__ import annotations

import json

import pytest

from tests.helpers import tiny_tokenizer

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml(tmp_path_factory):
    """A byte-level tokenizer with the ChatML template; eos is the end of a turn."""
    return tiny_tokenizer(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """A tokenizer with a Llama-3 template: bos in the template, and an eos that differs from the end of a turn."""
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("llama3"))
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>"]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": names[:3], "bos_token": names[3], "eos_token": names[4]}
    )
    tokenizer.chat_template = LLAMA3_TEMPLATE
    return tokenizer


@pytest.fixture
def write_lines(tmp_path):
    """Return a function that writes rows (or raw strings) as JSON lines and gives the path."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def trained_text(tokenizer, row):
    """Return the text of the tokens that a row trains."""
    kept = [token for token, trained in zip(row.token_ids[1:], row.loss_mask, strict=True) if trained]
    return tokenizer.decode(kept)
