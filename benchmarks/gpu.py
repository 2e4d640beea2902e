"""What only a GPU can show: SFT speed and memory, attention without padding, log-probs without logits.

    python benchmarks/gpu.py [--out DIR] [--size 0.5b|1.5b] [--peak-tflops N]
    python benchmarks/gpu.py --size tiny          (a few seconds, any machine: shows that the file works)

Models have random weights, so nothing is downloaded. Each part prints its figures against the plain way of doing the
same thing, in turn, medians of several rounds. Without DeepSpeed SFT runs with torch's fused AdamW. For SFT and reward
models against TRL, memory included, run ``compare.py``, which uses the GPU too. MFU counts 6 floating-point operations
a parameter and token, embeddings left out, and those of causal attention, against the bf16 peak of the device.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PEAK_TFLOPS = {"H100": 989, "H200": 989, "GH200": 989, "B200": 2250, "A100": 312, "L40S": 362, "4090": 165}
"""Dense bf16, as the vendor states it."""
Figures = dict[str, float]


class Size(NamedTuple):
    """A model of Qwen2's layout and the batch that it is measured on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    rows: int
    longest: int


SIZES = {
    "tiny": Size(64, 2, 4, 2, 128, 512, 4, 64),
    "0.5b": Size(896, 24, 14, 2, 4864, 151_936, 16, 2048),
    "1.5b": Size(1536, 28, 12, 2, 8960, 151_936, 8, 2048),
}


