"""The gradients that plain torch gives: data and formulas, in double precision, one sequence at a time.

No padding, ranks or micro-batches. Seven rows leave a rank without rows in its last micro-batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from openrlhf.datasets.batch import PreferenceBatch, ProcessRewardBatch, TokenBatch, UnpairedBatch
from openrlhf.rollout.types import Experience

LENGTHS = (13, 4, 9, 6, 12, 5, 11)
ROWS, WIDTH, TEMPERATURE, WHITEN = len(LENGTHS), max(LENGTHS), 0.7, (0.1, 1.3)
KL_COEF, ENTROPY_COEF = 0.3, 0.2
REWARD_IDS = [7, 5]
PTX_COEF = 0.7
TEXTS = ("Natalia sold clips", "to 48 of her friends in April, and then she sold half as many", "in May.")


def sequences(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens ``(ROWS, WIDTH)``, the mask of the real ones, and the places ``(ROWS, WIDTH - 1)`` that count."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(3, 300, (ROWS, WIDTH), generator=generator) * real
    return tokens, real, real[:, 1:] & (torch.arange(WIDTH - 1) >= torch.tensor(LENGTHS)[:, None] // 3)


def noise(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(ROWS, WIDTH - 1, generator=torch.Generator().manual_seed(seed))


class Rows:
    """A data set of the rows of one batch; a rank without rows gets a dummy that counts nothing."""

    def __init__(self, batch: TokenBatch):
        self.batch = batch

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> int:
        return row

    @property
    def lengths(self) -> list[int]:
        return self.batch.attention_mask.sum(dim=1).view(-1, ROWS).sum(dim=0).tolist()

    def collate(self, rows: list[int]) -> TokenBatch:
        batch, pairs = self.batch, isinstance(self.batch, PreferenceBatch)
        index = torch.tensor((rows or [0]) + [ROWS + row for row in rows or [0]] * pairs)
        counted = batch.loss_mask[index] if rows else torch.zeros_like(batch.loss_mask[index])
        own = {
            name: getattr(batch, name)[rows or [0]]
            for name in ("margin", "desirable", "labels")
            if hasattr(batch, name)
        }
        return type(batch)(batch.sequences[index], batch.attention_mask[index], counted, **own)


def sft_rows() -> Rows:
    return Rows(TokenBatch(*sequences(1)))


def pairs() -> Rows:
    """Return pairs of answers to one prompt, which a model may compute once."""
    chosen, rejected = sequences(2), sequences(3)
    prompt = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None] // 3 + 1
    rejected[0][prompt] = chosen[0][prompt]
    both = [torch.cat(parts) for parts in zip(chosen, rejected, strict=True)]
    return Rows(PreferenceBatch(*both, margin=torch.linspace(-0.5, 1.0, ROWS)))


class UnpairedRows(Rows):
    """Answers from the place ``LENGTHS // 3`` on, desirable or not, that can be given to another prompt."""

    def __init__(self):
        super().__init__(UnpairedBatch(*sequences(1), desirable=torch.arange(ROWS) % 3 > 0))

    def mismatched(self, prompt: int, answer: int) -> tuple[Tensor, int]:
        at = [LENGTHS[row] // 3 + 1 for row in (prompt, answer)]
        tokens = self.batch.sequences
        return torch.cat([tokens[prompt, : at[0]], tokens[answer, at[1] : LENGTHS[answer]]]), at[0]

    def mismatched_length(self, prompt: int, answer: int) -> int:
        return len(self.mismatched(prompt, answer)[0])

    def collate(self, rows: list) -> UnpairedBatch:
        if all(isinstance(row, int) for row in rows):
            return super().collate(rows)
        tokens = self.batch.sequences
        rows = [(tokens[row, : LENGTHS[row]], LENGTHS[row] // 3 + 1) if isinstance(row, int) else row for row in rows]
        width = max(len(tokens) for tokens, _ in rows)
        tokens = torch.stack([nn.functional.pad(tokens, (0, width - len(tokens))) for tokens, _ in rows])
        real = torch.arange(width) < torch.tensor([len(tokens) for tokens, _ in rows])[:, None]
        answer = torch.arange(1, width) >= torch.tensor([at for _, at in rows])[:, None]
        return UnpairedBatch(tokens, real, real[:, 1:] & answer, torch.zeros(len(rows), dtype=torch.bool))


def steps_of(tokens: Tensor, real: Tensor, counted: Tensor) -> Rows:
    """Return rows of which every third place that counts ends a step, right with a probability of its own."""
    ends = counted & (torch.arange(WIDTH - 1) % 3 == 1)
    return Rows(ProcessRewardBatch(tokens, real, ends, torch.where(ends, noise(9).sigmoid(), 0.0)))


def causal_lm(folder: str, name: str = "policy") -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", dtype=torch.float64)


def classifier(folder: str) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward", num_labels=1, dtype=torch.float64)


def plain_log_probs(model: nn.Module, tokens: Tensor, real: Tensor, temperature: float = 1.0) -> Tensor:
    rows = []
    for row, keep in zip(tokens, real, strict=True):
        logits = model(row[keep][None]).logits[0, :-1] / temperature
        found = logits.log_softmax(-1).gather(1, row[keep][1:, None]).squeeze(1)
        rows.append(nn.functional.pad(found, (0, WIDTH - 1 - len(found))))
    return torch.stack(rows)


def plain_values(model: nn.Module, tokens: Tensor, real: Tensor) -> Tensor:
    """Return ``(B, WIDTH)`` values, 0 on padding."""
    rows = [model.score(model.model(row[keep][None]).last_hidden_state)[0, :, 0] for row, keep in zip(tokens, real)]
    return torch.stack([nn.functional.pad(row, (0, WIDTH - len(row))) for row in rows])


def sft_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, (tokens, real, counted) = causal_lm(folder), sequences(1)
    return model, -plain_log_probs(model, tokens, real)[counted].mean()


def rm_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, batch = classifier(folder), pairs().batch
    last = batch.attention_mask.sum(dim=1) - 1
    chosen, rejected = plain_values(model, batch.sequences, batch.attention_mask)[range(2 * ROWS), last].chunk(2)
    return model, -nn.functional.logsigmoid(chosen - rejected - batch.margin).mean()


def answers_of(model: nn.Module, batch: TokenBatch) -> Tensor:
    """Return the sums ``(B,)`` of the log-probs that count."""
    log_probs = plain_log_probs(model, batch.sequences, batch.attention_mask)
    return torch.where(batch.loss_mask, log_probs, 0.0).sum(dim=1)


def frozen(folder: str) -> nn.Module:
    return causal_lm(folder, "frozen").requires_grad_(False)


def dpo_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, batch = causal_lm(folder), pairs().batch
    sums = answers_of(model, batch)
    chosen, rejected = (sums - answers_of(frozen(folder), batch)).chunk(2)
    nll = -(sums / batch.loss_mask.sum(dim=1))[:ROWS].mean()
    z = 0.3 * (chosen - rejected)
    return model, -(0.9 * z.sigmoid().log() + 0.1 * (-z).sigmoid().log()).mean() + 0.2 * nll


def kto_pair_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, batch = causal_lm(folder), pairs().batch
    chosen, rejected = (answers_of(model, batch) - answers_of(frozen(folder), batch)).chunk(2)
    chosen_kl, rejected_kl = (side.mean().clamp(min=0).detach() for side in (chosen, rejected))
    wins, losses = (0.1 * (chosen - rejected_kl)).sigmoid(), (0.1 * (chosen_kl - rejected)).sigmoid()
    return model, (2 - wins - losses).mean()


def simpo_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, batch = causal_lm(folder), pairs().batch
    chosen, rejected = (answers_of(model, batch) / batch.loss_mask.sum(dim=1)).chunk(2)
    return model, -(2.0 * (chosen - rejected) - 0.5).sigmoid().log().mean()


def kto_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, other, rows = causal_lm(folder), frozen(folder), UnpairedRows()
    drifts = []
    for row in range(ROWS):
        tokens, at = rows.mismatched(row, (row + 1) % ROWS)
        log_probs = [
            m(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]) for m in (model, other)
        ]
        drifts.append((log_probs[0] - log_probs[1])[at - 1 :].sum().detach())
    kl = torch.stack(drifts).mean().clamp(min=0)
    ratios = answers_of(model, rows.batch) - answers_of(other, rows.batch)
    good = rows.batch.desirable
    wanted = 1.5 * (1 - (0.1 * (ratios - kl)).sigmoid())
    unwanted = 0.5 * (1 - (0.1 * (kl - ratios)).sigmoid())
    return model, torch.where(good, wanted, unwanted).mean()


def kd_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, teacher, (tokens, real, counted) = causal_lm(folder), frozen(folder), sequences(1)
    cross = []
    for row, keep, counts in zip(tokens, real, counted, strict=True):
        ours, theirs = (m(row[keep][None]).logits[0, :-1].log_softmax(-1) for m in (model, teacher))
        cross.append(-(theirs.exp() * ours).sum(-1)[counts[: len(ours)]])
    gpt = -plain_log_probs(model, tokens, real)[counted].mean()
    return model, 0.6 * gpt + 0.4 * torch.cat(cross).mean()


def prm_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, batch = causal_lm(folder), steps_of(*sequences(1)).batch
    losses = []
    for row, keep, ends, labels in zip(batch.sequences, batch.attention_mask, batch.loss_mask, batch.labels):
        right, wrong = model(row[keep][None]).logits[0, :-1][:, REWARD_IDS].log_softmax(-1).unbind(-1)
        at = ends[: len(right)]
        losses.append(-(labels[: len(right)] * right + (1 - labels[: len(right)]) * wrong)[at])
    return model, torch.cat(losses).mean()


def policy_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, sample = causal_lm(folder), experience(folder)
    log_probs = plain_log_probs(model, sample.sequences, sample.attention_mask, TEMPERATURE)
    ratio, advantages = (log_probs - sample.log_probs).exp(), (sample.advantages - WHITEN[0]) * WHITEN[1]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return model, loss[sample.action_mask].mean()


def ptx_formula(folder: str) -> tuple[nn.Module, Tensor]:
    """The policy's loss, and the mean over the tokens of the texts of their negative log-likelihood."""
    from transformers import AutoTokenizer

    model, loss = policy_formula(folder)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/policy")
    texts = []
    for text in TEXTS:
        tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        texts.append(model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None]).flatten())
    return model, loss - PTX_COEF * torch.cat(texts).mean()


