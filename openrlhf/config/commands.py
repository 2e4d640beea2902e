"""The commands: what a person calls them, their modules in ``openrlhf.cli``, and where their flags are."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

COMMANDS = {
    "sft": ("train_sft", "supervised fine-tuning and continued pre-training"),
    "rm": ("train_rm", "a reward model from pairs of answers"),
    "dpo": ("train_dpo", "preference optimisation on pairs: DPO, IPO, cDPO, SimPO, ORPO"),
    "kto": ("train_kto", "preference optimisation on single answers"),
    "kd": ("train_kd", "distillation from a larger model"),
    "prm": ("train_prm", "a process reward model that judges steps"),
    "ppo": ("train_ppo", "reinforcement learning in one program"),
    "ppo-ray": ("train_ppo_ray", "reinforcement learning on Ray, with vLLM"),
    "batch": ("batch_inference", "answers to a data set, or rewards of answers"),
    "serve-rm": ("serve_rm", "a reward model over HTTP"),
    "chat": ("interactive_chat", "talk to a model"),
    "merge": ("lora_combiner", "an adapter merged into its base model"),
    "report": ("report", "the report of a run folder"),
    "migrate": ("migrate", "a script in the other spelling of its flags, or a TRL configuration as a command"),
}
"""What a person calls each module, and a line about it."""
CONFIGS = {
    "train_sft": "openrlhf.config.supervised:SFTConfig",
    "train_rm": "openrlhf.config.supervised:RewardModelConfig",
    "train_dpo": "openrlhf.config.supervised:DPOConfig",
    "train_kto": "openrlhf.config.supervised:KTOConfig",
    "train_kd": "openrlhf.config.supervised:KDConfig",
    "train_prm": "openrlhf.config.supervised:PRMConfig",
    "train_ppo": "openrlhf.config.ppo:PPOConfig",
    "train_ppo_ray": "openrlhf.config.ppo_ray:RayPPOConfig",
    "serve_rm": "openrlhf.config.serve:ServeConfig",
    "batch_inference": "openrlhf.config.inference:BatchInferenceConfig",
    "interactive_chat": "openrlhf.config.chat:ChatConfig",
    "lora_combiner": "openrlhf.config.combiner:CombinerConfig",
}
"""Where the flags of each command are."""


@cache
def config_class(command: str) -> Any:
    """Return the configuration class of a command."""
    module, _, name = CONFIGS[command].partition(":")
    return getattr(import_module(module), name)