def build(size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a causal language model with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.longest,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        return Qwen2ForCausalLM(config).to(dtype)


def batch(size: Size, device: torch.device, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded tokens and their mask; lengths are log-normal, as those of conversations are."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(size.rows, generator=generator).mul(0.7).add(math.log(size.longest / 4)).exp()
    lengths = spread.long().clamp(8, size.longest)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    tokens = torch.randint(0, size.vocabulary, mask.shape, generator=generator)
    return (tokens * mask).to(device), mask.to(device)


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turn(ways: dict[str, Callable[[int], Any]], device: torch.device, rounds: int) -> dict[str, Figures]:
    """Call every way in turn; return the median seconds and the peak memory in GiB of each.

    A way gets the number of the round. Each is called twice before anything is measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks = dict.fromkeys(ways, 0.0)
    for number in range(-2, rounds):
        for name, way in ways.items():
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            synchronise(device)
            start = time.perf_counter()
            way(number)
            synchronise(device)
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
    return {name: {"seconds": statistics.median(found), "peak GiB": peaks[name]} for name, found in seconds.items()}


def log_prob_part(size: Size, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Figures]:
    """Compare log-probs in chunks with log-softmax of all logits: forward and backward of the head alone."""
    from openrlhf.ops.logprobs import token_log_probs

    tokens = size.rows * size.longest // 2
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(tokens, size.hidden, generator=generator).to(device, dtype).requires_grad_(True)
    weight = torch.randn(size.vocabulary, size.hidden, generator=generator).mul(0.02)
    weight = weight.to(device, dtype).requires_grad_(True)
    targets = torch.randint(0, size.vocabulary, (tokens,), generator=generator).to(device)

    def clear() -> None:
        hidden.grad = weight.grad = None

    def naive(_: int) -> None:
        clear()
        logits = (hidden @ weight.t()).float()
        torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).sum().backward()

    def chunked(_: int) -> None:
        clear()
        token_log_probs(hidden, weight, targets).sum().backward()

    return in_turn({"all logits": naive, "chunked": chunked}, device, rounds)


def attention_part(size: Size, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Figures]:
    """Compare a forward and backward of the whole model with and without padding."""
    from openrlhf.models.actor import Actor

    actor = Actor(build(size, device, dtype))
    if actor.verify() is not None:
        raise SystemExit(f"padding stays: {actor.reason}")

    def way(packed: bool) -> Callable[[int], None]:
        def call(number: int) -> None:
            from openrlhf.models.attention import PADDED, UNPADDED, switch_attention

            actor.packed = packed
            switch_attention(actor.model, UNPADDED if packed else PADDED)
            actor.zero_grad(set_to_none=True)
            actor(*batch(size, device, number)).log_probs.sum().backward()

        return call

    figures = in_turn({"padded": way(False), "without padding": way(True)}, device, rounds)
    real = statistics.median(int(batch(size, device, number)[1].sum()) for number in range(rounds))
    for found in figures.values():
        found["tokens/s"] = real / found["seconds"]
    return figures


def sft_part(size: Size, device: torch.device, rounds: int, peak: float | None) -> dict[str, Figures]:
    """Measure optimizer steps of SFT: bf16 weights with an fp32 master copy, as ``--bf16`` trains."""
    step, name = _our_step(size, device)
    figures = in_turn({name: step}, device, rounds)
    model = build(size, torch.device("meta"), torch.bfloat16)
    lengths = [batch(size, torch.device("cpu"), number)[1].sum(dim=1).tolist() for number in range(rounds)]
    work = statistics.median(operations(model, size, found) for found in lengths)
    tokens = statistics.median(sum(found) for found in lengths)
    for found in figures.values():
        found["tokens/s"] = tokens / found["seconds"]
        if peak:
            found["MFU %"] = 100 * work / found["seconds"] / (peak * 1e12)
    return figures


def _our_step(size: Size, device: torch.device) -> tuple[Callable[[int], None], str]:
    """Return one optimizer step of SFT and what it is made of."""
    from openrlhf.models.actor import Actor

    actor = Actor(build(size, device, torch.bfloat16))
    if importlib.util.find_spec("deepspeed") is None:
        return _plain_step(actor, size, device), "ours, torch fused AdamW (no DeepSpeed here)"
    from openrlhf.config.groups import DeepSpeedConfig, OptimConfig
    from openrlhf.strategy.deepspeed import DeepSpeedStrategy

    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=2), bf16=True, micro_batch_size=size.rows)
    strategy.setup_distributed()
    engine = strategy.prepare_train(actor, OptimConfig(learning_rate=1e-5), 1000).train()

    def step(number: int) -> None:
        sequences, mask = batch(size, device, number)
        loss = -engine(sequences, mask).log_probs.sum()
        engine.backward(loss, float(mask.sum()))
        engine.step()

    return step, "ours, DeepSpeed ZeRO-2"


def _plain_step(actor: Any, size: Size, device: torch.device) -> Callable[[int], None]:
    """Return a step with fp32 master weights kept by hand."""
    weights = [weight for weight in actor.parameters() if weight.requires_grad]
    masters = [torch.nn.Parameter(weight.detach().float()) for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=1e-5, fused=True)

    def step(number: int) -> None:
        sequences, mask = batch(size, device, number)
        (-actor(sequences, mask).log_probs.sum() / mask.sum()).backward()
        for weight, master in zip(weights, masters, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    return step


def operations(model: Any, size: Size, lengths: list[int]) -> float:
    """Return the floating-point operations of one training step over sequences of ``lengths``."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    matrices += size.vocabulary * size.hidden
    attention = sum(6 * size.layers * size.hidden * length**2 for length in lengths)
    return 6.0 * matrices * sum(lengths) + attention


def peak_tflops(device: torch.device, given: float | None) -> float | None:
    """Return the bf16 peak of the device: as given, or by its name, or None."""
    if given or device.type == "cpu":
        return given
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def show(title: str, figures: dict[str, Figures]) -> None:
    """Print a table."""
    names = list(next(iter(figures.values())))
    width = max(map(len, figures))
    print("\n" + "".join([f"{title:{max(width, len(title))}}", *(f"{name:>12}" for name in names)]))
    for way, found in figures.items():
        print("".join([f"{way:{max(width, len(title))}}", *(f"{found[name]:>12,.4g}" for name in names)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="0.5b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-tflops", type=float)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    size = SIZES[arguments.size]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and arguments.size != "tiny":
        raise SystemExit("no GPU here; --size tiny shows that this file works")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{hardware}, torch {torch.__version__}, size {arguments.size}, {arguments.rounds} rounds")
    peak = peak_tflops(device, arguments.peak_tflops)
    parts: dict[str, Callable[[], dict[str, Figures]]] = {
        "log-probs of the head": lambda: log_prob_part(size, device, torch.bfloat16, arguments.rounds),
        "attention, whole model": lambda: attention_part(size, device, torch.bfloat16, arguments.rounds),
        "SFT step": lambda: sft_part(size, device, arguments.rounds, peak),
    }
    results = {}
    for title, part in parts.items():
        results[title] = part()
        show(title, results[title])
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        described = {"hardware": hardware, "torch": torch.__version__, "size": arguments.size, "results": results}
        (arguments.out / "gpu.json").write_text(json.dumps(described, indent=2) + "\n")


if __name__ == "__main__":
    main()
