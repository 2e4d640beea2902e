"""LoRA adapters on a transformers model, and base weights in 4 bits.

The adapters are put into the model in place, so that it stays the class it was and every forward of ours works on it;
what is written is what ``peft`` reads. LoRA: https://arxiv.org/abs/2106.09685, QLoRA: https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from openrlhf.config.groups import LoRAConfig
from openrlhf.errors import UsageError

ADAPTER = "default"
ALL_LINEAR = "all-linear"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's weights."""


class BaseWeight(NamedTuple):
    """One weight of a model as it would be without adapters or 4-bit storage.

    Attributes:
        name: in the Hugging Face checkpoint of the base model.
        parts: the tensors that it is made of; those that are sharded must be gathered before ``merged`` is called.
        merged: returns the whole tensor, with the adapter added where the weight has one.
    """

    name: str
    parts: list[Tensor]
    merged: Callable[[], Tensor]


def lora_config(
    load_in_4bit: bool, rank: int, alpha: int, dropout: float, targets: Sequence[str] | str | None
) -> LoRAConfig:
    """Return what OpenRLHF's arguments of a model say; no ``targets`` means every linear layer but the head."""
    names = (targets,) if isinstance(targets, str) else tuple(targets or (ALL_LINEAR,))
    return LoRAConfig(load_in_4bit, rank, alpha, names, dropout)


def add_adapters(model: nn.Module, lora: LoRAConfig, source: str, *, head: str | None = None, seed: int = 42) -> None:
    """Freeze ``model`` and put fresh LoRA adapters into it; their product is 0, so outputs stay as they are.

    Args:
        model: a transformers model, sharded or whole.
        lora: rank, scale, dropout, targets. ``all-linear`` means every linear layer but the output head.
        source: the folder or hub name of the base model, written into the adapter's config.
        head: name of a module that is trained whole beside the adapters, as the head of a reward model.
        seed: of the adapters' first weights, which are the same on every rank.

    Raises:
        UsageError: a name in ``--target_modules`` is the name of no layer that can have an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = _targets(model, lora.target_modules, head)
    config = LoraConfig(
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        base_model_name_or_path=source,
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=targets,
        bias="none",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model, ADAPTER)
    if head:
        model.get_submodule(head).requires_grad_(True)
        # For peft: this module is in the file as it is. In the model it stays an ordinary module.
        config.modules_to_save = [head]


def linear_layers(model: nn.Module, head: str | None = None) -> list[str]:
    """Return the names of the linear layers that can have an adapter: not ``head``, and none with a tied weight."""
    from transformers.pytorch_utils import Conv1D

    tied = model.get_input_embeddings().weight
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name != head and module.weight is not tied
    ]


def _targets(model: nn.Module, asked: tuple[str, ...], head: str | None) -> list[str]:
    """Return the ends of the names of the layers to adapt; raise UsageError when one asked for ends no name."""
    layers, output = linear_layers(model, head), model.get_output_embeddings()
    inner = sorted({name.rpartition(".")[2] for name in layers if model.get_submodule(name) is not output})
    absent = [
        target
        for target in asked
        if target != ALL_LINEAR and not any(name == target or name.endswith(f".{target}") for name in layers)
    ]
    if absent:
        raise UsageError(
            f"--target_modules {' '.join(absent)}: the model has no such linear layer of its own; it has "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in layers}))}"
        )
    return sorted({target for target in asked if target != ALL_LINEAR} | set(inner if ALL_LINEAR in asked else ()))


def has_adapters(model: nn.Module) -> bool:
    """Return whether :func:`add_adapters` was called on ``model``."""
    return ADAPTER in (getattr(model, "peft_config", None) or {})


def trained_names(model: nn.Module) -> set[str]:
    """Return the names of the weights that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute as its base inside the block.

    Raises:
        UsageError: it has no adapters, so that nothing would change.
    """
    if not has_adapters(model):
        raise UsageError("the model has no adapters to leave out: train it with --lora_rank")
    layers = _adapted_layers(model)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def _adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with an adapter by name."""
    if not has_adapters(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def base_weights(model: nn.Module) -> Iterator[BaseWeight]:
    """Yield every weight and saved buffer of ``model`` with its adapter merged in, under the names of its base.

    A weight that is tied to an earlier one is left out. 4-bit weights become numbers of the type they were made from.
    """
    layers = {f"{name}.base_layer.weight": layer for name, layer in _adapted_layers(model).items()}
    seen: set[int] = set()
    for name, tensor in _stored(model):
        if id(tensor) in seen or ".lora_" in name:
            continue
        seen.add(id(tensor))
        layer = layers.get(name)
        adapter = [p for n, p in layer.named_parameters() if "lora_" in n] if layer is not None else []
        yield BaseWeight(name.replace(".base_layer.", "."), [tensor, *adapter], partial(_merged, tensor, layer))


def _stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and saved buffers of ``model``, without what 4-bit weights keep beside them."""
    known = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers(remove_duplicate=False))}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in known:
            yield name, tensor


def _merged(weight: Tensor, layer: Any) -> Tensor:
    """Return ``weight`` as numbers, plus what the adapter of ``layer`` adds to it, in the type of the weight."""
    whole = dequantized(weight)
    if layer is None:
        return whole
    return (whole.float() + layer.get_delta_weight(ADAPTER).float()).to(whole.dtype)


@torch.no_grad()
def dequantized(weight: Tensor) -> Tensor:
    """Return a 4-bit weight as numbers; any other as it is."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.detach(), state)


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """Return how many numbers the parameters of ``module`` stand for, and how many of them are trained."""
    sizes = [(_count(parameter), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def _count(parameter: nn.Parameter) -> int:
    """Return the true size of a parameter; one that ZeRO-3 shards is empty, one in 4 bits holds two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def quantization(bf16: bool) -> Any:
    """Return transformers' description of QLoRA's base weights: NF4, constants quantized too."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def keep_one_layout(model: nn.Module) -> None:
    """Forbid bitsandbytes to rearrange 4-bit weights for inference on a CPU.

    It would do so in the first forward in evaluation mode; training could not go on from there, and the same weights
    would give other numbers in training than in evaluation.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def write_adapter(model: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapter of ``model`` to ``folder`` as ``peft`` reads it.

    ``state`` has the trained weights, whole, under their names in ``model``. A model with a head brings its config,
    which says how the head was made and how rewards are normalised.
    """
    from safetensors.torch import save_file

    config = model.peft_config[ADAPTER]
    named = {PREFIX + name.replace(f".{ADAPTER}.", "."): tensor.contiguous() for name, tensor in state.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    if config.modules_to_save:
        of_model = copy.deepcopy(model.config)
        if hasattr(of_model, "quantization_config"):
            del of_model.quantization_config
        of_model.save_pretrained(folder)
    config.save_pretrained(str(folder))
    path = folder / CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
