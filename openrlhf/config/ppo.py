"""The configuration of PPO, and the flags of its models and optimizers; that on Ray builds on it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from typing import ClassVar

from openrlhf.config.flags import flag
from openrlhf.config.groups import (
    AttentionConfig,
    BatchConfig,
    CheckpointConfig,
    DeepSpeedConfig,
    LoggingConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    common_problems,
)
from openrlhf.config.ppo_algorithm import AlgorithmConfig
from openrlhf.config.ppo_reward import RewardConfig
from openrlhf.config.ppo_rollout import EvalConfig, PromptDataConfig, RolloutConfig

ACTOR, REFERENCE, CRITIC = "actor", "ref", "critic"
PROCESS = "prm"
"""The role of the process reward model; reward models are in ``PPOModelConfig.reward_names``."""


@dataclass(frozen=True)
class PPOModelConfig(ModelConfig):
    """Models."""

    reward_pretrain: str | None = flag(None, "Reward models, separated by commas.")
    critic_pretrain: str | None = flag(None, "Start of the critic; default is a reward model, else --pretrain.")
    value_head_prefix: str = flag("score", "Name of the scalar head; the one in config.json wins.")

    @property
    def reward_models(self) -> list[str]:
        """The reward model folders or hub names."""
        return [path.strip() for path in (self.reward_pretrain or "").split(",") if path.strip()]

    @property
    def reward_names(self) -> list[str]:
        """What the groups of the reward models are called."""
        return ["reward" if number == 1 else f"reward-{number}" for number in range(1, len(self.reward_models) + 1)]


@dataclass(frozen=True)
class PPOOptimConfig:
    """Optimizers."""

    actor_learning_rate: float = flag(1e-6, "Peak learning rate of the actor.", at_least=0)
    critic_learning_rate: float = flag(9e-6, "Peak learning rate of the critic.", at_least=0)
    lr_warmup_ratio: float = flag(0.03, "Share of the optimizer steps used for warm-up.", at_least=0, at_most=1)
    l2: float = flag(0.0, "Weight decay; biases and norm weights have none.", at_least=0)
    adam_betas: tuple[float, float] = flag((0.9, 0.95), "Adam's two decay rates.", at_least=0, at_most=1)
    max_norm: float = flag(1.0, "Gradient clipping norm; 0 does not clip.", at_least=0)

    @property
    def actor(self) -> OptimConfig:
        """The optimizer settings of the actor."""
        return OptimConfig(
            learning_rate=self.actor_learning_rate,
            lr_warmup_ratio=self.lr_warmup_ratio,
            l2=self.l2,
            adam_betas=self.adam_betas,
            max_norm=self.max_norm,
        )

    @property
    def critic(self) -> OptimConfig:
        """The optimizer settings of the critic."""
        return replace(self.actor, learning_rate=self.critic_learning_rate)


@dataclass(frozen=True)
class PPOConfig:
    """PPO.

    Train a policy against reward models with PPO or a relative of it.
    """

    run_prefix: ClassVar[str] = "ppo"
    model: PPOModelConfig = field(default_factory=PPOModelConfig)
    prompts: PromptDataConfig = field(default_factory=lambda: PromptDataConfig(max_samples=1_000_000))
    reward: RewardConfig = field(default_factory=RewardConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(rollout_batch_size=512))
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(micro_train_batch_size=4))
    optim: PPOOptimConfig = field(default_factory=PPOOptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_ppo"))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="openrlhf_train_ppo"))
    save_value_network: bool = flag(False, "Also export the critic to <save_path>_critic.")
    actor_init_on_gpu: bool = flag(False, "Move the actor to its GPU before DeepSpeed starts.")

    @property
    def engines(self) -> int:
        """The number of engines that generate; 0 means that the policy itself does."""
        return 0

    @property
    def optimizer_rests(self) -> bool:
        """Whether the states of the optimizers leave their GPUs for main memory but during updates."""
        return False

    @property
    def sync_tolerance(self) -> float | None:
        """Largest mean gap of engine and trainer log-probs; None for what the dtype allows."""
        return None

    @property
    def loads_reference(self) -> bool:
        """Whether the reference is a model of its own; with adapters it is the policy without them."""
        return self.algorithm.needs_reference and not self.lora.lora_rank

    @property
    def role_names(self) -> tuple[str, ...]:
        """The models of the run in their order: each is a group of workers of its own."""
        return (
            ACTOR,
            *[REFERENCE] * self.loads_reference,
            *[CRITIC] * self.algorithm.estimator.needs_critic,
            *self.model.reward_names,
            *[PROCESS] * bool(self.reward.prm_pretrain),
        )

    @property
    def scoring_budget(self) -> int | None:
        """Most tokens of a forward pass on a rank that scores rollouts; None where samples are counted."""
        train = self.batch.max_tokens_per_gpu
        return None if train is None else self.rollout.rollout_max_tokens_per_gpu or train

    @property
    def reward_weights(self) -> tuple[list[float], list[float]]:
        """The weights of the reward models, and those of the python files and servers."""
        models = len(self.model.reward_models)
        weights = self.reward.weights(models)
        return weights[:models], weights[models:]

    @property
    def critic_source(self) -> str | None:
        """Where the critic starts from; None when the estimator needs none."""
        if not self.algorithm.estimator.needs_critic:
            return None
        first = None if self.reward.remote_rm_url else next(iter(self.model.reward_models), None)
        return self.model.critic_pretrain or first or self.model.pretrain

    def optimizer_steps(self, prompts: int) -> int:
        """Return the optimizer steps of a run over ``prompts``: the length of the learning-rate schedule.

        A run with dynamic filtering has fewer.
        """
        rollout, batch = self.rollout, self.batch
        full, rest = divmod(prompts, rollout.rollout_batch_size)
        sizes = [rollout.rollout_batch_size] * full + [rest] * bool(rest)
        steps = sum(ceil(size * rollout.n_samples_per_prompt / batch.train_batch_size) for size in sizes)
        return rollout.num_episodes * steps * batch.max_epochs

    def problems(self) -> list[str]:
        found = common_problems(self)
        samples, estimator = self.rollout.n_samples_per_prompt, self.algorithm
        if estimator.estimator.needs_group and samples < 2:
            name = estimator.advantage_estimator
            found.append(
                f"--advantage_estimator {name} compares answers to one prompt: "
                f"--n_samples_per_prompt must be above 1, it is {samples}"
            )
        if not (self.model.reward_models or self.reward.remote_sources or self.reward.prm_pretrain):
            found.append(
                "no reward: name a model with --reward_pretrain, a .py file or a server with --remote_rm_url, or a "
                "process reward model with --prm_pretrain"
            )
        try:
            self.reward.weights(len(self.model.reward_models))
        except ValueError as error:
            found.append(f"--reward_weights {error}")
        found += self.reward.prm_problems()
        if self.reward.prm_pretrain and estimator.estimator.rescales:
            found.append(
                f"--prm_pretrain gives rewards within an answer, and --advantage_estimator "
                f"{estimator.advantage_estimator} divides by the spread of whole ones: take rloo or dr_grpo"
            )
        if self.rollout.dynamic_filtering and estimator.estimator.needs_greedy:
            name = estimator.advantage_estimator
            found.append(f"--dynamic_filtering and --advantage_estimator {name} exclude each other: drop one")
        found += self._filtering_problems()
        longest, buffer = self.rollout.generate_max_len, self.reward.overlong_buffer_len
        if buffer is not None and buffer > longest:
            found.append(f"--overlong_buffer_len {buffer:g} is more than --generate_max_len {longest}: lower it")
        if self.checkpoint.use_ds_universal_ckpt:
            found.append(
                "--use_ds_universal_ckpt converts checkpoints of the supervised commands only: leave it out, and "
                "resume with the ranks and the --zero_stage that the checkpoint was saved with"
            )
        return found

    def _filtering_problems(self) -> list[str]:
        """Return why the scores that dynamic filtering goes by need not lie between 0 and 1."""
        models, reward = self.model.reward_models, self.reward
        sources = len(models) + reward.remote_sources + bool(reward.prm_pretrain)
        unbounded = bool(models) or bool(reward.prm_pretrain) or sources > 1
        if not (self.rollout.dynamic_filtering and unbounded and self.rollout.dynamic_filtering_reward_range is None):
            return []
        what = "the sum of several reward sources" if sources > 1 else "the score of a reward model"
        return [
            f"--dynamic_filtering goes by {what}, which may lie anywhere: say with --dynamic_filtering_reward_range "
            "LOW HIGH between which the mean of a prompt's answers must lie"
        ]

    def notices(self) -> list[str]:
        samples, step = self.rollout.samples, self.batch.train_batch_size
        found = []
        if self.rollout.leaves_no_room:
            found.append(
                f"--max_len has no effect here: {self.rollout.max_len} leaves no room for an answer after "
                f"--prompt_max_len {self.rollout.prompt_max_len}; both together take up to "
                f"{self.rollout.max_model_len} tokens"
            )
        if samples < step:
            found.append(
                f"--train_batch_size {step} is more than the {samples} answers of a rollout: a step takes all"
            )
        if self.reward.normalize_reward and not (self.model.reward_models or self.model.critic_pretrain):
            found.append("--normalize_reward has no effect: it uses the mean and std of a reward model, there is none")
        if self.save_value_network and not self.algorithm.estimator.needs_critic:
            found.append(f"--save_value_network: {self.algorithm.advantage_estimator} has no critic to save")
        return found
