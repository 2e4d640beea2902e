"""OpenRLHF: supervised fine-tuning, reward models and PPO with DeepSpeed, Ray and vLLM, on any machine."""

__version__ = "0.6.0"
