"""A configuration file of TRL as a command of this project."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from openrlhf.config.commands import config_class
from openrlhf.config.flags import flag_table
from openrlhf.config.trl_keys import COLUMNS, COMMANDS, DEFAULTS
from openrlhf.errors import DataError

Settings = dict[str, Any]


def guessed(settings: Settings) -> str:
    """Return the command that the keys of a configuration are for."""
    if {"num_generations", "max_completion_length", "reward_funcs"} & {*settings}:
        return "train_ppo_ray"
    if {"desirable_weight", "undesirable_weight"} & {*settings}:
        return "train_kto"
    if "center_rewards_coefficient" in settings:
        return "train_rm"
    return "train_dpo" if {"beta", "rpo_alpha", "loss_type"} & {*settings} else "train_sft"


def settings_of(text: str, path: str) -> Settings:
    """Return the mapping in a YAML or JSON file.

    Raises:
        DataError: it is neither, or no mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold the settings of TRL, as key: value")
    return content


def command_of(settings: Settings, command: str, ranks: int) -> tuple[str, list[str]]:
    """Return a shell command that does what ``settings`` ask of TRL, and what to tell: a note for each key that it
    leaves out, and one of the defaults that differ.

    Raises:
        DataError: a number that others are worked out from is none.
    """
    left = _typed({key: value for key, value in settings.items() if value is not None})
    others = _other_defaults(left, command)
    words = [*_sizes(left, command, ranks), *_special(left, command)]
    renamed = COMMANDS[command]
    notes, said = [], {}
    for key in [key for key in left if key in renamed]:
        name, value = renamed[key], left.pop(key)
        if name in said:
            notes.append(f"{key}: {value} is left out: {said[name]} is --{name} too")
        else:
            said[name] = key
            words += _flag(name, value)
    words.append(COLUMNS[command] if "--pretrain_mode" not in words else "")
    if command == "train_ppo_ray":
        launcher = "python3 -m"
    else:
        launcher = f"deepspeed --num_accelerators {ranks} --module" if ranks > 1 else "python3 -m"
    lines = [f"{launcher} openrlhf.cli.{command}", *(word for word in words if word)]
    notes += [f"{key}: {value} has no counterpart and is left out" for key, value in left.items()]
    return " \\\n   ".join(lines) + "\n", notes + others


def _typed(settings: Settings) -> Settings:
    """Return settings whose weights of 16 bits are ``bf16``; those of 32 bits are what there is without it."""
    kinds = {key: str(settings[key]).removeprefix("torch.") for key in ("torch_dtype", "dtype") if key in settings}
    said = {key for key, kind in kinds.items() if kind in ("bfloat16", "float32")}
    kept = {key: value for key, value in settings.items() if key not in said}
    return kept | {"bf16": True} if "bfloat16" in kinds.values() else kept


def _other_defaults(settings: Settings, command: str) -> list[str]:
    """Return what to tell of defaults that are others in TRL, for what ``settings`` do not name."""
    table = flag_table(config_class(command))
    found = [
        f"--{name} {_shown(table[name].default)} ({_shown(value)})"
        for name, (value, keys) in DEFAULTS[command].items()
        if table[name].default != value and not {*keys} & {*settings}
    ]
    return [f"not named, so the defaults here hold (in brackets TRL's): {', '.join(found)}"] if found else []


