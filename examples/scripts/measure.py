"""Measure a trained model on held-out rows with transformers alone, as a check on what the commands log.

    python examples/scripts/measure.py pairs POLICY REFERENCE FILE        prompt, chosen, rejected
    python examples/scripts/measure.py answers POLICY REFERENCE FILE      prompt, completion, label
    python examples/scripts/measure.py divergence STUDENT TEACHER FILE    prompt, answer
    python examples/scripts/measure.py steps MODEL FILE                   prompt, completions, labels
    python examples/scripts/measure.py exact MODEL FILE                   prompt, label

Prompts are put into the model's chat template. Prints one line of JSON; a share comes with half the width of its 95 %
interval, for which the rows of one prompt count as one draw.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH = 32
GENERATED = 256
"""Answers that are written together."""
SAMPLES = 4
"""Answers to each prompt at temperature 1."""
PLACEHOLDER, RIGHT, WRONG = "*", "+", "-"


class Scorer:
    """A causal model in fp32 with its tokenizer; ``prompt_end`` is put behind every prompt."""

    def __init__(self, folder: str, prompt_end: str = ""):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.prompt_end = prompt_end
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a user's message, up to where the answer begins."""
        message = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return self.tokenizer.encode(text + self.prompt_end, add_special_tokens=False)

    def answer_ids(self, answer: str) -> list[int]:
        """Return the token ids of an answer, with the end of the turn."""
        return [*self.tokenizer.encode(answer, add_special_tokens=False), self.tokenizer.eos_token_id]

    @torch.no_grad()
    def written(self, prompts: Sequence[str], most: int, **sampling: Any) -> Iterator[str | None]:
        """Yield the model's answer to each prompt, or None for one that has no end within ``most`` tokens."""
        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        for start in range(0, len(prompts), GENERATED):
            ids = [torch.tensor(self.prompt_ids(prompt)) for prompt in prompts[start : start + GENERATED]]
            mask = [torch.ones_like(row) for row in ids]
            padded, mask = (
                torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler, padding_side="left")
                for rows, filler in ((ids, pad), (mask, 0))
            )
            found = self.model.generate(
                padded, attention_mask=mask, max_new_tokens=most, eos_token_id=eos, pad_token_id=pad, **sampling
            )
            for row in found[:, padded.shape[1] :].tolist():
                yield self.tokenizer.decode(row[: row.index(eos)]) if eos in row else None

    @torch.no_grad()
    def log_probs(self, rows: Sequence[tuple[list[int], list[int]]]) -> Iterator[Tensor]:
        """Yield for each (prompt ids, answer ids) the log-probs ``(answer tokens, V)`` of the tokens of the answer."""
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            ids = [torch.tensor(prompt + answer) for prompt, answer in batch]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            logits = self.model(input_ids=padded, attention_mask=mask).logits
            for (prompt, answer), row in zip(batch, logits, strict=True):
                yield row[len(prompt) - 1 : len(prompt) + len(answer) - 1].log_softmax(-1)

    def answer_log_probs(self, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Return the log-prob ``(rows,)`` of each answer after its prompt, summed over its tokens."""
        rows = [
            (self.prompt_ids(prompt), self.answer_ids(answer)) for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return torch.stack(
            [
                log_probs.gather(1, torch.tensor(answer)[:, None]).sum()
                for (_, answer), log_probs in zip(rows, self.log_probs(rows), strict=True)
            ]
        )


def share(hits: Sequence[bool], groups: Sequence[Any]) -> list[float]:
    """Return the share of hits and half the width of its 95 % interval, when hits of a group are not independent.

    The variance is that of a ratio over groups: the sum of the squared sums of ``hit - share`` within each group.
    """
    mean = sum(map(bool, hits)) / len(hits)
    sums: dict[Any, float] = defaultdict(float)
    for hit, group in zip(hits, groups, strict=True):
        sums[group] += bool(hit) - mean
    return [mean, 1.96 * math.sqrt(sum(total**2 for total in sums.values())) / len(hits)]


def pairs(policy: str, reference: str, rows: list[dict]) -> dict:
    """Return how often the chosen answer has the higher reward (log-ratio to the reference), and log-prob."""
    prompts = [row["prompt"] for row in rows]
    sides = [[row[side] for row in rows] for side in ("chosen", "rejected")]
    after, before = (
        torch.sub(*(scorer.answer_log_probs(prompts, side) for side in sides))
        for scorer in (Scorer(policy), Scorer(reference))
    )
    return {
        "rows": len(rows),
        "reward_accuracy": share((after > before).tolist(), prompts),
        "reward_margin": (after - before).mean().item(),
        "log_prob_accuracy": share((after > 0).tolist(), prompts),
        "log_prob_accuracy_of_reference": share((before > 0).tolist(), prompts),
    }


def answers(policy: str, reference: str, rows: list[dict]) -> dict:
    """Return how often an answer is on its side of the reference point, and desirable above undesirable ones.

    The reference point is the mean log-ratio of prompts with the next row's answer, not below 0.
    """
    prompts, said = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    scorers = Scorer(policy), Scorer(reference)
    ratio, drift = (
        torch.sub(*(scorer.answer_log_probs(prompts, texts) for scorer in scorers))
        for texts in (said, said[1:] + said[:1])
    )
    label = torch.tensor([bool(row["label"]) for row in rows])
    point = drift.mean().clamp(min=0)
    return {
        "rows": len(rows),
        "right_side": share(((ratio > point) == label).tolist(), prompts),
        "desirable_above": (ratio[label][:, None] > ratio[~label]).float().mean().item(),
        "log_ratio_desirable": ratio[label].mean().item(),
        "log_ratio_undesirable": ratio[~label].mean().item(),
        "reference_point": point.item(),
    }


def divergence(student: str, teacher: str, rows: list[dict]) -> dict:
    """Return the mean divergence KL(teacher, student) over the tokens of the answers."""
    scorers = Scorer(teacher), Scorer(student)
    texts = [(scorers[0].prompt_ids(row["prompt"]), scorers[0].answer_ids(row["answer"])) for row in rows]
    total, tokens = 0.0, 0
    for taught, said in zip(*(scorer.log_probs(texts) for scorer in scorers), strict=True):
        total += (taught.exp() * (taught - said)).sum().item()
        tokens += len(said)
    return {"rows": len(rows), "tokens": tokens, "divergence": total / tokens}


def steps(model: str, rows: list[dict]) -> dict:
    """Return how many steps are judged right, beside the share that the commoner label has."""
    scorer = Scorer(model)
    right, wrong = (scorer.tokenizer.convert_tokens_to_ids(token) for token in (RIGHT, WRONG))
    mark = scorer.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    texts = ["\n".join(f"{step} {PLACEHOLDER}" for step in row["completions"]) for row in rows]
    ids = [(scorer.prompt_ids(row["prompt"]), scorer.answer_ids(text)) for row, text in zip(rows, texts, strict=True)]
    hits, prompts, labels = [], [], []
    for row, (_, answer), log_probs in zip(rows, ids, scorer.log_probs(ids), strict=True):
        # The judgement on a step is the token after its placeholder.
        after = [place + 1 for place, token in enumerate(answer) if token == mark]
        said = log_probs[after, right] > log_probs[after, wrong]
        hits += [judged == (label == RIGHT) for judged, label in zip(said.tolist(), row["labels"], strict=True)]
        labels += row["labels"]
        prompts += [row["prompt"]] * len(row["labels"])
    commoner = max(labels.count(RIGHT), labels.count(WRONG)) / len(labels)
    return {"rows": len(rows), "steps": len(hits), "accuracy": share(hits, prompts), "commoner_label": commoner}


def exact(model: str, rows: list[dict], prompt_end: str = "") -> dict:
    """Return how often the greedy answer, and one sampled at temperature 1, is the label."""
    scorer = Scorer(model, prompt_end)
    prompts, labels = [row["prompt"] for row in rows], [row["label"] for row in rows]
    most = max(len(scorer.answer_ids(label)) for label in labels)
    found = {}
    torch.manual_seed(0)
    for name, times, sampling in (
        ("greedy", 1, {"do_sample": False}),
        ("sampled", SAMPLES, {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}),
    ):
        said = scorer.written(prompts * times, most, **sampling)
        hits = [answer == label for answer, label in zip(said, labels * times, strict=True)]
        found[name] = share(hits, prompts * times)
    return {"rows": len(rows), **found}


MEASURES: dict[str, tuple[Callable[..., dict], int]] = {
    "pairs": (pairs, 2), "answers": (answers, 2), "divergence": (divergence, 2), "steps": (steps, 1),
    "exact": (exact, 1),
}  # fmt: skip
"""The measures by name, each with the number of models that it reads."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name, (measure, models) in MEASURES.items():
        kind = kinds.add_parser(name, description=measure.__doc__)
        kind.add_argument("models", nargs=models)
        kind.add_argument("data", type=Path)
        kind.add_argument("--rows", type=int, help="read the first rows only")
        if measure is exact:
            kind.add_argument("--prompt_end", default="", help="text behind every prompt")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.data.read_text().splitlines()[: args.rows]]
    options = {"prompt_end": args.prompt_end} if args.kind == "exact" else {}
    print(json.dumps(MEASURES[args.kind][0](*args.models, rows, **options)))


if __name__ == "__main__":
    main()
