"""How much memory a model takes on one rank: the one estimate, of ``--dry_run`` and of the start of a run.

Bytes on the device of the rank (a GPU, or main memory without one), and apart from them what flags move to main
memory. The figures are those of DeepSpeed's optimizers as this package uses them and of attention that never holds a
matrix of scores; a test compares them with what processes really take.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from openrlhf.config.shapes import Shape

LOGIT_ROWS = 1024
"""Rows of logits that exist at once."""
BUCKET = 500_000_000
"""Elements that DeepSpeed collects before ranks exchange gradients."""
LIVE = 1_000_000_000
"""Elements of sharded weights that DeepSpeed keeps whole for a while."""
ADAM = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what stays (``weights``, ``gradients``, ``optimizer``), what a phase adds, and ``host``."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    gathered: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    cache: float = 0.0
    host: float = 0.0

    def __add__(self, other: Memory) -> Memory:
        return Memory(**{each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)})

    @property
    def device(self) -> float:
        """Bytes on the device."""
        return self.held + self.working

    @property
    def held(self) -> float:
        """Bytes on the device that stay between the phases."""
        return self.weights + self.gradients + self.optimizer

    @property
    def working(self) -> float:
        """Bytes on the device during the phase only."""
        return self.gathered + self.activations + self.logits + self.cache


@dataclass(frozen=True)
class Sharding:
    """How a model is held: the flags that say so, and the number of ranks."""

    zero_stage: int = 0
    ranks: int = 1
    bf16: bool = False
    four_bits: bool = False
    offload: bool = False

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bf16 else 4


def trained(total: int, learning: int, sharding: Sharding) -> Memory:
    """Return what stays of a model of ``total`` parameters of which ``learning`` are trained.

    Weights and gradients have the type of the weights; Adam's moments take 8 bytes a parameter and an fp32 copy 4,
    which bf16 needs and ZeRO makes anyway. ZeRO-1 shares moments and copy over the ranks, ZeRO-2 the gradients too,
    ZeRO-3 also the weights (ZeRO, https://arxiv.org/abs/1910.02054, section 3). With
    ``offload`` gradients and states lie in main memory.
    """
    stage, ranks = sharding.zero_stage, sharding.ranks
    copy = 4 if sharding.bf16 or stage else 0
    gradients = learning * sharding.width / (ranks if stage >= 2 else 1)
    states = learning * (ADAM + copy) / (ranks if stage >= 1 else 1)
    weights = _weights(total, learning, sharding)
    if sharding.offload and stage:
        return Memory(weights=weights, host=states + learning * 4 / ranks)
    return Memory(weights=weights, gradients=gradients, optimizer=states)


def frozen(total: int, sharding: Sharding) -> Memory:
    """Return what stays of a model that is only read; stage 3 shards it, and ``offload`` then moves the shards."""
    weights = _weights(total, 0, sharding)
    if sharding.offload and sharding.zero_stage == 3:
        return Memory(host=weights)
    return Memory(weights=weights)


def backward(shape: Shape, tokens: int, learning: int, sharding: Sharding, *, checkpointing: bool) -> Memory:
    """Return what a micro-batch of ``tokens`` adds at its peak, or the optimizer step if that is more.

    ``checkpointing``: only the input of a layer is kept, and one layer at a time is computed again.
    """
    width, layer = sharding.width, tokens * _layer_bytes(shape, sharding.bf16)
    transient = tokens * width * (2 * shape.inner * shape.active + shape.hidden)
    kept = tokens * shape.layers * width * shape.hidden if checkpointing else layer * shape.layers
    last = tokens * 3 * shape.hidden * width
    logits = _logits(shape, tokens) + 4 * shape.head
    again = layer + transient if checkpointing else transient
    buckets = min(BUCKET, learning) * width if sharding.ranks > 1 and sharding.zero_stage else 0
    activations = kept + last + max(0.0, again - logits) + buckets
    step = 0.0
    if sharding.zero_stage and not sharding.offload:
        step = learning * (4 + (width if sharding.bf16 else 0)) / sharding.ranks
    activations += max(0.0, step - activations - logits)
    return Memory(gathered=_gathered(shape, sharding), activations=activations, logits=logits)


def forward(shape: Shape, tokens: int, sharding: Sharding) -> Memory:
    """Return what a micro-batch of ``tokens`` that is only scored adds at its peak."""
    inside = tokens * sharding.width * (3 * shape.inner * shape.active + 4 * shape.hidden)
    logits = _logits(shape, tokens)
    last = tokens * 3 * shape.hidden * sharding.width
    activations = max(inside, last + logits) - logits
    return Memory(gathered=_gathered(shape, sharding), activations=activations, logits=logits)


def key_values(shape: Shape, tokens: int, width: int) -> float:
    """Return the bytes of the cache of ``tokens`` tokens while they are generated."""
    return 2.0 * tokens * shape.layers * shape.keys * width


def _logits(shape: Shape, tokens: int) -> float:
    """Return the bytes of the logits that exist at once, in fp32 and once more for the soft-max."""
    return 0.0 if shape.scalar else 8.0 * min(tokens, LOGIT_ROWS) * shape.vocabulary


def _weights(total: int, learning: int, sharding: Sharding) -> float:
    """Return the bytes of the weights; those in 4 bits take half a byte (embeddings and norms more, left out)."""
    resting = (total - learning) * (0.5 if sharding.four_bits else sharding.width)
    whole = resting + learning * sharding.width
    return whole if sharding.zero_stage < 3 else whole / sharding.ranks


def _gathered(shape: Shape, sharding: Sharding) -> float:
    """Return the bytes of the sharded weights that are whole at a time."""
    return float(min(shape.parameters, LIVE) * sharding.width) if sharding.zero_stage == 3 else 0.0


def _layer_bytes(shape: Shape, bf16: bool) -> float:
    """Return the bytes that one layer keeps of one token for its backward.

    In fp32 two norms keep three times the residual stream each; then queries, keys, values and the output of the
    attention, and the four steps of a gated feed-forward layer. In bf16 norms keep an fp32 copy.
    """
    inner = shape.active * shape.inner * (4 if shape.gated else 2)
    attention = 2 * shape.queries + 2 * shape.keys
    norms = 16 if bf16 else 24
    return norms * shape.hidden + (attention + inner) * (2 if bf16 else 4)
