"""The configuration of PPO on Ray: PPO, where its models lie, and the vLLM engines beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from openrlhf.config.flags import flag
from openrlhf.config.groups import CheckpointConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.config.ppo_rollout import PromptDataConfig, RolloutConfig


@dataclass(frozen=True)
class PlacementConfig:
    """Placement on the cluster."""

    actor_num_nodes: int = flag(1, "Nodes of the actor.", at_least=1)
    actor_num_gpus_per_node: int = flag(8, "Device slots per node of the actor.", at_least=1)
    critic_num_nodes: int = flag(1, "Nodes of the critic.", at_least=1)
    critic_num_gpus_per_node: int = flag(8, "Device slots per node of the critic.", at_least=1)
    ref_num_nodes: int = flag(1, "Nodes of the reference model.", at_least=1)
    ref_num_gpus_per_node: int = flag(8, "Device slots per node of the reference model.", at_least=1)
    reward_num_nodes: int = flag(1, "Nodes of each reward model.", at_least=1)
    reward_num_gpus_per_node: int = flag(8, "Device slots per node of each reward model.", at_least=1)
    colocate_actor_ref: bool = flag(False, "Actor and reference share devices.")
    colocate_critic_reward: bool = flag(False, "Critic and reward models share devices.")
    colocate_all_models: bool = flag(False, "All models and the vLLM engines share devices.")
    deepspeed_enable_sleep: bool = flag(False, "Keep optimizer states in main memory but during updates.")


@dataclass(frozen=True)
class VLLMConfig:
    """vLLM engines."""

    vllm_num_engines: int | None = flag(None, "vLLM engines; unset or 0: the policy generates.", at_least=0)
    vllm_tensor_parallel_size: int = flag(1, "Devices of one engine.", at_least=1)
    vllm_sync_backend: str = flag("nccl", "How weights travel to the engines.", choices=("nccl", "gloo"))
    vllm_sync_with_ray: bool = flag(False, "Send weights through Ray's collective group.")
    enable_prefix_caching: bool = flag(False, "Reuse the work on shared prompts; emptied at every weight sync.")
    enforce_eager: bool = flag(False, "Do not compile the engine: starts faster, generates slower.")
    vllm_enable_sleep: bool = flag(False, "Free the memory of the engines while training.")
    vllm_gpu_memory_utilization: float = flag(0.9, "Share of GPU memory that an engine may use.", above=0, at_most=1)
    sync_tolerance: float | None = flag(
        None, "Largest mean gap of engine and trainer log-probs; default 1e-3 in fp32, 0.1 in bf16.", above=0
    )

    @property
    def engines(self) -> int:
        """The number of vLLM engines; 0 means that the policy generates."""
        return self.vllm_num_engines or 0


@dataclass(frozen=True)
class RayPPOConfig(PPOConfig):
    """PPO on Ray.

    Train a policy against reward models with PPO or a relative of it, every model on devices of its own.
    """

    prompts: PromptDataConfig = field(default_factory=PromptDataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    checkpoint: CheckpointConfig = field(
        default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_ppo_ray")
    )
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    perf: bool = flag(False, "Record the time of each phase.")

    @property
    def engines(self) -> int:
        """The number of vLLM engines; 0 means that the policy itself generates."""
        return self.vllm.engines

    @property
    def optimizer_rests(self) -> bool:
        """Whether the states of the optimizers leave their GPUs for main memory but during updates.

        ZeRO holds them, so without it they stay; with ``--adam_offload`` they never were on a GPU.
        """
        return (
            self.placement.deepspeed_enable_sleep and self.deepspeed.zero_stage > 0 and not self.deepspeed.adam_offload
        )

    @property
    def sync_tolerance(self) -> float | None:
        """Largest mean gap of engine and trainer log-probs; None for what the dtype allows."""
        return self.vllm.sync_tolerance