def write_texts(path: Path) -> str:
    """Write the texts to ``path`` and return it."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return str(path)


def mean_of(loss: Tensor, actions: Tensor, of_sequences: bool) -> Tensor:
    """Return the mean over actions, or over sequences of their means."""
    rows = [row[keep].mean() for row, keep in zip(loss, actions, strict=True)]
    return torch.stack(rows).mean() if of_sequences else loss[actions].mean()


def plain_entropy(model: nn.Module, tokens: Tensor, real: Tensor, temperature: float) -> Tensor:
    rows = []
    for row, keep in zip(tokens, real, strict=True):
        found = (model(row[keep][None]).logits[0, :-1] / temperature).log_softmax(-1)
        rows.append(nn.functional.pad(-(found.exp() * found).sum(-1), (0, WIDTH - 1 - len(found))))
    return torch.stack(rows)


def gspo_formula(folder: str) -> tuple[nn.Module, Tensor]:
    """One ratio a sequence, against the engine; a mean over sequences, with k3 and the entropy."""
    model, sample = causal_lm(folder), experience(folder)
    actions, inputs = sample.action_mask, (sample.sequences, sample.attention_mask, TEMPERATURE)
    log_probs, entropy = plain_log_probs(model, *inputs), plain_entropy(model, *inputs)
    gaps = log_probs - sample.rollout_log_probs
    ratio = torch.stack([row[keep].mean() for row, keep in zip(gaps, actions)]).exp()[:, None]
    advantages = (sample.advantages - WHITEN[0]) * WHITEN[1]
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - 0.05, 1 + 0.1) * advantages)
    d = log_probs - sample.ref_log_probs
    parts = loss + KL_COEF * ((-d).exp() - 1 + d) - ENTROPY_COEF * entropy
    return model, mean_of(parts, actions, True)


def cispo_formula(folder: str) -> tuple[nn.Module, Tensor]:
    """Clipped weights, truncated weights of the rollout, and k2, a mean over sequences of their means."""
    model, sample = causal_lm(folder), experience(folder)
    log_probs = plain_log_probs(model, sample.sequences, sample.attention_mask, TEMPERATURE)
    ratio = (log_probs - sample.log_probs).exp().detach().clamp(0.8, 1.2)
    engine = (sample.log_probs - sample.rollout_log_probs).exp().clamp(0.9, 1.1)
    advantages = (sample.advantages - WHITEN[0]) * WHITEN[1]
    loss = -engine * ratio * advantages * log_probs + KL_COEF * 0.5 * (log_probs - sample.ref_log_probs) ** 2
    return model, mean_of(loss, sample.action_mask, True)


def dual_formula(folder: str) -> tuple[nn.Module, Tensor]:
    """PPO with another clip on each side and a dual one, without the tokens where the engine is off."""
    model, sample = causal_lm(folder), experience(folder)
    inputs = (sample.sequences, sample.attention_mask, TEMPERATURE)
    log_probs = plain_log_probs(model, *inputs)
    ratio, advantages = (log_probs - sample.log_probs).exp(), (sample.advantages - WHITEN[0]) * WHITEN[1]
    objective = torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.3) * advantages)
    objective = torch.where(advantages < 0, torch.maximum(objective, 1.05 * advantages), objective)
    engine = (sample.log_probs - sample.rollout_log_probs).exp()
    engine = torch.where((engine < 0.9) | (engine > 1.1), 0.0, engine)
    loss = -engine * objective - ENTROPY_COEF * plain_entropy(model, *inputs)
    return model, mean_of(loss, sample.action_mask, False)


def value_formula(folder: str) -> tuple[nn.Module, Tensor]:
    model, sample = classifier(folder), experience(folder)
    values = plain_values(model, sample.sequences, sample.attention_mask)[:, :-1]
    kept = sample.values + (values - sample.values).clamp(-0.2, 0.2)
    loss = 0.5 * torch.maximum((values - sample.returns) ** 2, (kept - sample.returns) ** 2)
    return model, loss[sample.action_mask].mean()


@cache
def experience(folder: str) -> Experience:
    """Return samples whose old log-probs and values are off by about the clip ranges, so that some are clipped."""
    tokens, real, actions = sequences(4)
    with torch.no_grad():
        log_probs = plain_log_probs(causal_lm(folder), tokens, real, TEMPERATURE).float() + noise(5, 0.2)
        values = plain_values(classifier(folder), tokens, real)[:, :-1].float() + noise(6, 0.2)
    nothing = torch.zeros(ROWS, WIDTH - 1)
    return Experience(
        sequences=tokens, attention_mask=real, action_mask=actions, rollout_log_probs=log_probs + noise(10, 0.1),
        sample=torch.arange(ROWS), log_probs=log_probs, ref_log_probs=log_probs + noise(11, 0.3), kl=nothing,
        scores=torch.zeros(ROWS),
        values=values, advantages=noise(7), returns=noise(8),
    )  # fmt: skip


def reference(folder: str, formula: Callable[[str], tuple[nn.Module, Tensor]]) -> dict[str, Tensor]:
    model, loss = formula(folder)
    loss.backward()
    return {f"model.{name}": param.grad for name, param in model.named_parameters()}
