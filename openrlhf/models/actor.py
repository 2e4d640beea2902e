"""The policy: a causal language model that gives the log-probability of every token of a batch.

``B`` sequences, ``S`` padded length, ``T = S - 1``, ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openrlhf.config.groups import ModelConfig
from openrlhf.models.adapters import lora_config
from openrlhf.models.attention import switch_attention
from openrlhf.models.backbone import REFERENCE, TokenModel, evaluating, padded_arguments
from openrlhf.models.packing import predicted_places, restore
from openrlhf.ops.logprobs import (
    both_from_logits,
    distilled_from_logits,
    distilled_log_probs,
    entropy_from_logits,
    log_probs_and_entropy,
    log_probs_from_logits,
    token_log_probs,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig

LOGIT_ROWS = 1024


class ActorOutput(NamedTuple):
    """What a forward of the policy gives.

    Attributes:
        log_probs: ``(B, T)`` float32, column ``t`` speaks of ``sequences[:, t + 1]``; 0 off the real tokens.
        aux_loss: scalar, the load-balancing loss of a mixture of experts times its coefficient; 0 elsewhere.
        cross_entropy: ``(B, T)`` float32, of a teacher's distribution with the model's; None without a teacher.
        teacher_entropy: ``(B, T)`` float32, of a teacher's distribution; None without a teacher.
        entropy: ``(B, T)`` float32, of the policy's distribution at its temperature; None unless asked for.
    """

    log_probs: Tensor
    aux_loss: Tensor
    cross_entropy: Tensor | None = None
    teacher_entropy: Tensor | None = None
    entropy: Tensor | None = None


class LogitsOutput(NamedTuple):
    """What a forward of the policy gives that is asked for logits.

    Attributes:
        logits: ``(M, V)`` in the model's dtype, at the ``M`` places asked for, row by row.
        aux_loss: as in :class:`ActorOutput`.
    """

    logits: Tensor
    aux_loss: Tensor


class Actor(TokenModel):
    """A causal language model read as ``sequences -> log-probs (B, T)``; takes a transformers model or a folder.

    The head runs inside its own module, once a forward, on the positions that are needed, and never holds the logits
    of a whole batch. A model that changes its logits after the head (a final soft-cap, a scale) is found at the first
    forward and goes through its full logits instead. ``bf16``, ``load_in_4bit`` and the LoRA options, which are
    OpenRLHF's, count for a folder only; ``use_flash_attention_2`` changes nothing, because FlashAttention runs
    wherever it fits.
    """

    def __init__(
        self,
        pretrain_or_model: str | nn.Module,
        use_flash_attention_2: bool = False,
        bf16: bool = True,
        load_in_4bit: bool = False,
        lora_rank: int = 0,
        lora_alpha: int = 16,
        lora_dropout: float = 0.0,
        target_modules: Sequence[str] | None = None,
        *,
        packing_samples: bool = False,
        aux_loss_coef: float = 0.0,
    ):
        if isinstance(pretrain_or_model, str):
            from openrlhf.models.loading import load_causal_lm

            lora = lora_config(load_in_4bit, lora_rank, lora_alpha, lora_dropout, target_modules)
            model_cfg = ModelConfig(pretrain=pretrain_or_model, bf16=bf16)
            pretrain_or_model = load_causal_lm(pretrain_or_model, model_cfg, lora=lora)
        super().__init__(pretrain_or_model, packing_samples=packing_samples, aux_loss_coef=aux_loss_coef)
        self.head_is_last = False

    def verify(self) -> str | None:
        """Check the attention as :class:`TokenModel` does, and that the model's logits are what its head returns."""
        reason = super().verify()
        with evaluating(self), torch.no_grad():
            self.head_is_last = _head_is_last(self.model, self.backbone)
        if self.head_is_last:
            teach_head(self.model.get_output_embeddings())
        return reason

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        temperature: float = 1.0,
        where: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        read: Literal["log_probs", "logits", "own_logits"] = "log_probs",
        with_entropy: bool = False,
    ) -> ActorOutput | LogitsOutput:
        """Return the log-probs of a right-padded batch, or the logits of a few of its places.

        Args:
            sequences: ``(B, S)`` int64.
            attention_mask: ``(B, S)``, true on real tokens.
            temperature: divides the logits.
            where: ``(B, T)`` bool, the only places that are needed; the others stay 0 and cost nothing in the head.
            teacher_logits: ``(M, V')`` of a teacher, its ``"own_logits"`` for the same batch and ``where``.
            read: ``"logits"`` for those of the places of ``where``, not divided by a temperature; ``"own_logits"``
                for only those that lie in the own chunk of a ring.
            with_entropy: give the entropy of the distributions beside the log-probs; not together with a teacher.
        """
        batch = self.inputs(sequences, attention_mask)
        places = predicted_places(attention_mask)
        if where is not None:
            places = places & where
        chosen = torch.nn.functional.pad(places, (0, 1)).flatten()[batch.indices].nonzero().squeeze(-1)
        mine = self.ring.mine(chosen, batch.input_ids.shape[1])
        targets = sequences[:, 1:][places][mine.span]
        head = self.model.get_output_embeddings()
        if self.head_is_last:
            hidden, aux_loss = self.hidden_and_aux(batch, sequences, attention_mask)
            also = {"teacher_logits": teacher_logits, "with_entropy": with_entropy}
            wanted = {} if "logits" in read else {"targets": targets, **also}
            found = head(hidden[mine.places], temperature=temperature, **wanted)
        else:
            output, aux_loss = self.run(self.model, batch, sequences, attention_mask)
            found = self.without_padding(output.logits, batch)[mine.places]
            if read == "log_probs":
                found = _from_full_logits(found, targets, temperature, teacher_logits, with_entropy)
        if "logits" in read:
            return LogitsOutput(found if read == "own_logits" else self.ring.join(found, mine.counts), aux_loss)
        flat, shape = places.flatten().nonzero().squeeze(-1), tuple(places.shape)

        def laid_out(own: Tensor) -> Tensor:
            return restore(self.ring.join(own, mine.counts), flat, shape)

        if with_entropy:
            log_probs, entropy = map(laid_out, found)
            return ActorOutput(log_probs, aux_loss, entropy=entropy)
        if teacher_logits is None:
            return ActorOutput(laid_out(found), aux_loss)
        log_probs, cross_entropy = map(laid_out, found)
        return ActorOutput(log_probs, aux_loss, cross_entropy, laid_out(entropy_from_logits(teacher_logits)))

    @contextlib.contextmanager
    def generation(self) -> Iterator[nn.Module]:
        """Yield the transformers model in evaluation mode with an attention that knows caches and left padding.

        Of the folder's generation settings only the special tokens count: transformers fills what a caller leaves open
        from them, and a repetition penalty would change the distribution that is sampled from.
        """
        if not self.verified:
            self.verify()
        usual, settings = self.config._attn_implementation, self.model.generation_config
        switch_attention(self.model, self.padded_attention)
        self.model.generation_config = _special_tokens(settings)
        with evaluating(self), torch.no_grad():
            try:
                yield self.model
            finally:
                self.model.generation_config = settings
                switch_attention(self.model, usual)

    def generate(self, *args, **kwargs):
        """Call transformers' ``generate`` under :meth:`generation`; arguments and result are its own."""
        with self.generation() as model:
            return model.generate(*args, **kwargs)


