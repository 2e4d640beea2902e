"""The gradients that adapters should get: those of the whole weights by plain torch, and the chain rule.

A policy with adapters computes as its base with ``W + s B A`` for each weight ``W``, so its loss is the formula of
that model, with the base for its reference. With the gradient ``G`` of the whole weight, ``A`` gets ``s B^T G`` and
``B`` gets ``s G A^T``. Adapters begin with ``B = 0``; here they have learned something already.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from openrlhf.config.groups import LoRAConfig
from openrlhf.strategy.deepspeed import DeepSpeedStrategy

LORA = LoRAConfig(lora_rank=4, lora_alpha=8)
SCALE = 2.0
ADAPTED = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down"))
FOLDER = "lora"


def learned(name: str, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return ``A (rank, in)`` and ``B (out, rank)`` of the weight ``name`` with ``shape (out, in)``, float64."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    sizes = ((LORA.lora_rank, shape[1]), (shape[0], LORA.lora_rank))
    return tuple((0.2 * torch.randn(size, generator=generator)).double() for size in sizes)


def write_models(folder: Path) -> None:
    """Write the base that is ``folder/frozen`` once more, and beside it what it becomes with adapters."""
    from transformers import AutoModelForCausalLM

    target = folder / FOLDER
    shutil.copytree(folder / "frozen", target / "frozen")
    model = AutoModelForCausalLM.from_pretrained(folder / "frozen", dtype=torch.float64)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(ADAPTED):
                down, up = learned(name, weight.shape)
                weight += SCALE * up @ down
    model.save_pretrained(target / "policy")


def teach(model: nn.Module, strategy: DeepSpeedStrategy) -> None:
    """Give the adapters of ``model`` what :func:`learned` returns."""
    shapes = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in model.named_parameters()}
    adapters = {name: weight for name, weight in model.named_parameters() if ".lora_" in name}
    with torch.no_grad(), strategy.gather(adapters.values(), modifier_rank=0):
        for name, weight in adapters.items():
            layer, _, part = name.partition(".lora_")
            both = learned(f"{layer}.weight", shapes[f"{layer}.base_layer.weight"])
            weight.copy_(both[part.startswith("B")])


def adapted(formula: Callable[[str], tuple[nn.Module, Tensor]]) -> Callable[[str], tuple[Any, Tensor]]:
    """Return the formula of the adapters of a policy: their parameters, and what has their gradients."""

    def of_adapters(folder: str) -> tuple[Any, Tensor]:
        model, loss = formula(f"{folder}/{FOLDER}")
        loss.backward()
        parameters, loss = {}, torch.zeros((), dtype=torch.float64)
        for name, weight in model.named_parameters():
            if name.endswith(ADAPTED):
                down, up = (part.requires_grad_() for part in learned(name, weight.shape))
                loss = loss + (weight.grad * (SCALE * up @ down)).sum()
                layer = name.removesuffix(".weight")
                parameters |= {f"{layer}.lora_A.default.weight": down, f"{layer}.lora_B.default.weight": up}
        return SimpleNamespace(named_parameters=parameters.items), loss

    return of_adapters
