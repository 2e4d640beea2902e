"""When a flag does nothing, and which packages flags need: tables, shown in ``--help`` and checked when one is set.

NO_EFFECT_HERE flags are accepted and explained in one printed line; a missing package is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from openrlhf.config.algorithms import ESTIMATORS, PAIR_LOSSES, POLICY_LOSSES
from openrlhf.device import gpu_present


@dataclass(frozen=True)
class NoEffect:
    """Why a flag does nothing: ``where(values by flag, gpu)`` says when; by default always."""

    why: str
    where: Callable[[dict[str, Any], bool], bool] = lambda values, gpu: True


def _without_servers(values: dict[str, Any], gpu: bool) -> bool:
    return "://" not in (values["remote_rm_url"] or "")


def _without_function(values: dict[str, Any], gpu: bool) -> bool:
    return ".py" not in (values["remote_rm_url"] or "") and not values["eval_reward_func"]


def _on_cpu(values: dict[str, Any], gpu: bool) -> bool:
    return not gpu


def _unset(name: str) -> Callable[[dict[str, Any], bool], bool]:
    """Return a condition that holds where ``--name`` is not used."""
    return lambda values, gpu: not values[name]


def _set(name: str) -> Callable[[dict[str, Any], bool], bool]:
    return lambda values, gpu: bool(values[name])


def _without_critic(values: dict[str, Any], gpu: bool) -> bool:
    return not ESTIMATORS[values["advantage_estimator"]].needs_critic


def _of_whole_answers(values: dict[str, Any], gpu: bool) -> bool:
    return ESTIMATORS[values["advantage_estimator"]].of_whole_answers


def _without_lora(values: dict[str, Any], gpu: bool) -> bool:
    return values["lora_rank"] == 0


def _is_own_reference(values: dict[str, Any], gpu: bool) -> bool:
    return values["lora_rank"] > 0 and values.get("ref_pretrain") in (None, values["pretrain"])


def _without_texts(values: dict[str, Any], gpu: bool) -> bool:
    return not values["pretrain_data"]


def _pair_loss_flags() -> list[str]:
    """Return the flags that some pair losses read and others do not."""
    each = [set(loss.flags) for loss in PAIR_LOSSES.values()]
    return sorted(set.union(*each) - set.intersection(*each))


def _of_pair_losses(name: str) -> NoEffect:
    """Return when ``--name`` is idle: with a pair loss that does not read it."""
    readers = [loss for loss, facts in PAIR_LOSSES.items() if name in facts.flags]
    return NoEffect(f"it needs --loss {' or '.join(readers)}", lambda values, gpu: values["loss"] not in readers)


_NO_COPY = NoEffect(
    "with --lora_rank the reference is the policy without its adapter", lambda values, gpu: values["lora_rank"] > 0
)
_TEMPLATE = NoEffect(
    "--apply_chat_template and --pretrain_mode do without it",
    lambda values, gpu: values["apply_chat_template"] or values.get("pretrain_mode", False),
)
_CHAT = NoEffect("it needs --apply_chat_template, or rows of messages", _unset("apply_chat_template"))
_RAW = NoEffect("--pretrain_mode trains on the raw text of --input_key", lambda v, gpu: v.get("pretrain_mode", False))
_CRITIC = NoEffect("the advantage estimator has no critic", _without_critic)
_VLLM = NoEffect(
    "only vLLM has one (--vllm_num_engines, or --eval_task generate_vllm)",
    lambda v, gpu: v["eval_task"] != "generate_vllm" if "eval_task" in v else not v["vllm_num_engines"],
)
_VLLM_TASK = NoEffect("it needs --eval_task generate_vllm", lambda v, gpu: v["eval_task"] != "generate_vllm")
_CONDITIONAL = NoEffect("it needs --post_processor csft", lambda v, gpu: v["post_processor"] != "csft")
_ENGINES = NoEffect("it needs --vllm_num_engines: the policy itself generates", _unset("vllm_num_engines"))
_OFFLOAD = NoEffect("it needs a GPU and --zero_stage 3", lambda values, gpu: not gpu or values["zero_stage"] != 3)
_REFERENCE = NoEffect(
    f"--loss {' and '.join(name for name, loss in PAIR_LOSSES.items() if not loss.needs_reference)} have no reference",
    lambda values, gpu: "loss" in values and not PAIR_LOSSES[values["loss"]].needs_reference,
)
_EVAL = NoEffect("it needs --eval_dataset", _unset("eval_dataset"))
_SAVES = NoEffect("it needs --save_steps", lambda values, gpu: values["save_steps"] < 1)
_SERVERS = NoEffect("it needs a server in --remote_rm_url", _without_servers)
_FUNCTIONS = NoEffect("it needs a .py file in --remote_rm_url or --eval_reward_func", _without_function)
_WANDB = NoEffect("it needs --use_wandb", _unset("use_wandb"))

NO_EFFECT_HERE = {
    "actor_init_on_gpu": NoEffect("DeepSpeed moves the model to its device"),
    "compute_fp32_loss": NoEffect("rewards and their loss are always fp32"),
    "perf": NoEffect("the time of each phase is always recorded"),
    **dict.fromkeys(
        ("vllm_sync_backend", "vllm_sync_with_ray"),
        NoEffect("weights travel through Ray's object store, with GPUs too"),
    ),
    "vllm_enable_sleep": NoEffect("without a GPU an engine has no GPU memory to free", _on_cpu),
    "deepspeed_enable_sleep": NoEffect(
        "it needs a GPU and --zero_stage 1 to 3; --adam_offload keeps the states in main memory anyway",
        lambda values, gpu: not gpu or values["zero_stage"] == 0 or values["adam_offload"],
    ),
    "vllm_gpu_memory_utilization": NoEffect("without a GPU there is no GPU memory to share", _on_cpu),
    **dict.fromkeys(("ref_reward_offload", "teacher_offload"), _OFFLOAD),
    "ref_offload": NoEffect(
        "it needs a GPU, --zero_stage 3, and a reference that is not the policy without its adapter (--lora_rank)",
        lambda values, gpu: any(idle(values, gpu) for idle in (_OFFLOAD.where, _REFERENCE.where, _is_own_reference)),
    ),
    **dict.fromkeys(("ref_pretrain", "precompute_ref_log_probs"), _REFERENCE),
    **{name: _of_pair_losses(name) for name in _pair_loss_flags()},
    "ring_head_stride": NoEffect("it needs --ring_attn_size", lambda values, gpu: values["ring_attn_size"] == 1),
    "micro_train_batch_size": NoEffect("--use_dynamic_batch takes its place", _set("use_dynamic_batch")),
    **dict.fromkeys(
        ("train_max_tokens_per_gpu", "rollout_max_tokens_per_gpu"),
        NoEffect("it needs --use_dynamic_batch", _unset("use_dynamic_batch")),
    ),
    "use_liger_kernel": NoEffect("Liger's kernels are for GPUs", _on_cpu),
    "flash_attn": NoEffect("the fastest attention of the machine is chosen without it"),
    "zpg": NoEffect(
        "a secondary partition needs --zero_stage 3 and several GPUs",
        lambda values, gpu: values["zpg"] > 1 and (not gpu or values["zero_stage"] != 3),
    ),
    "overlap_comm": NoEffect("it needs --zero_stage 2 or 3", lambda values, gpu: values["zero_stage"] < 2),
    "lora_alpha": NoEffect("it needs --lora_rank", _without_lora),
    "lora_dropout": NoEffect("it needs --lora_rank", _without_lora),
    "target_modules": NoEffect("it needs --lora_rank", _without_lora),
    "ptx_coef": NoEffect("it needs --pretrain_data", _without_texts),
    "pretrain_data_probs": NoEffect("it needs --pretrain_data", _without_texts),
    "pretrain_split": NoEffect("it needs --pretrain_data", _without_texts),
    "input_template": _TEMPLATE,
    "tokenizer_chat_template": _CHAT,
    **dict.fromkeys(("output_key", "apply_chat_template"), _RAW),
    "save_hf_ckpt": _SAVES,
    "eval_steps": NoEffect(
        "it needs --eval_dataset", lambda values, gpu: "prompt_data" in values and not values["eval_dataset"]
    ),
    "gradient_checkpointing_use_reentrant": NoEffect(
        "it needs --gradient_checkpointing", _unset("gradient_checkpointing")
    ),
    "use_tensorboard": NoEffect("--use_wandb takes its place", _set("use_wandb")),
    **dict.fromkeys(("wandb_org", "wandb_group", "wandb_project", "wandb_run_name"), _WANDB),
    **dict.fromkeys(("critic_pretrain", "critic_learning_rate", "critic_num_nodes", "value_clip", "lambd"), _CRITIC),
    **dict.fromkeys(("critic_num_gpus_per_node", "freezing_actor_steps"), _CRITIC),
    **dict.fromkeys(("ref_num_nodes", "ref_num_gpus_per_node", "colocate_actor_ref"), _NO_COPY),
    **dict.fromkeys(("enforce_eager", "sync_tolerance"), _ENGINES),
    "enable_prefix_caching": _VLLM,
    **dict.fromkeys(("tp_size", "max_num_seqs"), _VLLM_TASK),
    "csft_prompt": NoEffect("it needs --enable_csft", _unset("enable_csft")),
    "reward_template": _CONDITIONAL,
    **dict.fromkeys(("eval_temperature", "eval_n_samples_per_prompt", "best_metric_key"), _EVAL),
    "gamma": NoEffect("the advantage estimator compares whole answers, so nothing is discounted", _of_whole_answers),
    "no_advantage_std_norm": NoEffect(
        "the advantage estimator does not whiten", lambda v, gpu: not ESTIMATORS[v["advantage_estimator"]].whiten
    ),
    "loss_reduction": NoEffect(
        "the loss of the actor is one of sequences, and there is no critic",
        lambda v, gpu: POLICY_LOSSES[v["policy_loss_type"]].of_sequences and _without_critic(v, gpu),
    ),
    "dual_clip": NoEffect(
        "--policy_loss_type cispo clips no gradient", lambda v, gpu: not POLICY_LOSSES[v["policy_loss_type"]].dual_clip
    ),
    "eps_clip": NoEffect("--eps_clip_low_high takes its place", _set("eps_clip_low_high")),
    "dynamic_filtering_reward_range": NoEffect("it needs --dynamic_filtering", _unset("dynamic_filtering")),
    "kl_horizon": NoEffect("it needs --kl_target", _unset("kl_target")),
    "kl_estimator": NoEffect("--use_kl_estimator_k3 takes its place", _set("use_kl_estimator_k3")),
    "overlong_penalty_factor": NoEffect("it needs --overlong_buffer_len", _unset("overlong_buffer_len")),
    **dict.fromkeys(
        ("vllm_is_correction_type", "vllm_is_truncated_threshold"),
        NoEffect(
            "it needs --enable_vllm_is_correction, and a --policy_loss_type that does not take its ratio against the "
            "engine at once, as gspo does",
            lambda v, gpu: not v["enable_vllm_is_correction"] or POLICY_LOSSES[v["policy_loss_type"]].of_sequences,
        ),
    ),
    **dict.fromkeys(
        ("prm_placeholder_token", "prm_reward_tokens"), NoEffect("it needs --prm_pretrain", _unset("prm_pretrain"))
    ),
    **dict.fromkeys(("remote_rm_mode", "remote_rm_timeout", "remote_rm_tries", "remote_rm_key"), _SERVERS),
    **dict.fromkeys(("reward_func_timeout", "reward_func_env"), _FUNCTIONS),
    "margin_loss": NoEffect("only --loss sigmoid has a margin", lambda values, gpu: values["loss"] != "sigmoid"),
    "ema_beta": NoEffect("it needs --enable_ema", _unset("enable_ema")),
    "label_key": NoEffect(
        "only reward functions and servers read labels (--remote_rm_url, --eval_reward_func)",
        lambda v, gpu: "remote_rm_url" in v and not (v["remote_rm_url"] or v["eval_reward_func"]),
    ),
    "show_samples": NoEffect("a run shows them anyway; it is for --dry_run", _unset("dry_run")),
}

NEEDED = ("torch", "transformers", "datasets", "deepspeed")
"""What every command imports."""


@dataclass(frozen=True)
class Package:
    """What a flag needs.

    Attributes:
        module: what is imported.
        pip: what pip calls it.
        where: whether the flag needs it, with ``values`` by flag and a GPU or not; only asked where the flag is set.
    """

    module: str
    pip: str
    where: Callable[[dict[str, Any], bool], bool] = lambda values, gpu: True


NEEDED_BY = {
    "eval_task": Package("vllm", "openrlhf[vllm]", lambda values, gpu: values["eval_task"] == "generate_vllm"),
    "vllm_num_engines": Package("vllm", "openrlhf[vllm]"),
    "lora_rank": Package("peft", "peft"),
    "lora_path": Package("peft", "peft"),
    "load_in_4bit": Package("bitsandbytes", "bitsandbytes"),
    "use_wandb": Package("wandb", "wandb"),
    "use_tensorboard": Package("tensorboard", "tensorboard"),
    "use_ms": Package("modelscope", "modelscope"),
    # A CPU, and fp32, have torch's own attention.
    "ring_attn_size": Package(
        "ring_flash_attn",
        "openrlhf[ring]",
        lambda values, gpu: gpu and values["bf16"] and values["ring_attn_size"] > 1,
    ),
    "use_liger_kernel": Package("liger_kernel", "openrlhf[liger]", lambda values, gpu: gpu),
}


def status(name: str) -> str:
    """Return the status of a flag for ``--help``: empty when it simply works."""
    if name in NO_EFFECT_HERE:
        return f"May have no effect: {NO_EFFECT_HERE[name].why}."
    return ""


def missing_packages(values: dict[str, Any]) -> list[str]:
    """Return one problem for each package that the command or a flag needs and that is not installed."""
    found = [
        f"--{name} needs {package.module}, which is not installed: pip install '{package.pip}', or leave the flag out"
        for name, package in NEEDED_BY.items()
        if values.get(name) and package.where(values, gpu_present()) and find_spec(package.module) is None
    ]
    needed = (*NEEDED, "ray") if "vllm_num_engines" in values else NEEDED
    return found + [
        f"the package {module} is not installed: pip install openrlhf"
        for module in needed
        if find_spec(module) is None
    ]


def no_effect_notices(values: dict[str, Any], given: set[str], gpu: bool) -> list[str]:
    """Return one line for each flag that the user gave and that does nothing on this machine."""
    return [
        f"--{name} has no effect here: {entry.why}"
        for name, entry in NO_EFFECT_HERE.items()
        if name in given and values[name] is not False and entry.where(values, gpu)
    ]
