"""Whether a model folder suits its role: asked of its config and the names of its weights, before anything is loaded.

Models of the hub are checked when they are loaded; here only whether the hub can be reached for one that is not here.
"""

from __future__ import annotations

import json
from pathlib import Path

from openrlhf import device
from openrlhf.errors import DataError
from openrlhf.models.loading import HEAD, check_path, unreachable

VALUE_MODELS = ("ForSequenceClassification", "ForTokenClassification", "RewardModel", "CriticModel")
"""How the architectures of models with a scalar head end."""
HEADED = ("LMHeadModel", *VALUE_MODELS)


def check_model(path: str, *, trust_remote_code: bool, flag: str = "--pretrain") -> bool:
    """Return whether ``path`` is a folder here; raise :class:`DataError` when it cannot be loaded."""
    from transformers import CONFIG_MAPPING, __version__

    local = check_path(path, trust_remote_code=trust_remote_code, flag=flag)
    if local:
        kind = _config(path).get("model_type")
        if kind not in CONFIG_MAPPING and not trust_remote_code:
            raise DataError(
                f"{flag} {path}: transformers {__version__} does not know the model_type {kind!r} of config.json; "
                "name another model, or update transformers"
            )
        weight_names(Path(path), flag)
    else:
        _check_hub(path, flag)
    return local


def check_language_model(path: str, *, trust_remote_code: bool, flag: str = "--pretrain") -> None:
    """Raise :class:`DataError` when the folder ``path`` cannot be loaded, or says that it is a reward model."""
    if not check_model(path, trust_remote_code=trust_remote_code, flag=flag):
        return
    config = _config(path)
    for name in config.get("architectures") or []:
        headless = name.endswith("Model") and not name.endswith(HEADED) and "auto_map" not in config
        if headless and config.get("tie_word_embeddings") is False:
            raise DataError(
                f"{flag} {path}: this model has no language-model head ({name} in config.json) and would get a random "
                "one; name a model with ForCausalLM in its config.json"
            )
        if name.endswith(VALUE_MODELS):
            raise DataError(
                f"{flag} {path}: this is a reward model or critic ({name} in config.json), not a language model; "
                "name the language model it was trained from"
            )


def check_reward_model(
    path: str, *, trust_remote_code: bool, value_head_prefix: str, normalize_reward: bool, flag: str
) -> None:
    """Raise :class:`DataError` when the folder ``path`` cannot be loaded or has no trained scalar head.

    ``normalize_reward`` asks for ``mean`` and ``std`` in its config too.
    """
    if not check_model(path, trust_remote_code=trust_remote_code, flag=flag):
        return
    config = _config(path)
    prefix = config.get("value_head_prefix") or value_head_prefix
    names = weight_names(Path(path), flag)
    if f"{prefix}.weight" not in names and f"{HEAD}.weight" not in names:
        raise DataError(
            f"{flag} {path}: there is no value head `{prefix}` in the weights, so its rewards would be random; name a "
            "reward model (train_rm makes one), or its head with --value_head_prefix"
        )
    if normalize_reward and not {"mean", "std"} <= set(config):
        raise DataError(
            f"{flag} {path}: --normalize_reward needs `mean` and `std` in config.json; "
            "train_rm writes them when it evaluates"
        )


def context_length(path: str, *, trust_remote_code: bool) -> int | None:
    """Return the most tokens that the model at ``path`` reads, by its config; None where that does not say it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def weight_names(folder: Path, flag: str) -> set[str]:
    """Return the names of the weights in the safetensors files of ``folder``; DataError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names.update(file.keys())
        except (SafetensorError, OSError) as error:
            raise DataError(f"{flag} {path}: damaged ({error}); copy the file again") from error
    return names


def _check_hub(name: str, flag: str) -> None:
    """Raise DataError when a model is not in the cache and the hub is out of reach: its client would try for long."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if reason := device.why_unreachable(constants.ENDPOINT):
        raise unreachable(f"{flag} {name}", f"the model ({constants.ENDPOINT}: {reason})")


def _config(path: str) -> dict:
    return json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