def _shown(value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return " ".join({True: "on", False: "off"}[each] if isinstance(each, bool) else f"{each}" for each in values)


def _flag(name: str, value: Any) -> list[str]:
    """Return a flag as the words of a line; a switch that is off is none."""
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    values = value if isinstance(value, list) else [value]
    return [f"--{name} {shlex.join(map(str, values))}"]


def _sizes(left: Settings, command: str, ranks: int) -> list[str]:
    """Return the flags of a step, which TRL counts by device and by accumulated micro-batches."""
    micro = left.setdefault("per_device_train_batch_size", 8)
    accumulated = left.pop("gradient_accumulation_steps", 1)
    answers = left.get("num_generations", 8)
    counts = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
    for key, value in (counts | {"num_generations": answers}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(
                f"{key}: {value!r} is no whole number above 0: write one, the size of a step follows from it"
            )
    size = micro * accumulated * ranks
    words = _flag("train_batch_size", size)
    if command != "train_ppo_ray":
        return words
    words += _flag("rollout_batch_size", max(1, size // answers)) + _flag("micro_rollout_batch_size", micro)
    words += _flag("actor_num_gpus_per_node", ranks)
    return words + (_flag("ref_num_gpus_per_node", ranks) + ["--colocate_actor_ref"] if left.get("beta") else [])


def _special(left: Settings, command: str) -> list[str]:
    """Return the flags of keys that are no plain renaming; they are taken out of ``left``."""
    words = []
    for key, turn in SPECIAL.items():
        if key in left:
            words += turn(left.pop(key))
    first, second = left.pop("adam_beta1", None), left.pop("adam_beta2", None)
    if first is not None or second is not None:
        words += _flag("adam_betas", [0.9 if first is None else first, 0.999 if second is None else second])
    for key, flag in (("eval_strategy", "eval_steps"), ("save_strategy", "save_steps")):
        cadence = left.pop(flag, None)
        if left.pop(key, "steps") == "steps" and cadence is not None:
            words += _flag(flag, cadence)
    if not left.pop("use_peft", "lora_r" in left):
        for key in [key for key in left if key.startswith("lora_")]:
            del left[key]
    if command == "train_dpo":
        words += _dpo_loss(left)
    if command == "train_ppo_ray":
        words += _grpo(left)
    return words


def _dpo_loss(left: Settings) -> list[str]:
    name = left.get("loss_type", "sigmoid")
    name = name[0] if isinstance(name, list) and len(name) == 1 else name
    known = {"sigmoid": "dpo", "ipo": "ipo"}
    if name not in known:
        return []
    left.pop("loss_type", None)
    return _flag("loss", known[name]) if name != "sigmoid" else []


def _grpo(left: Settings) -> list[str]:
    """Return what GRPO of TRL is: groups of answers, and a KL loss where ``beta`` asks for one."""
    loss = left.get("loss_type", "dapo")
    if loss in ("grpo", "dapo", "bnpo", "dr_grpo"):
        left.pop("loss_type", None)
    words = _flag("advantage_estimator", "dr_grpo" if loss == "dr_grpo" else "group_norm")
    words += _flag("loss_reduction", "sequence") if loss == "grpo" else []
    if left.get("beta"):
        words += ["--use_kl_loss", "--kl_estimator k3"]
    else:
        left.pop("beta", None)
        words += _flag("init_kl_coef", 0)
    left.setdefault("num_generations", 8)
    high = left.pop("epsilon_high", None)
    if high is not None:
        words += _flag("eps_clip_low_high", [left.pop("epsilon", 0.2), high])
    reward = left.pop("reward_model_name_or_path", None) or left.pop("reward_funcs", None)
    rewards = reward if isinstance(reward, list) else [reward]
    python = all(str(each).endswith(".py") for each in rewards)
    words += _flag("remote_rm_url" if python else "reward_pretrain", ",".join(map(str, rewards))) if reward else []
    return words + (_flag("vllm_num_engines", 1) if left.pop("use_vllm", False) else [])


def _flash(value: Any) -> list[str]:
    return ["--flash_attn"] if "flash" in str(value) else []


def _report(value: Any) -> list[str]:
    names = value if isinstance(value, list) else [value]
    return ["--use_wandb True"] * ("wandb" in names) + ["--use_tensorboard ./tensorboard"] * ("tensorboard" in names)


SPECIAL: dict[str, Callable[[Any], list[str]]] = {
    "attn_implementation": _flash,
    "report_to": _report,
    "dataset_text_field": lambda column: [*_flag("input_key", column), "--pretrain_mode"],
    "run_name": lambda name: _flag("wandb_run_name", name),
}
