"""The dotted flags of OpenRLHF 0.10 and later: every command takes them beside the flat ones, by the tables below.

``--actor.model_name_or_path X`` is ``--pretrain X``. A dotted name that stands first for a flat one is what
``openrlhf.cli.migrate`` writes; where several must be given for the same effect there, it writes all of ``TWINS``.

The names are those of the renames at 0.10.2, but for ``GUESSED``: these follow the pattern of the others. Reading one
does no harm, since a flag that is not there is not written; ``migrate`` says so when it writes one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

EVERYWHERE = {
    "train.batch_size": "train_batch_size",
    "train.micro_batch_size": "micro_train_batch_size",
    "train.max_epochs": "max_epochs",
    "train.seed": "seed",
    "train.dynamic_batch_enable": "use_dynamic_batch",
    "train.max_tokens_per_gpu": "train_max_tokens_per_gpu",
    "data.dataset": "dataset",
    "data.dataset_probs": "dataset_probs",
    "data.dataset_split": "train_split",
    "data.input_key": "input_key",
    "data.output_key": "output_key",
    "data.label_key": "label_key",
    "data.prompt_key": "prompt_key",
    "data.chosen_key": "chosen_key",
    "data.rejected_key": "rejected_key",
    "data.input_template": "input_template",
    "data.apply_chat_template": "apply_chat_template",
    "data.tokenizer_chat_template": "tokenizer_chat_template",
    "data.max_len": "max_len",
    "data.max_samples": "max_samples",
    "data.multiturn": "multiturn",
    "data.disable_fast_tokenizer": "disable_fast_tokenizer",
    "eval.dataset": "eval_dataset",
    "eval.split": "eval_split",
    "eval.steps": "eval_steps",
    "ckpt.output_dir": "save_path",
    "ckpt.path": "ckpt_path",
    "ckpt.save_steps": "save_steps",
    "ckpt.save_hf": "save_hf_ckpt",
    "ckpt.disable_ds": "disable_ds_ckpt",
    "ckpt.max_num": "max_ckpt_num",
    "ckpt.max_mem": "max_ckpt_mem",
    "ckpt.load_enable": "load_checkpoint",
    "ckpt.best_metric_key": "best_metric_key",
    "ds.zero_stage": "zero_stage",
    "ds.zpg": "zpg",
    "ds.adam_offload": "adam_offload",
    "ds.param_dtype": "bf16",
    "ds.attn_implementation": "flash_attn",
    "ds.packing_samples": "packing_samples",
    "ds.ring_attn_size": "ring_attn_size",
    "ds.ring_attn_head_stride": "ring_head_stride",
    "ds.lora.rank": "lora_rank",
    "ds.lora.alpha": "lora_alpha",
    "ds.lora.dropout": "lora_dropout",
    "ds.lora.target_modules": "target_modules",
    "ds.load_in_4bit": "load_in_4bit",
    "ds.value_head_prefix": "value_head_prefix",
    "ds.grad_accum_dtype": "grad_accum_dtype",
    "ds.overlap_comm": "overlap_comm",
    "ds.use_liger_kernel": "use_liger_kernel",
    "ds.use_ds_universal_ckpt": "use_ds_universal_ckpt",
    "ds.use_universal_ckpt": "use_ds_universal_ckpt",
    "logger.logging_steps": "logging_steps",
    "logger.tensorboard_dir": "use_tensorboard",
    "logger.wandb.key": "use_wandb",
    "logger.wandb.org": "wandb_org",
    "logger.wandb.group": "wandb_group",
    "logger.wandb.project": "wandb_project",
    "logger.wandb.run_name": "wandb_run_name",
}
SUPERVISED = {
    "model.model_name_or_path": "pretrain",
    "model.gradient_checkpointing_enable": "gradient_checkpointing",
    "model.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "model.aux_loss_coef": "aux_loss_coef",
    "model.beta": "beta",
    "model.ipo_enable": "ipo",
    "model.label_smoothing": "label_smoothing",
    "model.nll_loss_coef": "nll_loss_coef",
    "model.loss_type": "loss",
    "model.margin_loss_enable": "margin_loss",
    "model.compute_fp32_loss_enable": "compute_fp32_loss",
    "model.pretrain_mode_enable": "pretrain_mode",
    "ref.model_name_or_path": "ref_pretrain",
    "ref.offload": "ref_offload",
    "adam.lr": "learning_rate",
    "adam.betas": "adam_betas",
    "adam.weight_decay": "l2",
}
PPO = {
    "actor.model_name_or_path": "pretrain",
    "reward.model_name_or_path": "reward_pretrain",
    "critic.model_name_or_path": "critic_pretrain",
    **{f"{role}.num_nodes": f"{role}_num_nodes" for role in ("actor", "critic", "ref", "reward")},
    **{f"{role}.num_gpus_per_node": f"{role}_num_gpus_per_node" for role in ("actor", "critic", "ref", "reward")},
    "train.colocate_all": "colocate_all_models",
    "train.colocate_actor_ref": "colocate_actor_ref",
    "train.colocate_critic_reward": "colocate_critic_reward",
    "train.num_episodes": "num_episodes",
    "train.enable_ema": "enable_ema",
    "train.ema_beta": "ema_beta",
    "ds.enable_sleep": "deepspeed_enable_sleep",
    "ds.deepspeed_enable_sleep": "deepspeed_enable_sleep",
    "vllm.num_engines": "vllm_num_engines",
    "vllm.tensor_parallel_size": "vllm_tensor_parallel_size",
    "vllm.sync_backend": "vllm_sync_backend",
    "vllm.sync_with_ray": "vllm_sync_with_ray",
    "vllm.enable_sleep": "vllm_enable_sleep",
    "vllm.gpu_memory_utilization": "vllm_gpu_memory_utilization",
    "vllm.enable_prefix_caching": "enable_prefix_caching",
    "vllm.enforce_eager": "enforce_eager",
    "algo.advantage.is_correction_enable": "enable_vllm_is_correction",
    "algo.advantage.is_correction_threshold": "vllm_is_truncated_threshold",
    "algo.advantage.is_correction_type": "vllm_is_correction_type",
    "algo.advantage.estimator": "advantage_estimator",
    "algo.advantage.gamma": "gamma",
    "algo.advantage.lambd": "lambd",
    "algo.advantage.no_std_norm": "no_advantage_std_norm",
    "algo.kl.init_coef": "init_kl_coef",
    "algo.kl.target": "kl_target",
    "algo.kl.horizon": "kl_horizon",
    "algo.kl.estimator": "kl_estimator",
    "algo.kl.use_loss": "use_kl_loss",
    "algo.dynamic_filtering_enable": "dynamic_filtering",
    "algo.dynamic_filtering_range": "dynamic_filtering_reward_range",
    "actor.eps_clip": "eps_clip",
    "actor.eps_clip_low_high": "eps_clip_low_high",
    "actor.dual_clip": "dual_clip",
    "actor.policy_loss_type": "policy_loss_type",
    "actor.entropy_coef": "entropy_loss_coef",
    "actor.aux_loss_coef": "aux_loss_coef",
    "actor.gradient_checkpointing_enable": "gradient_checkpointing",
    "actor.gradient_checkpointing_reentrant": "gradient_checkpointing_use_reentrant",
    "critic.value_clip": "value_clip",
    "critic.save_value_network": "save_value_network",
    "critic.freezing_steps": "freezing_actor_steps",
    "reward.normalize_enable": "normalize_reward",
    "reward.clip_range": "reward_clip_range",
    "reward.remote_url": "remote_rm_url",
    "reward.overlong_buffer_len": "overlong_buffer_len",
    "reward.overlong_penalty_factor": "overlong_penalty_factor",
    "reward.stop_properly_penalty_coef": "stop_properly_penalty_coef",
    **{f"{role}.offload": "ref_reward_offload" for role in ("ref", "reward")},
    "rollout.batch_size": "rollout_batch_size",
    "rollout.micro_batch_size": "micro_rollout_batch_size",
    "rollout.n_samples_per_prompt": "n_samples_per_prompt",
    "rollout.temperature": "temperature",
    "rollout.top_p": "top_p",
    "rollout.max_new_tokens": "generate_max_len",
    "rollout.max_tokens_per_gpu": "rollout_max_tokens_per_gpu",
    "data.prompt_dataset": "prompt_data",
    "data.prompt_probs": "prompt_data_probs",
    "data.prompt_split": "prompt_split",
    "eval.temperature": "eval_temperature",
    "eval.n_samples_per_prompt": "eval_n_samples_per_prompt",
    **{f"{role}.adam.lr": f"{role}_learning_rate" for role in ("actor", "critic")},
    **{f"{role}.adam.betas": "adam_betas" for role in ("actor", "critic")},
    **{f"{role}.adam.weight_decay": "l2" for role in ("actor", "critic")},
    **{f"{role}.lr_warmup_ratio": "lr_warmup_ratio" for role in ("actor", "critic")},
    **{f"{role}.max_norm": "max_norm" for role in ("actor", "critic")},
}
TWINS = ("adam_betas", "l2", "lr_warmup_ratio", "max_norm", "ref_reward_offload")
"""Flat flags of PPO that are two dotted ones."""
INFERENCE = {"data.dataset_split": "dataset_split"}
"""What stands for another flag in ``batch_inference``, which calls it as later versions do."""
GUESSED = {
    *("data.output_key", "data.prompt_key", "data.chosen_key", "data.rejected_key", "data.tokenizer_chat_template"),
    *("data.multiturn", "data.disable_fast_tokenizer", "ds.lora.target_modules", "ds.use_universal_ckpt"),
    *("ds.enable_sleep", "model.aux_loss_coef", "model.gradient_checkpointing_enable"),
    *("model.gradient_checkpointing_reentrant", "ref.model_name_or_path"),
}
"""Names of which only the section is known, or less."""
OF_BOTH = {"lr_scheduler", "lr_warmup_ratio", "max_norm"}
"""Flags of the supervised commands that have no dots there either."""
SWITCHES = {
    "ds.param_dtype": {"bf16": "true", "fp32": "false"},
    "ds.attn_implementation": {"flash_attention_2": "true", "sdpa": "false", "eager": "false"},
}
"""Dotted flags whose value says whether a flat switch is on; the value that turns it on stands first."""
SECTIONS = {name.partition(".")[0] for table in (EVERYWHERE, SUPERVISED, PPO) for name in table}


class Dialect:
    """The dotted flags of one command.

    Attributes:
        flat: dotted name -> flat name.
        dotted: flat name -> its dotted names; all of them are needed where it is one of ``TWINS``.
    """

    def __init__(self, flags: Collection[str]):
        table = EVERYWHERE | (PPO if "reward_pretrain" in flags else SUPERVISED)
        table |= INFERENCE if "dataset_split" in flags else {}
        self.flat = {dotted: flat for dotted, flat in table.items() if flat in flags}
        self.dotted: dict[str, list[str]] = {}
        for dotted, flat in self.flat.items():
            self.dotted.setdefault(flat, []).append(dotted)

    def read(self, written: str, words: list[str] | None) -> tuple[str, list[str] | None]:
        """Return flat name and words of a flag that was written either way; an unknown name stays as it is.

        Raises:
            ValueError: with the rest of a sentence that begins with the flag.
        """
        values = SWITCHES.get(written)
        if written not in self.flat or values is None or words is None:
            return self.flat.get(written, written), words
        if len(words) != 1 or words[0] not in values:
            raise ValueError(f"takes {' or '.join(values)}, got {' '.join(words) or 'none'}")
        return self.flat[written], [values[words[0]]]

    def write(self, flat: str) -> list[str]:
        """Return how the dotted form of a flat flag begins, for each dotted flag that it is."""
        names = self.dotted.get(flat, [])
        return [" ".join([name, *[*SWITCHES.get(name, ())][:1]]) for name in names[: 2 if flat in TWINS else 1]]

    def as_written(self, text: str, names: Iterable[str]) -> str:
        """Return ``text`` with its flat flags spelled as someone does who wrote the flags ``names``."""
        given = {self.flat[name]: name for name in names if name in self.flat}
        if not given:
            return text
        spelled = {flat: self.write(flat)[0] for flat in self.dotted}
        spelled |= {flat: name for flat, name in given.items() if name not in SWITCHES}
        spelled |= {name: name for name in names if name not in self.flat}
        return re.sub(r"--(\w+)(?!\w|\.\w)", lambda match: f"--{spelled.get(match[1], match[1])}", text)


def sections_joined(content: dict, prefix: str = "") -> dict:
    """Return a YAML mapping with ``{"actor": {"num_nodes": 1}}`` as ``{"actor.num_nodes": 1}``; others stay."""
    flat = {}
    for name, value in content.items():
        if isinstance(value, dict) and (prefix or name in SECTIONS):
            flat |= sections_joined(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
