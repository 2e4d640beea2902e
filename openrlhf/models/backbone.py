"""The part that language and value models share: hidden states without padding, and the check that they are right.

``B`` sequences, ``S`` padded length, ``N`` real tokens, ``H`` hidden size.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.errors import UsageError
from openrlhf.models import adapters
from openrlhf.models.attention import PADDED, UNPADDED, register, switch_attention
from openrlhf.models.packing import LEAST_SHARED, PackedBatch, position_ids_of, remove_padding
from openrlhf.models.ring import Ring
from openrlhf.ops.logprobs import rows_round_to
from openrlhf.ops.router_loss import load_balancing_loss

LOG = logging.getLogger(__name__)
REFERENCE = "eager"
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 5e-2
CHECK_LENGTHS = (5, 8)
ALONE = Ring()


class TokenModel(nn.Module):
    """A transformers model of token sequences whose forward skips padding where that is known to be exact.

    Attributes:
        model: the transformers model.
        packed: whether padding is removed before the forward; known once :meth:`verify` has run.
        reason: why padding stays, when it does.
        merges: whether what several sequences of a batch begin with is computed once; known with ``packed``.
        padded_attention: transformers' name of the attention that is right for padded batches.
        aux_loss_coef: weight of the load-balancing loss of a mixture of experts; 0 leaves it out.
        ring: the ranks that share each batch.
    """

    def __init__(self, model: nn.Module, *, packing_samples: bool = False, aux_loss_coef: float = 0.0):
        super().__init__()
        register()
        if aux_loss_coef > 0:
            check_router(model)
        self.model = model
        self.aux_loss_coef = aux_loss_coef
        self.train(model.training)
        self._insisted_by = "--packing_samples" if packing_samples else None
        self.ring = ALONE
        self.packed = False
        self.merges = False
        self.verified = False
        self.reason: str | None = None
        self.padded_attention = PADDED

    @property
    def config(self):
        """The transformers config of the model."""
        return self.model.config

    @property
    def backbone(self) -> nn.Module:
        """The transformer without its head."""
        return _backbone(self.model)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter is trained instead of the weights."""
        return adapters.has_adapters(self.model)

    def without_adapter(self) -> AbstractContextManager:
        """Let the model compute as its base inside a block; raises UsageError when it has no adapter.

        So the policy is its own reference: ``with torch.no_grad(), actor.without_adapter(): ...``. Inside, nothing
        is trained. All ranks of a sharded model enter it together.
        """
        return adapters.without_adapters(self.model)

    def export_name(self, name: str) -> str:
        """Return the name in the saved folder of the transformers model's weight ``name``."""
        return name

    def verify(self) -> str | None:
        """Check on a tiny input that padding can be removed, choose the attention, return why padding stays or None.

        The first forward calls it; call it earlier to fail earlier. All ranks of a sharded model call it together.

        Raises:
            UsageError: padding must be removed and the architecture cannot do it.
        """
        self.verified = True
        with evaluating(self), quiet(), torch.no_grad():
            self.padded_attention = choose_padded(self.model)
            self.reason = verify_unpadded(self.model, self.ring)
            self.merges = self.reason is None and self.ring.size == 1 and merging_is_exact(self.model)
        self.packed = self.reason is None
        switch_attention(self.model, UNPADDED if self.packed else self.padded_attention)
        if self._insisted_by and not self.packed:
            raise UsageError(
                f"{self._insisted_by}: {architecture(self.model)} cannot be packed: {self.reason}. "
                "Leave the flag out; padded batches give the same gradients."
            )
        if self.reason and not (torch.distributed.is_initialized() and torch.distributed.get_rank()):
            tell_padding(architecture(self.model), self.reason)
        return self.reason

    def insist_on_packing(self, flag: str) -> None:
        """Make it an error that names ``flag`` when padding cannot be removed."""
        self._insisted_by = flag

    def share_batches(self, ring: Ring) -> None:
        """Compute every batch together with the other ranks of ``ring``, which must all be given the same ones.

        Raises:
            UsageError: the key-value heads cannot be dealt in strides of ``ring.head_stride``.
        """
        config = self.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if heads % ring.head_stride:
            raise UsageError(
                f"--ring_head_stride {ring.head_stride} does not divide the {heads} key-value heads of "
                f"{architecture(self.model)}: use a divisor"
            )
        self.ring, self.verified = ring, False
        self.insist_on_packing("--ring_attn_size")

    def inputs(self, sequences: Tensor, attention_mask: Tensor) -> PackedBatch:
        """Return the batch without padding, the own chunk of it in a ring; the first call verifies the model."""
        if not self.verified:
            self.verify()
        multiple = rows_round_to(self.device, self.model.dtype) * self.ring.size
        # The experts of a mixture are balanced over the tokens of the data.
        merges = self.merges and not self.aux_loss_coef
        return self.ring.share(remove_padding(sequences, attention_mask, multiple, LEAST_SHARED if merges else None))

    def hidden_and_aux(self, batch: PackedBatch, sequences: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden states ``(M, H)`` of the tokens, and the load-balancing loss of this batch.

        The real tokens come first; in a ring they are those of the own chunk.
        """
        output, aux_loss = self.run(self.backbone, batch, sequences, attention_mask)
        return self.without_padding(output.last_hidden_state, batch), aux_loss

    def run(
        self, module: nn.Module, batch: PackedBatch, sequences: Tensor, attention_mask: Tensor
    ) -> tuple[Any, Tensor]:
        """Return what ``module``, the model or its backbone, gives for a batch, and the load-balancing loss.

        The loss is a scalar, already times its coefficient; 0 where it is left out or no gradient is asked for. In a
        ring it is that of the own tokens.
        """
        arguments = packed_arguments(batch) if self.packed else padded_arguments(sequences, attention_mask)
        if not (self.aux_loss_coef and torch.is_grad_enabled()):
            return module(**arguments), torch.zeros((), device=sequences.device)
        output = module(**arguments, output_router_logits=True)
        given = [logits.flatten(0, -2)[None] for logits in output.router_logits if logits is not None]
        real = self.ring.mine(torch.arange(len(batch.indices), device=sequences.device), batch.input_ids.shape[1])
        layers = [self.without_padding(logits, batch)[real.places] for logits in given]
        if not len(real.places):
            return output, given[0].sum() * 0.0
        top_k = self.config.get_text_config().num_experts_per_tok
        return output, self.aux_loss_coef * load_balancing_loss(layers, top_k)

    def without_padding(self, values: Tensor, batch: PackedBatch) -> Tensor:
        """Return ``values`` of :meth:`run`, one a token, as ``(M, ...)`` without those of padding.

        Of a packed batch the filler behind the real tokens stays.
        """
        return batch.whole(values[0]) if self.packed else values.flatten(0, 1)[batch.indices]


@functools.cache
def tell_padding(model: str, reason: str) -> None:
    """Say once that batches of ``model`` are computed with their padding, which only costs time."""
    LOG.warning("%s: padding is computed: %s", model, reason)


def packed_arguments(batch: PackedBatch) -> dict:
    """Return the forward's keyword arguments for one row of concatenated sequences."""
    return {
        "input_ids": batch.input_ids,
        "attention_mask": torch.ones_like(batch.input_ids),
        "position_ids": batch.position_ids,
        "use_cache": False,
        "unpadded": batch.rows,
    }


def padded_arguments(sequences: Tensor, attention_mask: Tensor) -> dict:
    """Return the forward's keyword arguments for padded sequences."""
    return {
        "input_ids": sequences,
        "attention_mask": attention_mask.long(),
        "position_ids": position_ids_of(attention_mask),
        "use_cache": False,
    }


def choose_padded(model: nn.Module) -> str:
    """Return the attention for padded batches: SDPA, or the plain one where SDPA would leave something out.

    SDPA drops what it does not know without a word. The soft-cap of attention scores hardly shows on a tiny input, so
    the config is asked about that one.
    """
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return REFERENCE
    sequences = _check_sequences(model)
    expected = _each_alone(model, sequences, REFERENCE)
    if switch_attention(model, PADDED) and _close(_each_alone(model, sequences, PADDED), expected):
        return PADDED
    return REFERENCE


def verify_unpadded(model: nn.Module, ring: Ring = ALONE) -> str | None:
    """Return why the unpadded attention is not exact for ``model``, or None.

    Two short sequences in one row must give the hidden states that each gives alone under transformers' own plain
    attention; the ranks of ``ring`` compute it together. ``model`` is in evaluation mode and gradients are off; its
    attention may be another one afterwards.
    """
    return _verify(model, _check_sequences(model), ring)


def merging_is_exact(model: nn.Module) -> bool:
    """Return whether the same holds for two sequences whose common beginning is in the row once."""
    first, second = _check_sequences(model)
    return _verify(model, (first, torch.cat([first[:, :-1], second], dim=1)), ALONE, least_shared=1) is None


def _verify(
    model: nn.Module, sequences: tuple[Tensor, Tensor], ring: Ring, least_shared: int | None = None
) -> str | None:
    expected = _each_alone(model, sequences, REFERENCE)
    if not switch_attention(model, UNPADDED):
        return "its attention cannot be replaced"
    lengths = torch.tensor([row.shape[1] for row in sequences], device=expected.device)
    width = int(lengths.max())
    padded = torch.cat([nn.functional.pad(row, (0, width - row.shape[1])) for row in sequences])
    real = torch.arange(width, device=padded.device) < lengths[:, None]
    batch = ring.share(remove_padding(padded, real, least_shared=least_shared))
    try:
        packed = _backbone(model)(**packed_arguments(batch)).last_hidden_state[0]
        mine = ring.mine(torch.arange(len(expected), device=packed.device), len(packed))
        packed = ring.join(batch.whole(packed)[mine.places], mine.counts)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None if _close(packed, expected) else "packed sequences see each other"


def _check_sequences(model: nn.Module) -> tuple[Tensor, ...]:
    """Return the two short sequences of the check, each ``(1, L)``."""
    tokens = torch.arange(sum(CHECK_LENGTHS), device=next(model.parameters()).device)
    vocabulary = model.get_input_embeddings().num_embeddings
    return tokens.mul(7).add(3).remainder(vocabulary)[None].split(CHECK_LENGTHS, dim=1)


def _each_alone(model: nn.Module, sequences: tuple[Tensor, ...], attention: str) -> Tensor:
    """Return the last hidden states ``(N, H)`` of the sequences, each in a forward of its own."""
    switch_attention(model, attention)
    return torch.cat([_backbone(model)(input_ids=row, use_cache=False).last_hidden_state[0] for row in sequences])


def _backbone(model: nn.Module) -> nn.Module:
    """Return the transformer of ``model`` without its head."""
    return getattr(model, model.base_model_prefix, None) or model.get_decoder()


def _close(given: Tensor, expected: Tensor) -> bool:
    """Return whether two tensors of hidden states are equal but for rounding in the model's dtype."""
    error = torch.linalg.vector_norm(given.float() - expected.float()) / torch.linalg.vector_norm(expected.float())
    return bool(error <= TOLERANCE.get(expected.dtype, HALF_TOLERANCE))


def check_router(model: nn.Module) -> None:
    """Raise UsageError when ``model`` has no router whose choices could be balanced."""
    config = model.config.get_text_config()
    if not (hasattr(config, "output_router_logits") and hasattr(config, "num_experts_per_tok")):
        raise UsageError(
            f"--aux_loss_coef balances the experts of a mixture, and {architecture(model)} is none whose router "
            "transformers shows; leave it at 0"
        )


def architecture(model: nn.Module) -> str:
    """Return the name of the model's family, e.g. ``qwen2 (Qwen2ForCausalLM)``."""
    return f"{model.config.model_type} ({type(model).__name__})"


def enable_gradient_checkpointing(model: nn.Module, use_reentrant: bool = False) -> None:
    """Recompute each layer in the backward instead of keeping its activations; takes ours or a transformers model."""
    model = model.model if isinstance(model, TokenModel) else model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the screen; what matters is checked here."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put ``module`` in evaluation mode for a while."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
