"""Loading transformers models: one path for policies and for models with a value head.

Says clearly what is wrong with a folder; never reads pickled weights from one, never runs its code unasked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openrlhf.config.groups import LoRAConfig, ModelConfig
from openrlhf.device import device_type
from openrlhf.errors import DataError
from openrlhf.models import adapters
from openrlhf.models.backbone import architecture, enable_gradient_checkpointing, quiet
from openrlhf.paths import inside, no_links_out

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = "convert them once with transformers' `from_pretrained(...).save_pretrained(new_folder)`"
OWN_CODE = "brings code of its own (auto_map), which is not run unasked; pass --trust_remote_code if you trust it"
HEAD = "score"
ContextFactory = Callable[[], AbstractContextManager]


def load_causal_lm(
    path: str,
    model_cfg: ModelConfig,
    *,
    lora: LoRAConfig | None = None,
    context: ContextFactory | None = None,
    seed: int = 42,
    flag: str = "--pretrain",
) -> nn.Module:
    """Return the causal language model at ``path``, a folder or a hub id, in float32 or with ``--bf16`` in bfloat16.

    Args:
        path: where the model is.
        model_cfg: dtype, remote code, gradient checkpointing.
        lora: adapters to train instead of the weights, and whether the weights are held in 4 bits.
        context: makes a context manager to load under, e.g. one that shards the weights while they arrive.
        seed: of fresh adapters.
        flag: the flag that named ``path``, for messages.

    Raises:
        DataError: the folder is missing, incomplete, pickled, or needs code that may not run.
        UsageError: ``--target_modules`` names no module of the model.
    """
    from transformers import AutoModelForCausalLM

    model, missing = from_pretrained(AutoModelForCausalLM, path, model_cfg, lora=lora, context=context, flag=flag)
    if missing:
        raise DataError(f"{flag} {path}: no weights for {', '.join(missing[:3])}; is it a language model?")
    if lora and lora.lora_rank:
        adapters.add_adapters(model, lora, path, seed=seed)
    return prepare(model, model_cfg)


def load_value_model(
    path: str,
    model_cfg: ModelConfig,
    *,
    lora: LoRAConfig | None = None,
    gather: Callable | None = None,
    context: ContextFactory | None = None,
    init_value_head: bool | None = None,
    value_head_prefix: str = HEAD,
    normalize_reward: bool = False,
    pad_token_id: int | None = None,
    seed: int = 42,
    flag: str = "--pretrain",
) -> nn.Module:
    """Return the sequence classifier with one label at ``path``, a folder or a hub id.

    Args:
        path: a reward model or critic, or a language model that gets a fresh head.
        model_cfg: dtype, remote code, gradient checkpointing.
        lora: adapters to train beside the head instead of all weights, and whether the weights are held in 4 bits.
        gather: ``gather(parameters, modifier_rank=0)`` makes a context manager under which sharded weights are whole
            and may be written.
        context: makes a context manager to load under.
        init_value_head: True: always a fresh head. None: a fresh one where the checkpoint has none.
            False: a checkpoint without a head is an error.
        value_head_prefix: the head's name in the checkpoint; the one in config.json wins.
        normalize_reward: normalise rewards with the mean and standard deviation in config.json.
        pad_token_id: written to the config; transformers looks for the last token that differs from it.
        seed: of the fresh head, drawn from a normal distribution with deviation 1 / (hidden + 1), and of adapters.
        flag: the flag that named ``path``, for messages.

    Raises:
        DataError: the folder cannot be used, or has no head, or no mean and std, where they are needed.
        UsageError: ``--target_modules`` names no module of the model.
    """
    from transformers import AutoModelForSequenceClassification

    check_path(path, trust_remote_code=model_cfg.trust_remote_code, flag=flag)
    prefix = _saved_prefix(path) or value_head_prefix
    renaming = {} if prefix == HEAD else {"key_mapping": {rf"^{re.escape(prefix)}\.": f"{HEAD}."}}
    model, missing = from_pretrained(
        AutoModelForSequenceClassification, path, model_cfg, lora=lora, context=context, flag=flag, num_labels=1,
        **renaming,
    )  # fmt: skip
    headless = _check_head(model, missing, init_value_head is not False, f"{flag} {path}", prefix)
    fresh = headless or init_value_head is True
    if fresh:
        _fresh_head(getattr(model, HEAD), gather, seed)
    _complete_config(model.config, prefix, normalize_reward, pad_token_id)
    if normalize_reward and not fresh and not (hasattr(model.config, "mean") and hasattr(model.config, "std")):
        raise DataError(
            f"{flag} {path}: --normalize_reward needs `mean` and `std` in config.json; "
            "train_rm writes them when it evaluates"
        )
    if lora and lora.lora_rank:
        adapters.add_adapters(model, lora, path, head=HEAD, seed=seed)
    return prepare(model, model_cfg)


def prepare(model: nn.Module, model_cfg: ModelConfig) -> nn.Module:
    """Switch gradient checkpointing on when asked for, and return ``model``."""
    if model_cfg.gradient_checkpointing:
        enable_gradient_checkpointing(model, model_cfg.gradient_checkpointing_use_reentrant)
    return model


def from_pretrained(
    auto_class,
    path: str,
    model_cfg: ModelConfig,
    *,
    lora: LoRAConfig | None = None,
    context: ContextFactory | None,
    flag: str,
    **options: Any,
) -> tuple[nn.Module, list[str]]:
    """Return ``(model, names of weights that the checkpoint does not have)`` of a transformers auto class."""
    check_path(path, trust_remote_code=model_cfg.trust_remote_code, flag=flag)
    if lora and lora.load_in_4bit:
        options["quantization_config"] = adapters.quantization(model_cfg.bf16)
    try:
        with (context or nullcontext)(), quiet():
            model, report = auto_class.from_pretrained(
                path,
                dtype=torch.bfloat16 if model_cfg.bf16 else torch.float32,
                trust_remote_code=model_cfg.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError) as error:
        raise loading_error(error, f"{flag} {path}", "the model") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error) and "mismatched" not in str(error):
            raise
        raise DataError(f"{flag} {path}: the weights do not have the shapes of config.json: {error}") from error
    adapters.keep_one_layout(model)
    if model_cfg.use_liger_kernel and device_type() == "cuda":
        use_liger_kernels(model)
    return model, sorted(report["missing_keys"])


def use_liger_kernels(model: nn.Module) -> None:
    """Let fused kernels compute the norms, rotary embeddings and MLPs of ``model`` (Hsu et al., arXiv 2410.10989).

    Its losses stay ours: they read log-probs, which no fused cross-entropy gives.
    """
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def loading_error(error: Exception, source: str, what: str) -> DataError:
    """Return what to tell when transformers cannot load ``what`` from ``source``."""
    if "trust_remote_code" in str(error):
        return DataError(f"{source}: {what} {OWN_CODE}")
    if "safetensors" in str(error) and ".bin" in str(error):
        return DataError(f"{source}: there are no safetensors weights; {CONVERT}")
    reason = " ".join(str(error).split())
    if "couldn't connect" in reason.lower() or "offline" in reason.lower():
        return unreachable(source, what)
    return DataError(f"{source}: {what} cannot be loaded: {reason}")


def unreachable(source: str, what: str) -> DataError:
    """Return what to tell when the hub cannot be asked for something that is not on this machine."""
    return DataError(
        f"{source}: no such folder here, and the hub cannot be reached for {what}; name a local folder, or download "
        "it where there is a network (`hf download NAME`)"
    )


def check_path(path: str | None, *, trust_remote_code: bool, flag: str = "--pretrain") -> bool:
    """Return whether ``path`` is a model folder here rather than a hub id.

    Raises:
        DataError: it is neither, or the folder cannot be loaded safely.
    """
    local = check_folder(path, trust_remote_code=trust_remote_code, flag=flag)
    if local and (Path(path) / adapters.CONFIG).is_file():
        raise DataError(
            f"{flag} {path}: this folder holds an adapter, not a model; merge it into its base first: "
            f"python -m openrlhf.cli.lora_combiner --model_path BASE --lora_path {path} --output_path NEW"
        )
    if local and not (Path(path) / "config.json").is_file():
        raise DataError(f"{flag} {path}: the folder has no config.json; give the folder that `save_pretrained` wrote")
    if local:
        _check_weights(Path(path), flag)
    return local


def check_folder(path: str | None, *, trust_remote_code: bool, flag: str = "--pretrain") -> bool:
    """Return whether ``path`` is a folder here rather than a hub id; it must not need code that may not run.

    Raises:
        DataError: it is neither, or it needs such code.
    """
    if not path:
        raise DataError(f"{flag} is missing: name a model folder or a hub model")
    folder = Path(path)
    if folder.is_dir():
        _check_config(folder, trust_remote_code, flag)
        return True
    if HUB_ID.fullmatch(path) and not folder.exists():
        return False
    raise DataError(f"{flag} {path}: there is no such folder, and it is not the name of a hub model")


def _check_config(folder: Path, trust_remote_code: bool, flag: str) -> None:
    """Raise DataError when ``config.json`` is broken or asks for code that may not run."""
    path = folder / "config.json"
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds no JSON object; copy the config.json of this model")
    if "auto_map" in config and not trust_remote_code and not _known(config.get("model_type")):
        raise DataError(f"{flag} {folder}: the model {OWN_CODE}")


def _known(model_type: str | None) -> bool:
    """Return whether transformers itself implements ``model_type``."""
    from transformers import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING


def _check_weights(folder: Path, flag: str) -> None:
    """Raise DataError when the folder has no safetensors weights, or some that lie elsewhere."""
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        no_links_out(folder, weights, f"{flag} {folder}")
        _check_shards(folder, flag)
        return
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"{flag} {folder}: the weights are pickled ({pickled[0]}), which can run code when it is read; {CONVERT}"
        )
    raise DataError(f"{flag} {folder}: the folder has no weights (*.safetensors)")


def _check_shards(folder: Path, flag: str) -> None:
    """Raise DataError when an index of sharded weights is broken, names a file elsewhere, or one that it needs.

    Only the index that transformers reads needs its files: others may lie beside it, of shards that were not copied.
    """
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{flag} {index}: not an index of weights: {type(error).__name__}: {error}") from error
        is_read = index.name == INDEX and not (folder / WHOLE).is_file()
        for name in sorted(names, key=str):
            if not inside(folder, name, f"{flag} {index}").is_file() and is_read:
                raise DataError(f"{flag} {index}: the folder has no {name}; copy all files of the model")


def _check_head(model: nn.Module, missing: list[str], may_be_fresh: bool, source: str, prefix: str) -> bool:
    """Return whether the checkpoint has no value head; raise DataError when it lacks what it must have."""
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise DataError(f"{source}: {architecture(model)} has no linear `{HEAD}` head; it cannot carry values")
    others = [name for name in missing if not name.startswith(f"{HEAD}.")]
    if others:
        raise DataError(f"{source}: the folder has no weights for {', '.join(others[:3])}")
    headless = bool(missing)
    if headless and not may_be_fresh:
        raise DataError(
            f"{source}: there is no value head `{prefix}` in the weights; is it a reward model? "
            "--value_head_prefix names the head"
        )
    return headless


def _saved_prefix(path: str) -> str | None:
    """Return the head's name that the folder's config.json gives, if it gives one."""
    config = Path(path) / "config.json"
    return json.loads(config.read_text(encoding="utf-8")).get("value_head_prefix") if config.is_file() else None


def _complete_config(config, prefix: str, normalize_reward: bool, pad_token_id: int | None) -> None:
    """Write into ``config`` what makes the saved folder load as a classifier with one label."""
    config.num_labels = 1
    config.problem_type = None
    config.value_head_prefix = prefix
    config.normalize_reward = normalize_reward
    if pad_token_id is not None:
        config.pad_token_id = pad_token_id


def _fresh_head(head: nn.Linear, gather: Callable | None, seed: int) -> None:
    """Draw the weights of ``head`` anew: the same on every rank and device."""
    with (gather or _nothing)([head.weight], modifier_rank=0), torch.no_grad():
        shape = (head.out_features, head.in_features)
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / (head.in_features + 1)
        head.weight.copy_(drawn)


def _nothing(_parameters: list[nn.Parameter], modifier_rank: int):
    return nullcontext()
