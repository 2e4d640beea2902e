"""The commands as functions, for notebooks and programs: ``openrlhf.train_sft(openrlhf.SFTConfig(...))``.

A configuration is built group by group, or by ``openrlhf.configure`` from the names of the flags. It is checked as a
command line is, and what is wrong is raised as an error of ``openrlhf/errors.py``. Light to import: torch comes with
the first call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from openrlhf import device
from openrlhf.config.arguments import Problems, checked
from openrlhf.config.combiner import CombinerConfig
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.config.ppo_ray import RayPPOConfig
from openrlhf.config.supervised import DPOConfig, KDConfig, KTOConfig, PRMConfig, RewardModelConfig, SFTConfig


def train_sft(config: SFTConfig) -> Path:
    """Fine-tune a language model on demonstrations; return the folder of the model."""
    from openrlhf.cli.train_sft import command

    return _train(command.train, config)


def train_rm(config: RewardModelConfig) -> Path:
    """Train a reward model on pairs of answers; return its folder."""
    from openrlhf.cli.train_rm import command

    return _train(command.train, config)


def train_dpo(config: DPOConfig) -> Path:
    """Optimise a language model on pairs of answers; return its folder."""
    from openrlhf.cli.train_dpo import command

    return _train(command.train, config)


def train_kto(config: KTOConfig) -> Path:
    """Optimise a language model on single answers; return its folder."""
    from openrlhf.cli.train_kto import command

    return _train(command.train, config)


def train_kd(config: KDConfig) -> Path:
    """Distil a language model into a smaller one; return its folder."""
    from openrlhf.cli.train_kd import command

    return _train(command.train, config)


def train_prm(config: PRMConfig) -> Path:
    """Train a model that judges steps; return its folder."""
    from openrlhf.cli.train_prm import command

    return _train(command.train, config)


def train_ppo(config: PPOConfig) -> Path:
    """Train a policy in this program; return its folder."""
    from openrlhf.cli.train_ppo import train

    return _train(train, config)


def train_ppo_ray(config: RayPPOConfig) -> Path:
    """Train a policy on Ray, with vLLM engines where there are any; return its folder."""
    from openrlhf.cli.train_ppo_ray import placement_problems, train

    return _train(train, config, placement_problems)


def batch_inference(config: BatchInferenceConfig) -> Path:
    """Answer prompts, or rate answers; return the file of JSON lines."""
    from openrlhf.cli.batch_inference import infer, problems

    return Path(_run(infer, config, problems).output_path)


def merge(config: CombinerConfig) -> Path:
    """Merge an adapter into its base model; return the folder of the whole one."""
    from openrlhf.cli.lora_combiner import combine

    return Path(_run(combine, config).output_path)


def _train(work: Any, config: Any, problems: Problems | None = None) -> Path:
    return Path(_run(work, config, problems).checkpoint.save_path)


def _run(work: Any, config: Any, problems: Problems | None = None) -> Any:
    """Check ``config``, do the work, and return the configuration that was meant."""
    from openrlhf.cli.downloads import fetched

    device.configure_threads()
    config = checked(config, also=problems)
    work(fetched(config))
    return config
