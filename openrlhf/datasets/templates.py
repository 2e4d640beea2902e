"""From a row to text: plain templates and chat templates, each row rendered once.

Special tokens come from the template's own text. Where the data spells one, :meth:`Renderer.guard` puts two marks
around it that live until ``tokens.tokenize``, which reads what is between them as plain text.
"""

from __future__ import annotations

import re
from typing import Any

from openrlhf.datasets.fields import as_messages, as_text, assistant_turns
from openrlhf.datasets.tokens import CLOSE, OPEN, special_tokens
from openrlhf.errors import DataError, UsageError


class Renderer:
    """Turns the fields of a row into text.

    Args:
        tokenizer: brings the chat template.
        input_template: python format with one ``{}`` for the prompt; None or ``""`` leaves the prompt as it is.
        apply_chat_template: use the tokenizer's chat template in place of ``input_template``.
        spelled: what becomes of a special token that the data spells: ``"text"``, ``"token"`` or ``"error"``; None is
            text in conversations, where only the template may begin and end turns, and a token elsewhere.

    Attributes:
        rows_spelling: rows whose text spells a special token.

    Raises:
        DataError: a chat template is asked for and the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        input_template: str | None = None,
        apply_chat_template: bool = False,
        spelled: str | None = None,
    ):
        if apply_chat_template and not tokenizer.chat_template:
            raise DataError(
                f"--apply_chat_template: the tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "give one with --tokenizer_chat_template, or leave the flag out and use --input_template"
            )
        self.tokenizer = tokenizer
        self.template = input_template
        self.chat = apply_chat_template
        self.spelled = spelled or ("text" if apply_chat_template else "token")
        self.rows_spelling = 0
        self._last_spelling = ""
        special = special_tokens(tokenizer)
        self._special_ids = set(special)
        self._special = tuple({str(token) for token in special.values()})
        longest_first = sorted(self._special, key=len, reverse=True)
        self._spells = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def prompt(self, value: Any, where: str) -> str:
        """Return the text that a policy continues."""
        if self.chat:
            return self.conversation(as_messages(value, "user", where), where, generation_prompt=True)
        text = self.text(value, where)
        return self._one_bos(fill_template(self.template, text) if self.template else text)

    def text(self, value: Any, where: str) -> str:
        """Return a field that is no conversation, guarded."""
        return self.guard(as_text(value, where), where)

    def guard(self, value: Any, where: str) -> Any:
        """Return ``value`` with the special tokens that its strings spell treated as ``spelled`` says."""
        if isinstance(value, list):
            return [self.guard(part, where) for part in value]
        if isinstance(value, dict):
            return {key: self.guard(part, where) for key, part in value.items()}
        if not isinstance(value, str) or not (found := self._spells.search(value)):
            return value
        if self.spelled == "error":
            raise DataError(
                f"{where}: the text spells the special token {found.group()!r}; --special_tokens_in_text text reads "
                "it as plain text, token as the token"
            )
        self.rows_spelling += where != self._last_spelling
        self._last_spelling = where
        return value if self.spelled == "token" else self._spells.sub(f"{OPEN}\\g<0>{CLOSE}", value)

    def spelling_note(self) -> str:
        """Return what to say of :attr:`rows_spelling` rows."""
        return f"with a special token in their text, read as {'plain text' if self.spelled == 'text' else 'the token'}"

    def _one_bos(self, text: str) -> str:
        """Drop the beginning-of-sequence tokens before the last of those that ``text`` starts with."""
        bos = self.tokenizer.bos_token
        while bos and text.startswith(bos + bos):
            text = text[len(bos) :]
        return text

    def pair(self, prompt: Any, response: Any, where: str) -> tuple[str, str]:
        """Return ``(prompt text, response text)``: the two halves of one rendering, trailing newlines removed.

        In a chat, strings become a user and an assistant message; lists are message lists.
        """
        if not self.chat:
            return self.prompt(prompt, where), self.text(response, where).rstrip("\n")
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

    def marked(self, messages: list[dict], where: str) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        """Return the token ids of one rendering, and the first and last position of each span that the template
        encloses in ``{% generation %}``, up to its end-of-turn token.

        Blocks end before that token, behind it, or behind the white space that follows it: all of them mean the turn.
        """
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._apply(messages, where, **options)
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids, mask = ids[1:], mask[1:]
        edges = [t for t in range(len(ids) + 1) if (t and mask[t - 1]) != (t < len(ids) and mask[t])]
        spans = zip(edges[::2], edges[1::2], strict=True)
        return ids, tuple((start, self._end_of_turn(ids, start, end)) for start, end in spans)

    def conversation(self, messages: list[dict], where: str, generation_prompt: bool = False) -> str:
        """Return the chat template's text of ``messages``."""
        messages = self.guard(messages, where)
        return self._one_bos(self._apply(messages, where, tokenize=False, add_generation_prompt=generation_prompt))

    def _apply(self, messages: list[dict], where: str, **options: Any) -> Any:
        """Call the tokenizer's ``apply_chat_template``; what a template refuses becomes a :class:`DataError`."""
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except TemplateSyntaxError as error:
            raise DataError(
                f"the chat template is not valid Jinja ({error}): mend it, or give another with "
                "--tokenizer_chat_template"
            ) from error
        except (TemplateError, TypeError) as error:
            roles = ", ".join(str(message["role"]) for message in messages)
            raise DataError(f"{where}: the chat template refuses the roles {roles}: {error}") from error

    def _end_of_turn(self, ids: list[int], start: int, end: int) -> int:
        """Return where the turn ends that a template marks as ``[start, end)``: behind its end-of-turn token."""
        last = next((t for t in reversed(range(start, end)) if ids[t] in self._special_ids), None)
        if last is not None and not self.tokenizer.decode(ids[last + 1 : end]).strip():
            return last + 1
        return end + (end < len(ids) and ids[end] in self._special_ids)

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
