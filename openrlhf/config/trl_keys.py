"""What the keys of a configuration of TRL are called here, and what it takes where they are not there."""

from __future__ import annotations

from typing import Any

SHARED = {
    "model_name_or_path": "pretrain",
    "trust_remote_code": "trust_remote_code",
    "output_dir": "save_path",
    "num_train_epochs": "max_epochs",
    "per_device_train_batch_size": "micro_train_batch_size",
    "max_grad_norm": "max_norm",
    "weight_decay": "l2",
    "warmup_ratio": "lr_warmup_ratio",
    "bf16": "bf16",
    "gradient_checkpointing": "gradient_checkpointing",
    "use_liger_kernel": "use_liger_kernel",
    "logging_steps": "logging_steps",
    "seed": "seed",
    "dataset_test_split": "eval_split",
    "lora_r": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "load_in_4bit": "load_in_4bit",
    "packing": "packing_samples",
}
SUPERVISED = SHARED | {
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "dataset_name": "dataset",
    "dataset_train_split": "train_split",
    "max_length": "max_len",
    "max_seq_length": "max_len",
}
COMMANDS: dict[str, dict[str, str]] = {
    "train_sft": SUPERVISED,
    "train_rm": SUPERVISED,
    "train_dpo": SUPERVISED | {"beta": "beta", "label_smoothing": "label_smoothing", "rpo_alpha": "nll_loss_coef"},
    "train_kto": SUPERVISED
    | {
        "beta": "beta",
        "desirable_weight": "desirable_loss_weight",
        "undesirable_weight": "undesirable_loss_weight",
    },
    "train_ppo_ray": SHARED
    | {
        "num_train_epochs": "num_episodes",
        "learning_rate": "actor_learning_rate",
        "dataset_name": "prompt_data",
        "dataset_train_split": "prompt_split",
        "max_prompt_length": "prompt_max_len",
        "max_completion_length": "generate_max_len",
        "num_generations": "n_samples_per_prompt",
        "num_iterations": "max_epochs",
        "temperature": "temperature",
        "top_p": "top_p",
        "epsilon": "eps_clip",
        "beta": "init_kl_coef",
    },
}
"""Command -> key of TRL -> flag; :mod:`openrlhf.config.trl` does what is no plain renaming."""
EVERYWHERE = {
    "bf16": (True, ("bf16", "fp16")),
    "gradient_checkpointing": (True, ("gradient_checkpointing",)),
    "adam_betas": ((0.9, 0.999), ("adam_beta1", "adam_beta2")),
    "lr_warmup_ratio": (0.0, ("warmup_ratio", "warmup_steps")),
    "logging_steps": (10, ("logging_steps",)),
    "save_steps": (500, ("save_steps", "save_strategy")),
}
OF_SUPERVISED = EVERYWHERE | {
    "max_epochs": (3, ("num_train_epochs", "max_steps")),
    "max_len": (1024, ("max_length", "max_seq_length")),
    "lr_scheduler": ("linear", ("lr_scheduler_type",)),
}
DEFAULTS: dict[str, dict[str, tuple[Any, tuple[str, ...]]]] = {
    "train_sft": OF_SUPERVISED | {"learning_rate": (2e-5, ("learning_rate",))},
    "train_rm": OF_SUPERVISED | {"learning_rate": (1e-4, ("learning_rate",))},
    "train_dpo": OF_SUPERVISED | {"learning_rate": (1e-6, ("learning_rate",)), "beta": (0.1, ("beta",))},
    "train_kto": OF_SUPERVISED | {"learning_rate": (1e-6, ("learning_rate",)), "beta": (0.1, ("beta",))},
    "train_ppo_ray": EVERYWHERE
    | {
        "num_episodes": (3, ("num_train_epochs", "max_steps")),
        "generate_max_len": (256, ("max_completion_length",)),
    },
}
"""Command -> flag -> what TRL 1.16 takes where none of the keys behind it is there."""
COLUMNS = {
    "train_sft": "--input_key messages --apply_chat_template",
    "train_rm": "--prompt_key prompt --apply_chat_template",
    "train_dpo": "--prompt_key prompt --apply_chat_template",
    "train_kto": "--input_key prompt --output_key completion --label_key label --apply_chat_template",
    "train_ppo_ray": "--input_key prompt --apply_chat_template",
}
"""The columns that TRL reads by itself."""
