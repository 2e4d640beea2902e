"""The flag groups of PPO, and the configurations of its two programs: that of Ray is the other one and placement."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil
from typing import ClassVar

from openrlhf.config.checks import (
    file_problems,
    source_problems,
    template_problems,
)
from openrlhf.config.flags import flag
from openrlhf.config.groups import (
    EVERYTHING,
    SPELLED,
    SPELLED_HELP,
    TOO_LONG,
    TOO_LONG_HELP,
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

NO_BEST = "none"


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
class RolloutConfig:
    """Rollouts."""

    num_episodes: int = flag(1, "Passes over the prompts.", at_least=1)
    rollout_batch_size: int = flag(1024, "Prompts of one rollout step over all ranks.", at_least=1)
    micro_rollout_batch_size: int = flag(
        8, "Samples per forward pass when scoring rollouts, and when the policy itself generates.", at_least=1
    )
    rollout_max_tokens_per_gpu: int | None = flag(
        None,
        "Most tokens per rank in one forward pass when scoring rollouts with --use_dynamic_batch; default is "
        "--train_max_tokens_per_gpu.",
        at_least=1,
    )
    n_samples_per_prompt: int = flag(1, "Answers sampled for each prompt.", at_least=1)
    prompt_max_len: int = flag(1024, "Most tokens of a prompt.", at_least=1)
    generate_max_len: int = flag(1024, "Most new tokens of an answer.", at_least=1)
    max_len: int | None = flag(None, "Most tokens of prompt and answer; default is the sum of the two.", at_least=2)
    temperature: float = flag(1.0, "Sampling temperature.", above=0)
    top_p: float = flag(1.0, "Nucleus sampling: mass of the tokens sampled from.", above=0, at_most=1)
    dynamic_filtering: bool = flag(False, "Replace prompts whose answers are all right or all wrong by fresh ones.")
    dynamic_filtering_reward_range: tuple[float, float] | None = flag(
        None,
        "Between which the mean score of the answers to a prompt must lie; default is 0 1 with one reward source.",
    )

    @property
    def filtering_range(self) -> tuple[float, float]:
        """Between which the mean score of the answers to a prompt must lie."""
        return self.dynamic_filtering_reward_range or (0.0, 1.0)

    def problems(self) -> list[str]:
        low, high = self.filtering_range
        found = []
        if low >= high:
            found.append(f"--dynamic_filtering_reward_range {low:g} {high:g}: the first must be below the second")
        if self.dynamic_filtering and self.n_samples_per_prompt < 2:
            found.append(
                "--dynamic_filtering compares answers to one prompt: --n_samples_per_prompt must be above 1, it is "
                f"{self.n_samples_per_prompt}"
            )
        return found

    @property
    def samples(self) -> int:
        """Answers of one rollout step over all ranks."""
        return self.rollout_batch_size * self.n_samples_per_prompt

    @property
    def max_model_len(self) -> int:
        """Tokens that a generation engine must have room for."""
        if self.max_len and not self.leaves_no_room:
            return self.max_len
        return self.prompt_max_len + self.generate_max_len

    @property
    def leaves_no_room(self) -> bool:
        """Whether ``max_len`` would leave no room for an answer after the longest prompt; then it is not used."""
        return self.max_len is not None and self.max_len <= self.prompt_max_len


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
class PromptDataConfig:
    """Prompts."""

    prompt_data: str | None = flag(None, "Prompt data sets, separated by commas.")
    prompt_data_probs: str = flag("1.0", "Mixing probability of each prompt data set, separated by commas.")
    prompt_split: str = flag("train", "Split of the prompts.")
    max_samples: int = flag(EVERYTHING, "Most rows used of each data set, and of the mixture.", at_least=1)
    input_key: str = flag("input", "Column of the prompt or the conversation.")
    input_template: str | None = flag(None, "Template with one {} for the prompt; '' means none.")
    apply_chat_template: bool = flag(False, "Use the chat template of the tokenizer.")
    tokenizer_chat_template: str | None = flag(None, "Jinja chat template to use instead of the tokenizer's.")
    too_long: str = flag("cut", TOO_LONG_HELP, choices=TOO_LONG)
    special_tokens_in_text: str | None = flag(None, SPELLED_HELP, choices=SPELLED)
    pretrain_data: str | None = flag(None, "Texts of PPO-ptx: column text, else --input_key.")
    pretrain_data_probs: str = flag("1.0", "Mixing probability of each text data set, separated by commas.")
    pretrain_split: str = flag("train", "Split of the texts.")

    def problems(self) -> list[str]:
        if self.prompt_data is None:
            return ["--prompt_data is missing: name a folder, a .jsonl file, or a hub data set with prompts"]
        found = source_problems("prompt_data", self.prompt_data, self.prompt_data_probs)
        if self.pretrain_data is not None:
            found += source_problems("pretrain_data", self.pretrain_data, self.pretrain_data_probs)
        return found + ([] if self.apply_chat_template else template_problems(self.input_template))


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training."""

    eval_dataset: str | None = flag(None, "Prompts to evaluate on; default is no evaluation.")
    eval_split: str = flag("test", "Split of the evaluation prompts.")
    eval_temperature: tuple[float, ...] = flag((1.0,), "Temperatures to evaluate at; 0 is greedy.", at_least=0)
    eval_n_samples_per_prompt: int = flag(1, "Answers for each evaluation prompt.", at_least=1)
    best_metric_key: str = flag(
        "", "Figure of the evaluation whose best checkpoint is kept, as eval_default_pass1; 'none' for no such."
    )
    eval_reward_func: str | None = flag(None, "A .py file that scores rollouts and evaluation for the log only.")

    def problems(self) -> list[str]:
        path, found = self.eval_reward_func, source_problems("eval_dataset", self.eval_dataset)
        if path and not path.endswith(".py"):
            return [*found, f"--eval_reward_func {path} is not a .py file: name one"]
        return found + file_problems("eval_reward_func", path)


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
        """Whether the states of the optimizers lie in main memory but during updates."""
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
                "no reward: name a model with --reward_pretrain, or a .py file or a server with --remote_rm_url"
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
        """Whether the states of the optimizers lie in main memory but during updates."""
        return self.placement.deepspeed_enable_sleep

    @property
    def sync_tolerance(self) -> float | None:
        """Largest mean gap of engine and trainer log-probs; None for what the dtype allows."""
        return self.vllm.sync_tolerance
