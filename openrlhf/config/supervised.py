"""The configurations of the six supervised commands, and the data groups that only one of them has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from openrlhf.config.algorithms import PAIR_LOSSES, PairLoss
from openrlhf.config.checks import NO_ANSWER, answer_problems, same_key_problems
from openrlhf.config.flags import flag
from openrlhf.config.groups import (
    AttentionConfig,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    LoggingConfig,
    LoRAConfig,
    ModelConfig,
    OptimConfig,
    PreferenceDataConfig,
    SFTDataConfig,
    common_problems,
)

REF_OFFLOAD_HELP = "Keep the shards of the reference model in main memory."
PRECOMPUTE_HELP = "Compute what the reference model says once before training, and free it."
SIMPO_BETA = 1.0
"""SimPO's rewards are means over tokens: below this its beta would hardly be felt."""


@dataclass(frozen=True)
class SupervisedConfig:
    """What every supervised command is made of; a command gives its own defaults and flags."""

    run_prefix: ClassVar[str]
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def problems(self) -> list[str]:
        return common_problems(self)


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning.

    Train a language model on prompts and answers.
    """

    run_prefix: ClassVar[str] = "sft"
    data: SFTDataConfig = field(default_factory=SFTDataConfig)
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(max_epochs=2))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_sft"))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="openrlhf_train_sft"))


@dataclass(frozen=True)
class RewardModelConfig(SupervisedConfig):
    """Reward model training.

    Train a scalar model on pairs of a preferred and another answer.
    """

    run_prefix: ClassVar[str] = "rm"
    value_head_prefix: str = flag("score", "Name of the scalar head; the one in config.json wins.")
    compute_fp32_loss: bool = flag(False, "Compute the loss in fp32.")
    margin_loss: bool = flag(False, "Subtract the margin column of the data in the loss.")
    loss: str = flag("sigmoid", "sigmoid, or anything else for the log-exp loss.")
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(micro_train_batch_size=1))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=9e-6))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_rm"))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="openrlhf_train_rm"))

    def notices(self) -> list[str]:
        if self.loss in ("sigmoid", "logexp"):
            return []
        return [f"--loss {self.loss}: every name but sigmoid means the log-exp loss"]


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """Direct preference optimisation.

    Train a language model on pairs of a preferred and another answer, without a reward model.
    """

    run_prefix: ClassVar[str] = "dpo"
    loss: str = flag("dpo", "Loss of a pair.", choices=PAIR_LOSSES)
    beta: float = flag(0.1, "How strongly the pairs count against the reference (orpo: against the NLL).", above=0)
    ipo: bool = flag(False, "The same as --loss ipo.")
    label_smoothing: float = flag(0.0, "Share of pairs taken to be labelled wrongly.", at_least=0, at_most=0.5)
    target_margin: float = flag(0.5, "By how much simpo lets the chosen answer win.", at_least=0)
    nll_loss_coef: float = flag(0.0, "Weight of the NLL of the chosen answer, a mean over its tokens.", at_least=0)
    ref_pretrain: str | None = flag(None, "Reference model; default is --pretrain.")
    ref_offload: bool = flag(False, REF_OFFLOAD_HELP)
    precompute_ref_log_probs: bool = flag(False, PRECOMPUTE_HELP)
    data: PreferenceDataConfig = field(default_factory=PreferenceDataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_dpo"))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="openrlhf_train_dpo"))

    @property
    def loss_name(self) -> str:
        """The loss that ``--loss`` and ``--ipo`` choose."""
        return "ipo" if self.ipo else self.loss

    @property
    def pair_loss(self) -> PairLoss:
        """Where the loss lives, and what it needs."""
        return PAIR_LOSSES[self.loss_name]

    @property
    def loss_options(self) -> dict[str, Any]:
        """The values of the flags that the loss reads."""
        return {name: getattr(self, name) for name in self.pair_loss.flags}

    @property
    def reference(self) -> str | None:
        """Folder or hub name of the reference model; None where the loss has none."""
        return (self.ref_pretrain or self.model.pretrain) if self.pair_loss.needs_reference else None

    def problems(self) -> list[str]:
        found = super().problems()
        if self.ipo and self.loss not in ("dpo", "ipo"):
            found.append(f"--ipo and --loss {self.loss} exclude each other: drop one")
        if self.label_smoothing and "label_smoothing" not in self.pair_loss.flags:
            found.append(f"--label_smoothing needs --loss dpo, not {self.loss_name}: drop it")
        if self.nll_loss_coef and self.loss_name == "orpo":
            found.append("--nll_loss_coef and --loss orpo exclude each other: orpo has that term; drop the first")
        return found

    def notices(self) -> list[str]:
        if self.loss_name != "simpo" or self.beta >= SIMPO_BETA:
            return []
        return [f"--loss simpo with --beta {self.beta:g} learns little: its authors use 2 to 10"]


@dataclass(frozen=True)
class KTOModelConfig(ModelConfig):
    """Model."""

    pretrain: str = flag("bigscience/bloomz-1b7", "Model to train: a local folder or a hub name.")


@dataclass(frozen=True)
class UnpairedDataConfig(DataConfig):
    """Data."""

    multiturn: ClassVar[bool] = False
    pretrain_mode: ClassVar[bool] = False
    dataset: str = flag("Dahoas/full-hh-rlhf", "Data sets, separated by commas: hub names, folders, or files.")
    input_template: str | None = flag("User: {}\nAssistant: ", "Template with one {} for the prompt; '' means none.")
    input_key: str = flag("input", "Column of the prompt, or of the conversation.")
    output_key: str | None = flag(None, "Column of the answer; default is the last message of --input_key.")
    label_key: str = flag("label", "Column that says whether the answer is desirable: true or 1, false or 0.")

    def problems(self) -> list[str]:
        keys = {"input_key": self.input_key, "output_key": self.output_key, "label_key": self.label_key}
        found = super().problems() + same_key_problems(**keys)
        return found + answer_problems(self, self.output_key or self.apply_chat_template, NO_ANSWER)


@dataclass(frozen=True)
class KTOConfig(SupervisedConfig):
    """Kahneman-Tversky optimisation.

    Train a language model on answers that are each said to be desirable or not.
    """

    run_prefix: ClassVar[str] = "kto"
    beta: float = flag(0.01, "How strongly the answers count against the reference.", above=0)
    desirable_loss_weight: float = flag(1.0, "Weight of desirable answers.", at_least=0)
    undesirable_loss_weight: float = flag(1.0, "Weight of the other answers.", at_least=0)
    ref_offload: bool = flag(False, REF_OFFLOAD_HELP)
    precompute_ref_log_probs: bool = flag(False, PRECOMPUTE_HELP)
    model: KTOModelConfig = field(default_factory=KTOModelConfig)
    data: UnpairedDataConfig = field(default_factory=UnpairedDataConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_kto"))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="openrlhf_train_dpo"))

    def problems(self) -> list[str]:
        alone = (
            "--train_batch_size 1 leaves no other answer to measure the drift from the reference with; "
            "KTO needs at least 2"
        )
        return super().problems() + ([alone] if self.batch.train_batch_size < 2 else [])


@dataclass(frozen=True)
class KDDataConfig(SFTDataConfig):
    """Data."""

    output_key: str = flag("output", "Column of the answer; '' takes the last message of --input_key.")


@dataclass(frozen=True)
class KDConfig(SupervisedConfig):
    """Knowledge distillation.

    Train a language model on answers and on what a larger one would say at each of their tokens.
    """

    run_prefix: ClassVar[str] = "kd"
    teacher_model: str | None = flag(None, "Teacher: a language model with the tokenizer of --pretrain.")
    kd_coef: float = flag(0.4, "Share of the teacher in the loss; the rest is the NLL.", at_least=0, at_most=1)
    teacher_offload: bool = flag(False, "Keep the shards of the teacher in main memory.")
    data: KDDataConfig = field(default_factory=KDDataConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_kd"))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="openrlhf_train_sft"))

    def problems(self) -> list[str]:
        missing = "--teacher_model is missing: name the folder or hub name of the teacher"
        return super().problems() + ([] if self.teacher_model else [missing])


@dataclass(frozen=True)
class ProcessDataConfig(DataConfig):
    """Data."""

    input_key: str = flag("input", "Column of the text, which holds --placeholder_token after every step.")
    steps_key: str | None = flag(None, "Column of the answer as a list of steps; default is --input_key holds them.")
    label_key: str = flag("label", "Column of the labels, a list with one for every step.")
    placeholder_token: str | None = flag(None, "The token that stands at the end of every step.")
    reward_tokens: tuple[str, ...] | None = flag(
        None, "Tokens that a label can be, the positive one first; default is the whole vocabulary."
    )

    def problems(self) -> list[str]:
        keys = {"input_key": self.input_key, "steps_key": self.steps_key, "label_key": self.label_key}
        found = super().problems() + same_key_problems(**keys)
        if not self.placeholder_token:
            found.append("--placeholder_token is missing: name the token that stands at the end of every step")
        tokens = self.reward_tokens or ()
        if self.reward_tokens and (len(tokens) < 2 or len(set(tokens)) < len(tokens)):
            found.append(f"--reward_tokens {' '.join(tokens)}: give two different tokens or more")
        return found


@dataclass(frozen=True)
class PRMConfig(SupervisedConfig):
    """Process reward model training.

    Train a language model to say after every step of an answer whether the step is right.
    """

    run_prefix: ClassVar[str] = "prm"
    data: ProcessDataConfig = field(default_factory=ProcessDataConfig)
    batch: BatchConfig = field(default_factory=lambda: BatchConfig(micro_train_batch_size=1))
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-6))
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(ckpt_path="./ckpt/checkpoints_prm"))
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="openrlhf_train_prm"))
