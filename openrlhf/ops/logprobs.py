"""Log-probabilities of given tokens without ever holding the ``(N, V)`` logits of a whole batch.

``N`` token positions, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROUND_TO = 64
"""A CPU prepares the product of half types anew, at several times its cost, for every new number of rows."""


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Tensor:
    """Return ``log softmax((hidden @ weight.T + bias) / temperature)[targets]`` as ``(N,)`` float32.

    The matrix products stay in the input dtype, the soft-max is float32. Logits exist for ``chunk_size`` rows at a
    time and are computed again in the backward, which also skips the rows whose gradient is zero.

    Args:
        hidden: ``(N, H)`` last hidden states.
        weight: ``(V, H)`` of the language-model head, in the dtype of ``hidden``.
        targets: ``(N,)`` int64 token ids.
        bias: ``(V,)`` of the head, if it has one.
        temperature: divides the logits.
        chunk_size: rows of logits that exist at once.
    """
    return _TokenLogProbs.apply(hidden, weight, targets, bias, temperature, chunk_size)


class _TokenLogProbs(torch.autograd.Function):
    """One autograd node for the whole head, so that ZeRO-3 gathers its weight once however many chunks there are."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, chunk_size):
        log_sum_exp = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        log_probs = torch.empty_like(log_sum_exp)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            logits = _scaled_logits(hidden[rows], weight, bias, temperature)
            log_sum_exp[rows] = torch.logsumexp(logits, dim=-1)
            log_probs[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1) - log_sum_exp[rows]
        ctx.save_for_backward(hidden, targets, log_sum_exp)
        # ZeRO-3 frees the storage after the forward and gathers it again into the same Parameter before the backward.
        ctx.weight, ctx.bias = weight, bias
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return log_probs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs):
        hidden, targets, log_sum_exp = ctx.saved_tensors
        grads = _HeadGradients(ctx, hidden)
        active = grad_log_probs.nonzero().squeeze(-1)
        for rows in active.split(ctx.chunk_size):
            chunk = hidden[rows]
            grad_logits = _scaled_logits(chunk, ctx.weight, ctx.bias, ctx.temperature)
            grad_logits.sub_(log_sum_exp[rows, None]).exp_()
            grad_logits[torch.arange(len(rows), device=rows.device), targets[rows]] -= 1.0
            grad_logits.mul_((grad_log_probs[rows] / -ctx.temperature)[:, None])
            grads.add(rows, chunk, grad_logits)
        grad_hidden, grad_weight, grad_bias = grads.in_dtype(hidden.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None


class _HeadGradients:
    """The gradients of one backward of the head; those that nobody asked for stay ``None``."""

    def __init__(self, ctx, hidden: Tensor):
        needs_hidden, needs_weight, _, needs_bias = ctx.needs_input_grad[:4]
        self.head = ctx.weight
        self.hidden = torch.zeros_like(hidden) if needs_hidden else None
        self.weight = torch.zeros_like(ctx.weight, dtype=torch.float32) if needs_weight else None
        self.bias = torch.zeros_like(ctx.bias, dtype=torch.float32) if needs_bias else None

    def add(self, rows: Tensor, chunk: Tensor, grad_logits: Tensor) -> None:
        """Add what ``grad_logits`` (rows, V) float32 of the hidden states ``chunk`` contributes."""
        if self.bias is not None:
            self.bias += grad_logits.sum(dim=0)
        chunk, grad_logits = filled(chunk), filled(grad_logits, chunk.dtype)
        if self.hidden is not None:
            self.hidden[rows] = (grad_logits @ self.head)[: len(rows)]
        if self.weight is not None and chunk.dtype == self.weight.dtype:
            self.weight.addmm_(grad_logits.t(), chunk)
        elif self.weight is not None:
            self.weight += grad_logits.t() @ chunk

    def in_dtype(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of hidden states, weight and bias; the last two, summed in float32, in ``dtype``."""
        weight, bias = (None if grad is None else grad.to(dtype) for grad in (self.weight, self.bias))
        return self.hidden, weight, bias


def log_probs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of ``targets`` and the entropy ``-sum_v p(v) log p(v)`` of their distributions, ``(N,)``.

    Both in float32 and with a gradient, ``chunk_size`` rows at a time, computed again in the backward. Arguments as in
    `token_log_probs`.
    """
    return _LogProbsAndEntropy.apply(hidden, weight, targets, bias, temperature, chunk_size)


class _LogProbsAndEntropy(torch.autograd.Function):
    """One autograd node for the whole head, as `_TokenLogProbs`."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, temperature, chunk_size):
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            found = _scaled_logits(hidden[rows], weight, bias, temperature).log_softmax(dim=-1)
            log_probs[rows] = found.gather(-1, targets[rows, None]).squeeze(-1)
            entropy[rows] = _entropy(found)
        ctx.save_for_backward(hidden, targets, entropy)
        # Not saved as tensors for the sake of ZeRO-3, as in `_TokenLogProbs`.
        ctx.weight, ctx.bias = weight, bias
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return log_probs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy):
        hidden, targets, entropy = ctx.saved_tensors
        grads = _HeadGradients(ctx, hidden)
        active = ((grad_log_probs != 0) | (grad_entropy != 0)).nonzero().squeeze(-1)
        for rows in active.split(ctx.chunk_size):
            chunk = hidden[rows]
            found = _scaled_logits(chunk, ctx.weight, ctx.bias, ctx.temperature).log_softmax(dim=-1)
            of_targets, of_entropy = grad_log_probs[rows, None], grad_entropy[rows, None]
            pull = (found + entropy[rows, None]).mul_(of_entropy).add_(of_targets)
            grad_logits = found.exp_().mul_(pull).neg_()
            grad_logits[torch.arange(len(rows), device=rows.device), targets[rows]] += of_targets.squeeze(-1)
            grads.add(rows, chunk, grad_logits.div_(ctx.temperature))
        grad_hidden, grad_weight, grad_bias = grads.in_dtype(hidden.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None


def distilled_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return the log-probs of ``targets`` and the cross-entropy ``-sum_v p_teacher(v) log p(v)``, both ``(N,)``.

    Soft-max in float32, ``chunk_size`` rows at a time, computed again in the backward, as in `token_log_probs`. No
    gradient flows into the teacher. Where it has other tokens at the end of its vocabulary, its distribution is the
    one over the tokens of ``weight``.

    Args:
        hidden: ``(N, H)`` last hidden states.
        weight: ``(V, H)`` of the language-model head, in the dtype of ``hidden``.
        targets: ``(N,)`` int64 token ids.
        teacher_logits: ``(N, V')`` of the teacher at the same positions.
        bias: ``(V,)`` of the head, if it has one.
        chunk_size: rows of logits that exist at once.
    """
    return _DistilledLogProbs.apply(hidden, weight, targets, bias, teacher_logits, chunk_size)


class _DistilledLogProbs(torch.autograd.Function):
    """One autograd node for the whole head, as `_TokenLogProbs`, with a distribution beside the targets."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, bias, teacher_logits, chunk_size):
        log_probs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        cross_entropy = torch.empty_like(log_probs)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            logits = _scaled_logits(hidden[rows], weight, bias, 1.0)
            log_probs[rows], cross_entropy[rows] = distilled_from_logits(logits, targets[rows], teacher_logits[rows])
        ctx.save_for_backward(hidden, targets, teacher_logits)
        # Not saved as tensors for the sake of ZeRO-3, as in `_TokenLogProbs`.
        ctx.weight, ctx.bias, ctx.chunk_size = weight, bias, chunk_size
        return log_probs, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_cross_entropy):
        hidden, targets, teacher_logits = ctx.saved_tensors
        grads = _HeadGradients(ctx, hidden)
        active = ((grad_log_probs != 0) | (grad_cross_entropy != 0)).nonzero().squeeze(-1)
        for rows in active.split(ctx.chunk_size):
            chunk = hidden[rows]
            grad_logits = _scaled_logits(chunk, ctx.weight, ctx.bias, 1.0).softmax(dim=-1)
            taught = teacher_distribution(teacher_logits[rows], grad_logits.shape[-1])
            of_targets, of_teacher = grad_log_probs[rows], grad_cross_entropy[rows]
            grad_logits.mul_((of_teacher - of_targets)[:, None]).sub_(taught.mul_(of_teacher[:, None]))
            grad_logits[torch.arange(len(rows), device=rows.device), targets[rows]] += of_targets
            grads.add(rows, chunk, grad_logits)
        grad_hidden, grad_weight, grad_bias = grads.in_dtype(hidden.dtype)
        return grad_hidden, grad_weight, None, grad_bias, None, None


def distilled_from_logits(logits: Tensor, targets: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `distilled_log_probs` does, from the logits ``(N, V)`` themselves."""
    log_probs = logits.float().log_softmax(dim=-1)
    taught = teacher_distribution(teacher_logits, logits.shape[-1])
    return log_probs.gather(-1, targets[..., None]).squeeze(-1), -(taught * log_probs).sum(dim=-1)


def teacher_distribution(teacher_logits: Tensor, vocabulary: int) -> Tensor:
    """Return the float32 distribution ``(N, vocabulary)`` of a teacher over the first tokens, 0 on those it lacks."""
    known = teacher_logits[..., :vocabulary].float().softmax(dim=-1)
    return torch.nn.functional.pad(known, (0, vocabulary - known.shape[-1]))


def entropy_from_logits(logits: Tensor, chunk_size: int = 1024) -> Tensor:
    """Return the float32 entropy ``(N,)`` of the distributions of ``logits`` (N, V), a few rows at a time."""
    parts = []
    for part in logits.split(chunk_size):
        parts.append(_entropy(part.float().log_softmax(dim=-1)))
    return torch.cat(parts)


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """Return a fresh ``(rows, V)`` float32 tensor of logits over ``temperature``."""
    rows = filled(hidden)
    logits = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    logits = logits[: len(hidden)].float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def filled(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``rows`` (N, H) in ``dtype``, with rows of zeros below up to a multiple of `ROUND_TO` where that pays."""
    dtype = dtype or rows.dtype
    filler = -len(rows) % rows_round_to(rows.device, dtype)
    if not filler:
        return rows.to(dtype)
    whole = torch.zeros(len(rows) + filler, rows.shape[1], dtype=dtype, device=rows.device)
    whole[: len(rows)] = rows
    return whole


def rows_round_to(device: torch.device, dtype: torch.dtype) -> int:
    """Return of what the rows of a matrix product should be a multiple: 1 but for half types on a CPU."""
    return ROUND_TO if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) else 1


def both_from_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return what `log_probs_and_entropy` does, from the logits ``(N, V)`` themselves."""
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    return log_probs.gather(-1, targets[..., None]).squeeze(-1), _entropy(log_probs)


def log_probs_from_logits(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the float32 log-probability of ``targets`` (...) under ``logits`` (..., V) over ``temperature``."""
    logits = logits.float() / temperature
    return logits.gather(-1, targets[..., None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)
