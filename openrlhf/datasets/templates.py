"""From a row to text and from text to tokens: plain templates and chat templates, each row rendered once.

A special token such as bos comes from the template's own text: tokenisation adds none, so none can be doubled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from openrlhf.errors import DataError, UsageError

GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Renderer:
    """Turns the fields of a row into text.

    Args:
        tokenizer: brings the chat template.
        input_template: python format with one ``{}`` for the prompt; None or ``""`` leaves the prompt as it is.
        apply_chat_template: use the tokenizer's chat template in place of ``input_template``.

    Raises:
        DataError: a chat template is asked for and the tokenizer has none.
    """

    def __init__(self, tokenizer: Any, input_template: str | None = None, apply_chat_template: bool = False):
        if apply_chat_template and not tokenizer.chat_template:
            raise DataError(
                f"--apply_chat_template: the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "give one with --tokenizer_chat_template, or leave the flag out and use --input_template"
            )
        self.tokenizer = tokenizer
        self.template = input_template
        self.chat = apply_chat_template
        self._special = tuple({str(token) for token in special_tokens(tokenizer).values()})

    def prompt(self, value: Any, where: str) -> str:
        """Return the text that a policy continues."""
        if self.chat:
            return self.conversation(as_messages(value, "user", where), where, generation_prompt=True)
        text = as_text(value, where)
        return fill_template(self.template, text) if self.template else text

    def pair(self, prompt: Any, response: Any, where: str) -> tuple[str, str]:
        """Return ``(prompt text, response text)``: the two halves of one rendering, trailing newlines removed.

        In a chat, strings become a user and an assistant message; lists are message lists.
        """
        if not self.chat:
            return self.prompt(prompt, where), as_text(response, where).rstrip("\n")
        context, answer = as_messages(prompt, "user", where), as_messages(response, "assistant", where)
        if context and answer[: len(context)] == context:
            answer = answer[len(context) :]
        before = self.conversation(context, where, generation_prompt=True) if context else ""
        whole = self.conversation(context + answer, where)
        if not whole.startswith(before):
            raise DataError(
                f"{where}: the chat template renders the prompt differently once the answer is there, so the answer "
                "cannot be told apart; give a template without that with --tokenizer_chat_template"
            )
        return before, whole[len(before) :].rstrip("\n")

    def turns(self, messages: list[dict], where: str) -> list[str] | None:
        """Return one rendering cut in ``[context, answer, context, answer, ...]``, an answer being an assistant turn
        with its end-of-turn token; None when the template rewrites earlier turns, so that no cut is right.
        """
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        whole = self.conversation(messages[: last + 1], where)
        pieces, done = [], 0
        for index in assistant_turns(messages):
            start = self.conversation(messages[:index], where, generation_prompt=True) if index else ""
            end = self.conversation(messages[: index + 1], where)
            if not (whole.startswith(start) and whole.startswith(end) and done <= len(start) <= len(end)):
                return None
            answer = self._without_tail(end[len(start) :])
            pieces += [whole[done : len(start)], answer]
            done = len(start) + len(answer)
        pieces[-1] = pieces[-1].rstrip("\n")
        return pieces

    def conversation(self, messages: list[dict], where: str, generation_prompt: bool = False) -> str:
        """Return the chat template's text of ``messages``."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation_prompt
            )
        except TemplateError as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"{where}: the chat template refuses the roles {roles}: {error}") from error

    def _without_tail(self, answer: str) -> str:
        """Drop the white space that a template puts between an end-of-turn token and the next turn."""
        stripped = answer.rstrip()
        return stripped if stripped.endswith(self._special) else answer


def fill_template(template: str, text: str) -> str:
    """Return ``template`` with ``text`` in place of its ``{}``."""
    try:
        return template.format(text)
    except (KeyError, IndexError, ValueError) as error:
        raise UsageError(f"--input_template {template!r}: needs one {{}} and no other braces ({error!r})") from error


def as_text(value: Any, where: str) -> str:
    """Return ``value`` when it is a string, ``""`` for None; anything else is a :class:`DataError`."""
    if value is None:
        return ""
    if not isinstance(value, str):
        hint = "; a list of messages needs --apply_chat_template" if isinstance(value, list) else ""
        raise DataError(f"{where}: expected text, found {type(value).__name__}{hint}")
    return value


def as_messages(value: Any, role: str, where: str) -> list[dict]:
    """Return a list of messages; a plain string becomes one message of ``role``, None becomes none."""
    if value is None:
        return []
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise DataError(f"{where}: expected text or a list of messages, found {type(value).__name__}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
            raise DataError(f"{where}: a message has the keys role and content; found: {found}")
        if not isinstance(message["content"], str) and not message.get("tool_calls"):
            raise DataError(f"{where}: the content of a message is text; found {type(message['content']).__name__}")
        messages.append({key: part for key, part in message.items() if part is not None or key == "content"})
    return messages


def is_blank(value: Any) -> bool:
    """Whether a prompt or response field holds nothing but white space; for messages the last one is looked at."""
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return not value[-1].get("tool_calls") and is_blank(value[-1].get("content"))
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def assistant_turns(messages: list[dict]) -> list[int]:
    """Return the positions of the assistant messages that say something."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and not is_blank([message])]


def special_tokens(tokenizer: Any) -> dict[int, Any]:
    """Return ``{id: token}`` of everything the tokenizer treats as a special token."""
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def has_generation_block(tokenizer: Any) -> bool:
    """Whether the chat template itself marks what the assistant says."""
    return GENERATION_BLOCK.search(tokenizer.get_chat_template()) is not None


def eos_of(tokenizer: Any) -> int:
    """Return the id of the end-of-sequence token; raise :class:`DataError` when there is none."""
    if tokenizer.eos_token_id is None:
        raise DataError(f"the tokenizer of {tokenizer.name_or_path!r} has no eos token: answers could not end")
    return tokenizer.eos_token_id


def tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each text, with no token added."""
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def tokenize_pieces(tokenizer: Any, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """Return token ids of every piece of every row; a row's pieces are consecutive parts of one text.

    The ids of a row, put together, are those of the whole text. Only where a token of the whole text would reach
    over the border of two pieces, the second piece is tokenised by itself: a prompt then has the same ids here as
    when it is given to generation.
    """
    prefixes = ["".join(row[: end + 1]) for row in rows for end in range(len(row))]
    prefix_ids = iter(tokenize(tokenizer, prefixes))
    result: list[list[list[int]]] = []
    alone: list[tuple[int, int]] = []
    for row_number, row in enumerate(rows):
        before: list[int] = []
        pieces = []
        for number in range(len(row)):
            ids = next(prefix_ids)
            if ids[: len(before)] != before:
                alone.append((row_number, number))
            pieces.append(ids[len(before) :])
            before = ids
        result.append(pieces)
    for (row_number, number), ids in zip(alone, tokenize(tokenizer, [rows[r][n] for r, n in alone]), strict=True):
        result[row_number][number] = ids
    return result
