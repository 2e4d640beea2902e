"""The policy: a causal language model that gives the log-probability of every token of a batch.

``B`` sequences, ``S`` padded length, ``T = S - 1``, ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from openrlhf.models.attention import switch_attention
from openrlhf.models.backbone import REFERENCE, TokenModel, evaluating, packed_arguments, padded_arguments
from openrlhf.models.packing import PackedBatch, predicted_places, restore
from openrlhf.ops.logprobs import log_probs_from_logits, token_log_probs

if TYPE_CHECKING:
    from transformers import GenerationConfig

LOGIT_ROWS = 1024


class ActorOutput(NamedTuple):
    """What a forward of the policy gives.

    Attributes:
        log_probs: ``(B, T)`` float32, column ``t`` speaks of ``sequences[:, t + 1]``; 0 off the real tokens.
        aux_loss: the router loss of a mixture of experts; None elsewhere.
    """

    log_probs: Tensor
    aux_loss: Tensor | None = None


class Actor(TokenModel):
    """A causal language model read as ``sequences -> log-probs (B, T)``; takes a transformers model or a folder.

    The head runs inside its own module, once a forward, on the positions that are needed, and never holds the logits
    of a whole batch. A model that changes its logits after the head (a final soft-cap, a scale) is found at the first
    forward and goes through its full logits instead. ``bf16`` counts for a folder only; ``use_flash_attention_2``
    changes nothing, because FlashAttention runs wherever it fits.
    """

    def __init__(
        self,
        pretrain_or_model: str | nn.Module,
        use_flash_attention_2: bool = False,
        bf16: bool = True,
        *,
        packing_samples: bool = False,
    ):
        if isinstance(pretrain_or_model, str):
            from openrlhf.models.loading import load_plain_causal_lm

            pretrain_or_model = load_plain_causal_lm(pretrain_or_model, bf16=bf16)
        super().__init__(pretrain_or_model, packing_samples=packing_samples)
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
    ) -> ActorOutput:
        """Return the log-probs of a right-padded batch.

        Args:
            sequences: ``(B, S)`` int64.
            attention_mask: ``(B, S)``, true on real tokens.
            temperature: divides the logits.
            where: ``(B, T)`` bool, the only places that are needed; the others stay 0 and cost nothing in the head.
        """
        batch = self.inputs(sequences, attention_mask)
        places = predicted_places(attention_mask)
        if where is not None:
            places = places & where
        chosen = torch.nn.functional.pad(places, (0, 1)).flatten()[batch.indices].nonzero().squeeze(-1)
        mine = self.ring.mine(chosen, batch.input_ids.shape[1])
        targets = sequences[:, 1:][places][mine.span]
        if self.head_is_last:
            hidden = self.last_hidden(batch, sequences, attention_mask)[mine.places]
            head = self.model.get_output_embeddings()
            log_probs = head(hidden, targets=targets, temperature=temperature)
        else:
            logits = self._full_logits(batch, sequences, attention_mask)[mine.places]
            log_probs = _from_full_logits(logits, targets, temperature)
        flat = places.flatten().nonzero().squeeze(-1)
        return ActorOutput(restore(self.ring.join(log_probs, mine.counts), flat, tuple(places.shape)))

    def _full_logits(self, batch: PackedBatch, sequences: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits ``(N, V)`` of the real tokens in the model's dtype."""
        if self.packed:
            return self.model(**packed_arguments(batch)).logits[0]
        return self.model(**padded_arguments(sequences, attention_mask)).logits.flatten(0, 1)[batch.indices]

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
) -> Tensor:
    """Return logits ``(..., V)``; with ``targets`` (M,) the log-probs (M,) of ``hidden`` (M, H)."""
    if targets is None:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)
    hidden = hidden.to(self.weight.dtype)
    return token_log_probs(hidden, self.weight, targets, bias=self.bias, temperature=temperature)


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


def _from_full_logits(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Return the log-probs (M,) of ``logits`` (M, V); float32 exists for a few rows at a time."""
    pairs = list(zip(logits.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True))
    log_probs = [checkpoint(log_probs_from_logits, *pair, temperature, use_reentrant=False) for pair in pairs]
    return torch.cat(log_probs)
