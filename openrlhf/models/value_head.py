"""A transformer with one number a token: the reward model and the critic.

It is transformers' own sequence classifier with one label, so what is saved loads anywhere. ``B`` sequences,
``S`` padded length, ``T = S - 1``.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from openrlhf.config.groups import ModelConfig
from openrlhf.errors import UsageError
from openrlhf.models.adapters import lora_config
from openrlhf.models.backbone import TokenModel
from openrlhf.models.loading import HEAD, load_value_model
from openrlhf.models.packing import restore

Read = Literal["last", "each"]


class ValueModel(TokenModel):
    """A sequence classifier with one label, read token by token.

    ``config.mean``, ``config.std`` and ``config.normalize_reward`` say how rewards are normalised;
    ``config.value_head_prefix`` is the head's name in the saved weights.
    """

    def __init__(
        self, model: nn.Module, *, read: Read = "each", packing_samples: bool = False, aux_loss_coef: float = 0.0
    ):
        super().__init__(model, packing_samples=packing_samples, aux_loss_coef=aux_loss_coef)
        self.read = read
        self.head.forward = types.MethodType(_head_forward, self.head)

    @property
    def head(self) -> nn.Linear:
        """The linear layer ``hidden -> 1``."""
        return getattr(self.model, HEAD)

    def forward(
        self, sequences: Tensor, attention_mask: Tensor, read: Read | None = None, with_aux_loss: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return what ``read`` names, or what the model was made to read, as float32.

        Args:
            sequences: ``(B, S)`` int64, padded on either side.
            attention_mask: ``(B, S)``, true on real tokens.
            read: ``"each"``: the value of every token, ``(B, S)``, normalised when the config says so, 0 on padding.
                ``"last"``: the reward ``(B,)``, read at the last real token, normalised when the config says so and
                the model is in evaluation mode.
            with_aux_loss: return the load-balancing loss of a mixture of experts too, a scalar, times its coefficient.
        """
        read = read or self.read
        if read not in ("last", "each"):
            raise ValueError(f"read is 'last' or 'each', not {read!r}")
        batch = self.inputs(sequences, attention_mask)
        hidden, aux_loss = self.hidden_and_aux(batch, sequences, attention_mask)
        if read == "last":
            mine = self.ring.mine(_last_of_each(attention_mask), len(hidden))
            found = self.ring.join(self.head(hidden[mine.places]).squeeze(-1), mine.counts)
            found = found if self.training else self._normalised(found)
        else:
            mine = self.ring.mine(torch.arange(len(batch.indices), device=hidden.device), len(hidden))
            values = self.ring.join(self.head(hidden).squeeze(-1)[mine.places], mine.counts)
            found = restore(self._normalised(values), batch.indices, tuple(sequences.shape))
        return (found, aux_loss) if with_aux_loss else found

    def reward(self, sequences: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the reward ``(B,)`` of each sequence, read at its last real token."""
        return self(sequences, attention_mask, read="last")

    def values(self, sequences: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the values ``(B, T)``; column ``t`` is what is expected before ``sequences[:, t + 1]`` is chosen."""
        return self(sequences, attention_mask, read="each")[:, :-1]

    def export_name(self, name: str) -> str:
        """Return the name in the saved folder of the transformers model's weight ``name``: the head has its own."""
        return self.config.value_head_prefix + name.removeprefix(HEAD) if name.startswith(f"{HEAD}.") else name

    def _normalised(self, rewards: Tensor) -> Tensor:
        if not getattr(self.config, "normalize_reward", False):
            return rewards
        return (rewards - getattr(self.config, "mean", 0.0)) / getattr(self.config, "std", 1.0)


def _head_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
    """Return the values ``(..., 1)`` of ``hidden`` (..., H), computed in float32 whatever the weights are.

    The work happens inside the module because ZeRO-3 gathers a weight around the forward of its own module only.
    """
    bias = None if self.bias is None else self.bias.float()
    return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def _last_of_each(attention_mask: Tensor) -> Tensor:
    """Return ``(B,)``: which of the real tokens, counted through the batch, is the last of each sequence."""
    return attention_mask.long().sum(dim=1).cumsum(dim=0) - 1


def get_llm_for_sequence_regression(
    model_name_or_path: str,
    model_type: Literal["reward", "critic"],
    *,
    bf16: bool = True,
    load_in_4bit: bool = False,
    lora_rank: int = 0,
    lora_alpha: int = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    normalize_reward: bool = False,
    init_value_head: bool = False,
    value_head_prefix: str = HEAD,
    packing_samples: bool = False,
) -> ValueModel:
    """Return a reward model (called, it gives ``(B,)``) or a critic (``(B, S)``), with OpenRLHF's argument names.

    Raises:
        UsageError: ``model_type`` is neither, or ``target_modules`` names no layer of the model.
        DataError: as :func:`load_value_model`.
    """
    if model_type not in ("reward", "critic"):
        raise UsageError(f"model_type is 'reward' or 'critic', not {model_type!r}")
    model = load_value_model(
        model_name_or_path,
        ModelConfig(pretrain=model_name_or_path, bf16=bf16),
        lora=lora_config(load_in_4bit, lora_rank, lora_alpha, lora_dropout, target_modules),
        init_value_head=init_value_head,
        value_head_prefix=value_head_prefix,
        normalize_reward=normalize_reward,
    )
    return ValueModel(model, read="last" if model_type == "reward" else "each", packing_samples=packing_samples)
