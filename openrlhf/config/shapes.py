"""The shape of a model, read from the ``config.json`` of its folder or known by its name: what its memory depends on.

Light to import, and it never asks a hub: ``--dry_run`` uses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A decoder-only transformer.

    Attributes:
        hidden: width of the residual stream.
        inner: width of the feed-forward layer.
        layers: transformer layers.
        queries: attention heads times their width.
        keys: key-value heads times their width.
        vocabulary: rows of the embedding.
        tied: whether the output head is the embedding.
        gated: whether the feed-forward layer has a gate, so three matrices instead of two.
        experts: feed-forward layers side by side.
        active: how many of them a token goes through.
        scalar: whether the head gives one number, as that of a reward model or a critic.
    """

    hidden: int
    inner: int
    layers: int
    queries: int
    keys: int
    vocabulary: int
    tied: bool = False
    gated: bool = True
    experts: int = 1
    active: int = 1
    scalar: bool = False

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.hidden if self.scalar else self.vocabulary * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        attention = 2 * self.hidden * (self.queries + self.keys)
        router = self.experts * self.hidden if self.experts > 1 else 0
        feed_forward = self.experts * (3 if self.gated else 2) * self.hidden * self.inner
        return attention + feed_forward + router + 2 * self.hidden

    @property
    def parameters(self) -> int:
        """Parameters of the language model; biases are left out."""
        head = 0 if self.tied else self.head
        return self.layers * self.layer + self.vocabulary * self.hidden + head + self.hidden

    @property
    def with_scalar_head(self) -> Shape:
        """The same model as a reward model or critic."""
        return replace(self, tied=False, scalar=True)


LLAMA_3_8B = Shape(4096, 14336, 32, 4096, 1024, 128256)
LLAMA_2_7B = Shape(4096, 11008, 32, 4096, 4096, 32000)
KNOWN = (
    (r"llama-?3\.2-1b", Shape(2048, 8192, 16, 2048, 512, 128256, tied=True)),
    (r"llama-?3\.2-3b", Shape(3072, 8192, 28, 3072, 1024, 128256, tied=True)),
    (r"llama-?3.*\b8b", LLAMA_3_8B),
    (r"llama-?3.*\b70b", Shape(8192, 28672, 80, 8192, 1024, 128256)),
    (r"llama.*\b7b", LLAMA_2_7B),
    (r"llama.*\b13b", Shape(5120, 13824, 40, 5120, 5120, 32000)),
    (r"codellama.*\b34b", Shape(8192, 22016, 48, 8192, 1024, 32000)),
    (r"llama.*\b70b", Shape(8192, 28672, 80, 8192, 1024, 32000)),
    (r"yi-.*\b34b", Shape(7168, 20480, 60, 7168, 1024, 64000)),
    (r"mixtral-8x7b", Shape(4096, 14336, 32, 4096, 1024, 32000, experts=8, active=2)),
    (r"mistral.*\b7b", Shape(4096, 14336, 32, 4096, 1024, 32000)),
    (r"qwen2.*-0\.5b", Shape(896, 4864, 24, 896, 128, 151936, tied=True)),
    (r"qwen2.*-1\.5b", Shape(1536, 8960, 28, 1536, 256, 151936, tied=True)),
    (r"qwen2.*\b3b", Shape(2048, 11008, 36, 2048, 256, 151936, tied=True)),
    (r"qwen2.*\b7b", Shape(3584, 18944, 28, 3584, 512, 152064)),
    (r"qwen2.*\b14b", Shape(5120, 13824, 48, 5120, 1024, 152064)),
    (r"qwen2.*\b32b", Shape(5120, 27648, 64, 5120, 1024, 152064)),
    (r"qwen2.*\b72b", Shape(8192, 29568, 80, 8192, 1024, 152064)),
)
"""Hub names and shapes, the first that fits counts. The shapes are those of the models' published ``config.json``."""
UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "codegen", "mpt")


def shape_of(model: str | None) -> Shape | None:
    """Return the shape of a model folder or of a known hub name; None where neither says it."""
    path = Path(model or "").expanduser() / "config.json"
    if model and path.is_file():
        try:
            return from_config(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # the run itself will say what is wrong with the file
    name = (model or "").lower().replace("_", "-")
    return next((shape for pattern, shape in KNOWN if re.search(pattern, name)), None)


def from_config(config: Mapping[str, Any]) -> Shape:
    """Return the shape that a transformers ``config.json`` describes. Raises KeyError when it lacks a size."""
    config = {**config, **config.get("text_config", {})}

    def size(*names: str, default: int | None = None) -> int:
        found = next((int(config[name]) for name in names if config.get(name) is not None), default)
        if found is None:
            raise KeyError(names[0])
        return found

    hidden, heads = size("hidden_size", "n_embd", "d_model"), size("num_attention_heads", "n_head", "n_heads")
    width = size("head_dim", default=hidden // heads)
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=1)
    inner = size("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * hidden)
    return Shape(
        hidden=hidden,
        inner=size("moe_intermediate_size", default=inner) if experts > 1 else inner,
        layers=size("num_hidden_layers", "n_layer", "n_layers"),
        queries=heads * width,
        keys=size("num_key_value_heads", default=heads) * width,
        vocabulary=size("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", config.get("model_type") in UNGATED)),
        gated=config.get("model_type") not in UNGATED,
        experts=experts,
        active=size("num_experts_per_tok", default=1) if experts > 1 else 1,
    )
