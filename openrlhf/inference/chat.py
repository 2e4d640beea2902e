"""Talking to a model: the conversation so far, and answers that are shown as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openrlhf.config.chat import ChatConfig
from openrlhf.datasets import tokens
from openrlhf.datasets.templates import Renderer
from openrlhf.device import current_device
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.models.suitability import check_language_model, context_length
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.rollout.hf_engine import HFEngine
from openrlhf.rollout.types import Prompt, SamplingParams

UNFINISHED = "\ufffd"
"""What the first bytes of a letter decode to."""


class Conversation:
    """What was said so far: messages under a chat template, else one text that grows.

    Args:
        render: turns a line or the messages into text.
        begin: what the text begins with.
        end: what every prompt ends with.
    """

    def __init__(self, render: Renderer, begin: str = "", end: str = ""):
        self._render, self._begin, self._end = render, begin, end
        self.reset()

    def reset(self) -> None:
        """Forget everything that was said."""
        self._messages: list[dict] = []
        self._text = self._begin

    def prompt(self, line: str) -> str:
        """Return the text that the model continues when ``line`` is said now."""
        if self._render.chat:
            messages = [*self._messages, {"role": "user", "content": line}]
            return self._render.conversation(messages, "the conversation", generation_prompt=True) + self._end
        before = f"{self._text}\n" if self._text else ""
        return before + self._render.prompt(line, "the line") + self._end

    def add(self, line: str, answer: str) -> None:
        """Remember a line and the answer to it."""
        self._text = self.prompt(line) + answer
        self._messages += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]


class Talker:
    """A model, its tokenizer, and the conversation with it.

    Raises:
        DataError: the model folder cannot be used, or has no chat template where one is asked for.
    """

    def __init__(self, config: ChatConfig):
        path, trusted = config.pretrain, config.trust_remote_code
        check_language_model(path, trust_remote_code=trusted)
        self.tokenizer = load_tokenizer(
            path,
            use_fast=not config.disable_fast_tokenizer,
            trust_remote_code=trusted,
            chat_template=config.tokenizer_chat_template,
        )
        self.conversation = Conversation(
            Renderer(self.tokenizer, config.input_template, config.apply_chat_template),
            begin=_text_of(config.ta_prompt) if config.ta_prompt else "",
            end=config.prompt_end,
        )
        model = load_causal_lm(path, config.loading, lora=config.weights)
        self._engine = HFEngine(Actor(model).eval().to(current_device()), self.tokenizer)
        self._limit = context_length(path, trust_remote_code=trusted) or config.max_len
        self._turn = 0

    def answer(self, line: str, config: ChatConfig, show: Callable[[str], None]) -> bool:
        """Answer ``line``, piece by piece, with the sampling of ``config``; return whether there was room for it."""
        text = self.conversation.prompt(line)
        ids = tokens.tokenize(self.tokenizer, [text])[0]
        room = min(config.max_len, self._limit) - len(ids)
        if room < 1:
            return False
        sampling = SamplingParams(
            max_new_tokens=room,
            temperature=0.0 if config.greedy_sampling else config.temperature,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            seed=config.seed,
            step=self._turn,
        )
        said = Pieces(self.tokenizer, show)
        rollout = self._engine.stream(Prompt("chat", text, tuple(ids)), sampling, said.add)
        self.conversation.add(line, said.end(list(rollout.response_ids)))
        self._turn += 1
        return True


class Pieces:
    """Tokens become text that is shown as soon as its letters are whole; special tokens are not shown."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]):
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token: int) -> None:
        """Show what the next token adds."""
        self._ids.append(token)
        text = self._decoded(self._ids)
        if not text.endswith(UNFINISHED):
            self._show_up_to(text)

    def end(self, ids: list[int]) -> str:
        """Show what is left of the answer ``ids`` and return all of it."""
        self._show_up_to(self._decoded(ids))
        return self._shown

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _show_up_to(self, text: str) -> None:
        if len(text) > len(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


def _text_of(path: str) -> str:
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()
