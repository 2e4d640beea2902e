"""``samples.jsonl``: answers that a person can read, with their tokens and what was learned from them.

A line is one answer. Whole groups of answers to a prompt are kept, of some prompts of a step, of some steps of a run:
so the file has a bound, however long the run is: where all answers are long about 25 MB of training, and 20 MB of
evaluations at two temperatures. The report holds it too.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openrlhf.rollout.types import Rollout
from openrlhf.trainer.loggers import rewind

LOG = logging.getLogger(__name__)
ANSWERS = 16
"""Answers kept of a training step, or of one temperature of an evaluation; a group is never cut."""
TOKENS = 8192
"""Tokens kept of these answers, in equal shares; of a longer answer the rest is text."""
STEPS = 64
"""Training steps, and evaluations, of which answers are kept."""
DIGITS = 4
LONGEST_CHARACTER = 4
"""Bytes of a character of UTF-8, each of which may be a token."""
Columns = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Scored:
    """Answers and what was said of them.

    Attributes:
        rollouts: the answers, those to one prompt next to each other.
        scores: one an answer, as the reward sources gave it.
        true_scores: one an answer of ``--eval_reward_func``; None without it.
        parts: what the scores were added up from, and what reward functions gave beside: by name, one an answer.
        temperature: of the sampling.
        samples: answers to a prompt.
    """

    rollouts: Sequence[Rollout]
    scores: Sequence[float]
    true_scores: Sequence[float] | None = None
    parts: Columns = field(default_factory=dict)
    temperature: float = 1.0
    samples: int = 1

    @property
    def shown(self) -> list[int]:
        """The answers to keep: whole groups, spread evenly over the prompts."""
        groups = len(self.rollouts) // self.samples
        count = min(groups, max(1, ANSWERS // self.samples))
        firsts = [groups * number // count * self.samples for number in range(count)] if count else []
        return [first + index for first in firsts for index in range(self.samples)]

    @property
    def most_tokens(self) -> int:
        """Tokens to keep of each of these answers."""
        return TOKENS // max(1, len(self.shown))


def is_kept(number: int, total: int) -> bool:
    """Whether answers are kept of step (or evaluation) ``number`` of ``total``: of the first, and of every n-th."""
    return number == 1 or number % max(1, math.ceil(total / STEPS)) == 0


@dataclass
class SampleLog:
    """The file. Without a ``path``, on all ranks but one, nothing is written."""

    path: Path | None
    tokenizer: Any
    failures: int = 0

    def start(self, step: int) -> None:
        """Begin anew at step 0; else keep what was written up to ``step``, not what was interrupted after it."""
        if self.path is None:
            return
        with self._guarded():
            rewind(self.path, step)

    def rename(self, step: int, when: str, now: str) -> None:
        """Call the answers of ``step`` that were kept as ``when`` something else. A disk that refuses is said."""
        if self.path is None:
            return
        with self._guarded():
            # Not splitlines(): text may hold other line separators of Unicode.
            lines = self.path.read_text(encoding="utf-8").split("\n")
            old, new = (f'{{"when": "{name}", "step": {step},' for name in (when, now))
            lines = [new + line.removeprefix(old) if line.startswith(old) else line for line in lines]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("\n".join(lines), encoding="utf-8")
            os.replace(temporary, self.path)

    def write(self, when: str, step: int, scored: Scored, learned: Mapping[int, Columns] | None = None) -> None:
        """Append the answers to show. A disk that refuses is said, never raised.

        Args:
            when: ``"before"``, ``"during"`` and ``"after"`` for evaluations, ``"train"``.
            step: rollout steps done.
            scored: the answers.
            learned: of a training step, by the number of an answer: figures of its tokens, by name.
        """
        if self.path is None:
            return
        lines = []
        for index in scored.shown:
            line = {"when": when, "step": step, **self._line(scored, index)}
            line["tokens"] = self._tokens(scored.rollouts[index], scored.most_tokens, (learned or {}).get(index, {}))
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        with self._guarded(), self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)

    def _line(self, scored: Scored, index: int) -> dict[str, Any]:
        rollout, true_scores = scored.rollouts[index], scored.true_scores
        return {
            "temperature": scored.temperature,
            "uid": rollout.prompt.uid,
            "sample": index % scored.samples,
            "prompt": rollout.prompt.text,
            "response": self.tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True),
            "finish_reason": rollout.finish_reason,
            "length": len(rollout.response_ids),
            "reward": scored.scores[index],
            "label": rollout.prompt.label,
            "true_score": true_scores[index] if true_scores is not None else None,
            "parts": {name: values[index] for name, values in scored.parts.items()},
        }

    def _tokens(self, rollout: Rollout, most: int, learned: Columns) -> dict[str, Any]:
        """Return figures of the first tokens of an answer, by name, one a token; those of no action are 0."""
        start, end = len(rollout.prompt.token_ids), min(len(rollout.token_ids), len(rollout.prompt.token_ids) + most)
        engine = [0.0] * len(rollout.token_ids)
        mask = [0] * len(rollout.token_ids)
        known = iter(rollout.log_probs)
        for first, last in rollout.action_spans:
            engine[first:last] = [next(known) for _ in range(first, last)]
            mask[first:last] = [1] * (last - first)
        columns = {"engine_log_prob": engine[start:end], **learned}
        rounded = {name: [round(value, DIGITS) for value in values] for name, values in columns.items()}
        return {"text": token_texts(self.tokenizer, rollout.token_ids, start, end), "mask": mask[start:end], **rounded}

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.failures += 1
            if self.failures == 1:
                LOG.warning("%s cannot be written (%s); training goes on", self.path, error)


def token_texts(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> list[str]:
    """Return the text of each token from ``start`` to ``end``; together they are the text of the answer.

    A token is read with the one before it, since alone it may lose its space. Of several tokens that make one
    character the last has it, and the others have nothing.
    """
    texts: list[str] = []
    first = start
    for stop in range(start + 1, end + 1):
        text = _text_after(tokenizer, ids, first, stop)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and stop - first < LONGEST_CHARACTER and stop < end:
            texts.append("")
            continue
        texts.append(text)
        first = stop
    return texts


def _text_after(tokenizer: Any, ids: Sequence[int], first: int, stop: int) -> str:
    before = tokenizer.decode(list(ids[max(0, first - 1) : first]))
    both = tokenizer.decode(list(ids[max(0, first - 1) : stop]))
    return both[len(before) :] if both.startswith(before) else tokenizer.decode(list(ids[first:stop]))
