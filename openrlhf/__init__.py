"""OpenRLHF: supervised fine-tuning, reward models and PPO with DeepSpeed, Ray and vLLM, on any machine.

The commands are functions here too, each with its configuration::

    import openrlhf

    config = openrlhf.configure(openrlhf.SFTConfig, pretrain="model", dataset="rows.jsonl", output_key="answer")
    folder = openrlhf.train_sft(config)

Names are imported when they are first used: ``import openrlhf`` imports nothing else.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openrlhf.cli.api import batch_inference as batch_inference
    from openrlhf.cli.api import merge as merge
    from openrlhf.cli.api import train_dpo as train_dpo
    from openrlhf.cli.api import train_kd as train_kd
    from openrlhf.cli.api import train_kto as train_kto
    from openrlhf.cli.api import train_ppo as train_ppo
    from openrlhf.cli.api import train_ppo_ray as train_ppo_ray
    from openrlhf.cli.api import train_prm as train_prm
    from openrlhf.cli.api import train_rm as train_rm
    from openrlhf.cli.api import train_sft as train_sft
    from openrlhf.config.arguments import configure as configure
    from openrlhf.config.combiner import CombinerConfig as CombinerConfig
    from openrlhf.config.inference import BatchInferenceConfig as BatchInferenceConfig
    from openrlhf.config.ppo import PPOConfig as PPOConfig
    from openrlhf.config.ppo_ray import RayPPOConfig as RayPPOConfig
    from openrlhf.config.supervised import DPOConfig as DPOConfig
    from openrlhf.config.supervised import KDConfig as KDConfig
    from openrlhf.config.supervised import KTOConfig as KTOConfig
    from openrlhf.config.supervised import PRMConfig as PRMConfig
    from openrlhf.config.supervised import RewardModelConfig as RewardModelConfig
    from openrlhf.config.supervised import SFTConfig as SFTConfig

__version__ = "0.6.0"
_NAMES = {
    "openrlhf.cli.api": (
        *("train_sft", "train_rm", "train_dpo", "train_kto", "train_kd", "train_prm", "train_ppo", "train_ppo_ray"),
        *("batch_inference", "merge"),
    ),
    "openrlhf.config.arguments": ("configure",),
    "openrlhf.config.supervised": (
        *("SFTConfig", "RewardModelConfig", "DPOConfig", "KTOConfig", "KDConfig", "PRMConfig"),
    ),
    "openrlhf.config.ppo": ("PPOConfig",),
    "openrlhf.config.ppo_ray": ("RayPPOConfig",),
    "openrlhf.config.inference": ("BatchInferenceConfig",),
    "openrlhf.config.combiner": ("CombinerConfig",),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