def _special_tokens(settings: GenerationConfig) -> GenerationConfig:
    """Return transformers' own defaults with the special tokens of ``settings``."""
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{name: getattr(settings, name) for name in names})


def teach_head(head: nn.Linear) -> None:
    """Let ``head(hidden, targets=...)`` return log-probs; ``head(hidden)`` stays what it was.

    The work happens inside the module because ZeRO-3 gathers a weight around the forward of its own module only.
    """
    head.forward = types.MethodType(_head_forward, head)


def _head_forward(
    self: nn.Linear,
    hidden: Tensor,
    targets: Tensor | None = None,
    temperature: float = 1.0,
    teacher_logits: Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return logits ``(..., V)``; with ``targets`` (M,) the log-probs (M,) of ``hidden`` (M, H), and with
    ``teacher_logits`` (M, V') the cross-entropy (M,) too, or the entropy (M,) if asked for.
    """
    if targets is None:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)
    hidden = hidden.to(self.weight.dtype)
    if teacher_logits is not None:
        return distilled_log_probs(hidden, self.weight, targets, teacher_logits, bias=self.bias)
    compute = log_probs_and_entropy if with_entropy else token_log_probs
    return compute(hidden, self.weight, targets, bias=self.bias, temperature=temperature)


def _head_is_last(model: nn.Module, backbone: nn.Module) -> bool:
    """Return whether ``model`` feeds its backbone's output to a linear head and returns the head's output unchanged.

    The head's output is replaced by large numbers on the way, so that a soft-cap shows whatever the weights are.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return False
    tokens = torch.arange(3, 7, device=next(model.parameters()).device)[None]
    seen: list[tuple[Tensor, Tensor]] = []

    def replace(_, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        large = torch.linspace(-999, 999, output.numel(), device=output.device).view_as(output).to(output.dtype)
        seen.append((inputs[0], large))
        return large

    arguments = padded_arguments(tokens, torch.ones_like(tokens))
    usual = model.config._attn_implementation
    switch_attention(model, REFERENCE)
    with head.register_forward_hook(replace):
        logits = model(**arguments).logits
    hidden = backbone(**arguments).last_hidden_state
    switch_attention(model, usual)
    if len(seen) != 1:
        return False
    head_input, large = seen[0]
    untouched = torch.equal(logits.to(large.dtype), large)
    return untouched and torch.allclose(head_input.float(), hidden.float(), rtol=1e-2, atol=1e-4)


def _from_full_logits(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    teacher_logits: Tensor | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return what the head does with ``targets``, from ``logits`` (M, V); float32 exists for a few rows at a time."""
    pairs = list(zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True))
    if with_entropy:
        both = [checkpoint(both_from_logits, *pair, temperature, use_reentrant=False) for pair in pairs]
        return tuple(torch.cat(parts) for parts in zip(*both, strict=True))
    if teacher_logits is None:
        log_probs = [checkpoint(log_probs_from_logits, *pair, temperature, use_reentrant=False) for pair in pairs]
        return torch.cat(log_probs)
    both = [
        checkpoint(distilled_from_logits, *pair, taught, use_reentrant=False)
        for pair, taught in zip(pairs, teacher_logits.split(LOGIT_ROWS), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*both, strict=True))
