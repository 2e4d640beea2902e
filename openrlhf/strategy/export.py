"""From an engine or a module to a Hugging Face folder that anyone can load: weights, config, tokenizer.

Of a model with adapters that is the folder of the adapter, which ``peft`` loads onto the base model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openrlhf.models.adapters import has_adapters, trained_names, write_adapter
from openrlhf.models.backbone import quiet
from openrlhf.strategy import files
from openrlhf.strategy.comm import SoloComm
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.disk import SharedDisk
from openrlhf.strategy.engine import TrainEngine, named_weights

MAX_SHARD_SIZE = "5GB"


def unwrap(source: TrainEngine | nn.Module) -> tuple[nn.Module, Callable[[str], str]]:
    """Return the Hugging Face model inside an engine, an Actor or a ValueModel, and how files name its weights."""
    module, name_in_file = source, _same
    while not hasattr(module, "save_pretrained"):
        name_in_file = getattr(module, "export_name", name_in_file)
        module = module.module if hasattr(module, "module") else module.model
    return module, name_in_file


def export_model(
    source: TrainEngine | nn.Module,
    strategy: DeepSpeedStrategy,
    path: str | Path,
    tokenizer: Any = None,
) -> None:
    """Write the model of ``source`` to ``path``: safetensors, config and, if given, the tokenizer.

    A model with adapters writes these alone, with its head where it has one.

    All ranks must call it; rank 0 writes. The folder is there whole or not at all, and an older model in it is
    replaced only by a whole new one; other files in it stay. Wrappers name their weights with ``export_name``. Raises
    ``InfraError`` on all ranks when the disk refuses.
    """
    path = Path(path)
    model, name_in_file = unwrap(source)
    if has_adapters(model):
        # The head keeps the name that it has in transformers' class: that is where peft looks for it.
        trained, name_in_file = trained_names(model), _same
    else:
        trained = None
    weights = named_weights(model, strategy, wanted=strategy.rank == 0, only=trained)
    state = {name_in_file(name): tensor for name, tensor in weights}
    SharedDisk(path, strategy.comm).on_main(lambda: _write(model, state, path, tokenizer), "export the model to")


def write_model(model: nn.Module, path: str | Path, tokenizer: Any = None) -> None:
    """Write a transformers model of this process alone, as `export_model` does. Raises ``InfraError``."""
    SharedDisk(Path(path), SoloComm()).on_main(
        lambda: _write(model, model.state_dict(), Path(path), tokenizer), "export the model to"
    )


def _write(model: nn.Module, state: dict[str, torch.Tensor], path: Path, tokenizer: Any) -> None:
    """Write beside, or inside an existing ``path``, then put into place. Raises ``OSError``, ``RuntimeError``."""
    staging = path / ".export.tmp" if path.is_dir() else path.with_name(path.name + ".part")
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        with quiet():
            if has_adapters(model):
                write_adapter(model, state, staging)
            else:
                model.save_pretrained(staging, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        files.publish_model(staging, path)
    except (OSError, RuntimeError):
        shutil.rmtree(staging, ignore_errors=True)
        raise
    except _safetensors_error() as error:
        # A full disk, reported by an error class of its own, which is a plain Exception.
        shutil.rmtree(staging, ignore_errors=True)
        raise OSError(str(error)) from error


def _same(name: str) -> str:
    return name


def _safetensors_error() -> type[Exception]:
    from safetensors import SafetensorError

    return SafetensorError
