"""Merging an adapter folder into its base model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from openrlhf.config.groups import ModelConfig
from openrlhf.errors import DataError
from openrlhf.models.adapters import CONFIG, PREFIX, WEIGHTS
from openrlhf.models.backbone import quiet
from openrlhf.models.loading import HEAD, load_causal_lm, load_value_model
from openrlhf.models.suitability import weight_names
from openrlhf.models.tokenizer import FILES, load_tokenizer
from openrlhf.paths import no_links_out

OF_THE_HEAD = ("mean", "std", "normalize_reward")
"""What the config of a trained reward model says about its rewards."""


def merge_adapter(
    base: str, adapter: str, *, is_rm: bool = False, bf16: bool = False, trust_remote_code: bool = False
) -> tuple[nn.Module, Any]:
    """Return the model ``base`` with the folder ``adapter`` merged in, and the tokenizer to save with it.

    Args:
        base: folder or hub name of the model that the adapter was trained on; whole weights, also after QLoRA.
        adapter: what training with ``--lora_rank`` wrote, or ``peft`` by itself.
        is_rm: the model is a sequence classifier with one label.
        bf16: weights become bfloat16; else they get the type of the base. Merging is done in float32.
        trust_remote_code: whether code in the base's folder may run.

    Raises:
        DataError: one of the two cannot be read, or they do not belong together.
    """
    folder = _adapter_folder(adapter, is_rm)
    names = weight_names(folder, "--lora_path")
    plain = ModelConfig(pretrain=base, trust_remote_code=trust_remote_code)
    has_tokenizer = any((folder / name).is_file() for name in FILES)
    tokenizer = load_tokenizer(
        adapter if has_tokenizer else base,
        trust_remote_code=trust_remote_code,
        flag="--lora_path" if has_tokenizer else "--model_path",
    )
    if is_rm:
        # Without a head in the adapter the base must have one: a fresh one would give random rewards.
        in_adapter = any(name.startswith(f"{PREFIX}{HEAD}.") for name in names)
        pad = tokenizer.pad_token_id
        init = None if in_adapter else False
        model = load_value_model(base, plain, init_value_head=init, pad_token_id=pad, flag="--model_path")
    else:
        model = load_causal_lm(base, plain, flag="--model_path")
    merged = _merge(model, folder, names, f"--lora_path {adapter}")
    if is_rm:
        _describe_head(merged.config, folder)
    return merged.to(torch.bfloat16 if bf16 else _stored_type(base, trust_remote_code)), tokenizer


def _adapter_folder(path: str, is_rm: bool) -> Path:
    """Return the folder of an adapter of the asked kind. Raises DataError when it is none."""
    folder = Path(path)
    if not (folder / CONFIG).is_file():
        raise DataError(f"--lora_path {path}: there is no {CONFIG}; name the folder of an adapter")
    if not (folder / WEIGHTS).is_file():
        pickled = " but pickled ones, which can run code when they are read" * any(folder.glob("*.bin"))
        raise DataError(f"--lora_path {path}: there are no weights in {WEIGHTS}{pickled}; save the adapter again")
    no_links_out(folder, [folder / CONFIG, folder / WEIGHTS], f"--lora_path {path}")
    try:
        task = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("task_type")
    except (ValueError, AttributeError) as error:
        raise DataError(f"--lora_path {folder / CONFIG}: not a JSON object: {error}") from error
    if task == "SEQ_CLS" and not is_rm:
        raise DataError(f"--lora_path {path}: this is the adapter of a reward model or critic; add --is_rm")
    if task == "CAUSAL_LM" and is_rm:
        raise DataError(f"--lora_path {path}: this is the adapter of a language model; leave out --is_rm")
    return folder


def _merge(model: nn.Module, folder: Path, names: set[str], source: str) -> nn.Module:
    """Return ``model`` with the adapter of ``folder``, whose weights are ``names``, merged in."""
    from peft import PeftModel, get_peft_model_state_dict

    try:
        with quiet(), warnings.catch_warnings():
            # What peft only warns of is an error below.
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(model, str(folder), trust_remote_code=False)
        expected = set(get_peft_model_state_dict(adapted))
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise DataError(f"{source}: it does not fit the model of --model_path: {reason}") from error
    if different := sorted(expected ^ names):
        raise DataError(
            f"{source}: it does not fit the model of --model_path: {', '.join(different[:3])} "
            f"({len(different)} weights in all) are in one of them only"
        )
    return adapted.merge_and_unload()


def _describe_head(config: Any, folder: Path) -> None:
    """Write into ``config`` what makes the merged model load as the reward model that was trained."""
    config.value_head_prefix = HEAD
    described = folder / "config.json"
    if described.is_file():
        trained = json.loads(described.read_text(encoding="utf-8"))
        for name in OF_THE_HEAD:
            if name in trained:
                setattr(config, name, trained[name])


def _stored_type(base: str, trust_remote_code: bool) -> torch.dtype:
    """Return the type of the weights that the base model says it has."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).dtype or torch.float32
