"""The flag groups that commands share; the commands are in `supervised.py` and `ppo.py`.

A group is a frozen dataclass, a flag is one of its fields. A command composes groups and overrides only the defaults
that are its own. ``problems()`` of a group or command returns what is wrong across its flags, one sentence each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from openrlhf.config.checks import (
    NO_DEMONSTRATION,
    answer_problems,
    missing_model,
    profiled_steps,
    same_key_problems,
    source_problems,
    template_problems,
)
from openrlhf.config.flags import flag
from openrlhf.config.secrets import NOT_LOGGED, literal_key
from openrlhf.device import gpu_present

# The schedules of transformers.get_scheduler that need nothing but warm-up and total steps; the minimum of
# cosine_with_min_lr is a tenth of the peak.
SCHEDULERS = (
    "cosine_with_min_lr",
    "cosine",
    "cosine_with_restarts",
    "linear",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)
DATA_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
"""Extension of a data file -> its loader in ``datasets``."""
EVERYTHING = 100_000_000
TOO_LONG = ("cut", "drop", "error")
SPELLED = ("text", "token", "error")
TOO_LONG_HELP = "Rows with more tokens than the limit: cut them, drop them, or stop with an error."
SPELLED_HELP = (
    "A special token spelled in the data: plain text, the token, or an error; default is text with "
    "--apply_chat_template, where only the template may begin and end turns, and the token without."
)


@dataclass(frozen=True)
class ModelConfig:
    """Model."""

    pretrain: str | None = flag(None, "Model to train: a local folder or a hub name.")
    bf16: bool = flag(False, "Train bf16 weights with fp32 master weights; without it weights are fp32.")
    disable_fast_tokenizer: bool = flag(False, "Load the slow tokenizer.")
    gradient_checkpointing: bool = flag(False, "Recompute activations in the backward pass to save memory.")
    gradient_checkpointing_use_reentrant: bool = flag(False, "Use the reentrant variant of checkpointing.")
    trust_remote_code: bool = flag(False, "Run model code that comes with the model folder.")
    aux_loss_coef: float = flag(0.0, "Weight of the router load-balancing loss of a mixture of experts.", at_least=0)
    use_liger_kernel: bool = flag(False, "Fused Triton kernels for norms, rotary embeddings and MLPs, on a GPU.")
    use_ms: bool = flag(False, "Take models and data sets that are not on this machine from ModelScope.")

    def problems(self) -> list[str]:
        if self.aux_loss_coef > 0 and self.gradient_checkpointing_use_reentrant:
            return [
                "--aux_loss_coef has no gradient through --gradient_checkpointing_use_reentrant: leave the second out"
            ]
        return []


@dataclass(frozen=True)
class LoRAConfig:
    """LoRA and 4-bit loading."""

    load_in_4bit: bool = flag(False, "Load the base weights as 4-bit NF4 (QLoRA).")
    lora_rank: int = flag(0, "Rank of the adapters; 0 trains every weight.", at_least=0)
    lora_alpha: int = flag(16, "Scale of the adapters; read with --lora_rank.", at_least=1)
    target_modules: tuple[str, ...] = flag(
        ("all-linear",),
        "Linear layers that get adapters, by the ends of their names; all-linear: all but the output head (of a "
        "mixture of experts neither the router nor experts whose weights are stacked in one tensor).",
    )
    lora_dropout: float = flag(0.0, "Dropout of the adapters; read with --lora_rank.", at_least=0, at_most=1)

    def problems(self) -> list[str]:
        if self.load_in_4bit and not self.lora_rank:
            return [
                "--load_in_4bit needs --lora_rank: 4-bit weights cannot be trained, only adapters on them; "
                "add for example --lora_rank 16"
            ]
        return []

    @property
    def without_adapters(self) -> LoRAConfig:
        """What a model that only looks has of these: its weights are in 4 bits where those of the policy are."""
        return replace(self, lora_rank=0)

    def stage_problems(self, zero_stage: int) -> list[str]:
        """Return what is wrong with 4-bit weights under that ZeRO stage."""
        if self.load_in_4bit and zero_stage == 3:
            return ["--load_in_4bit cannot be sharded by --zero_stage 3: use stage 2, or leave the first out"]
        return []


@dataclass(frozen=True)
class AttentionConfig:
    """Attention and packing."""

    flash_attn: bool = flag(False, "Use FlashAttention.")
    packing_samples: bool = flag(False, "Insist on computing without padding: an error where the model cannot.")
    ring_attn_size: int = flag(1, "Neighbouring ranks that share each sequence (ring attention).", at_least=1)
    ring_head_stride: int = flag(1, "Key-value heads that a ring exchanges at a time; a divisor of all.", at_least=1)


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer."""

    learning_rate: float = flag(5e-6, "Peak learning rate.", at_least=0)
    lr_warmup_ratio: float = flag(0.03, "Share of the optimizer steps used for warm-up.", at_least=0, at_most=1)
    lr_scheduler: str = flag("cosine_with_min_lr", "Learning-rate schedule.", choices=SCHEDULERS)
    l2: float = flag(0.0, "Weight decay; biases and norm weights have none.", at_least=0)
    adam_betas: tuple[float, float] = flag((0.9, 0.95), "Adam's two decay rates.", at_least=0, at_most=1)
    max_norm: float = flag(1.0, "Gradient clipping norm; 0 does not clip.", at_least=0)


@dataclass(frozen=True)
class DeepSpeedConfig:
    """DeepSpeed."""

    zero_stage: int = flag(2, "ZeRO stage: what is sharded over the ranks.", choices=(0, 1, 2, 3))
    zpg: int = flag(1, "Ranks of the ZeRO++ secondary partition.", at_least=1)
    adam_offload: bool = flag(False, "Keep optimizer states in main memory.")
    grad_accum_dtype: str | None = flag(None, "Type of accumulated gradients.", choices=("fp32", "bf16", "fp16"))
    overlap_comm: bool = flag(False, "Reduce gradients while the backward pass runs.")
    local_rank: int = flag(-1, "Set by the DeepSpeed launcher; -1 reads LOCAL_RANK.")
    collective_timeout: int = flag(600, "Seconds that a rank waits for the others before it gives up.", at_least=1)

    def problems(self) -> list[str]:
        """Return the combinations that DeepSpeed would refuse later, or treat in silence as another."""
        if self.adam_offload and self.zero_stage == 0 and gpu_present():
            return ["--adam_offload needs --zero_stage 1, 2 or 3, not 0"]
        return []

    def dtype_problems(self, bf16: bool) -> list[str]:
        """Return what is wrong with ``--grad_accum_dtype`` for weights of that type."""
        dtype = self.grad_accum_dtype
        if dtype in (None, "bf16" if bf16 else "fp32") or self.zero_stage > 0:
            return []
        return [f"--grad_accum_dtype {dtype} needs --zero_stage 1, 2 or 3"]


@dataclass(frozen=True)
class BatchConfig:
    """Batches and epochs."""

    micro_train_batch_size: int = flag(8, "Samples per rank in one forward pass (reward model: pairs).", at_least=1)
    train_batch_size: int = flag(128, "Samples of one optimizer step over all ranks.", at_least=1)
    use_dynamic_batch: bool = flag(False, "Cut a step into micro-batches of like many tokens instead of samples.")
    train_max_tokens_per_gpu: int = flag(
        16192,
        "Most tokens per rank in one forward pass with --use_dynamic_batch; a longer sample is alone.",
        at_least=1,
    )
    max_epochs: int = flag(1, "Passes over the data (PPO: over each rollout batch).", at_least=1)
    seed: int = flag(42, "Seed of order, mixing and sampling.", at_least=0)
    max_skipped_steps: int = flag(
        0, "Optimizer steps in a row to leave out when loss or gradient is not finite; 0 stops at once.", at_least=0
    )

    @property
    def max_tokens_per_gpu(self) -> int | None:
        """The token budget of a micro-batch on a rank; None where samples are counted."""
        return self.train_max_tokens_per_gpu if self.use_dynamic_batch else None

    def problems(self) -> list[str]:
        if self.use_dynamic_batch or self.micro_train_batch_size <= self.train_batch_size:
            return []
        return [
            f"--micro_train_batch_size {self.micro_train_batch_size} is larger than --train_batch_size "
            f"{self.train_batch_size}: a step cannot be smaller than one forward pass; lower the first"
        ]


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    dataset: str | None = flag(None, "Data sets, separated by commas: hub names, folders, or files.")
    dataset_probs: str = flag("1.0", "Mixing probability of each data set, separated by commas.")
    eval_dataset: str | None = flag(None, "Data set to evaluate on; default is --eval_split of --dataset.")
    train_split: str = flag("train", "Split to train on.")
    eval_split: str = flag("test", "Split to evaluate on.")
    max_samples: int = flag(EVERYTHING, "Most rows used of each data set, and of the mixture.", at_least=1)
    max_len: int = flag(2048, "Most tokens of a sample.", at_least=2)
    input_template: str | None = flag(None, "Template with one {} for the prompt; '' means none.")
    apply_chat_template: bool = flag(False, "Use the chat template of the tokenizer.")
    tokenizer_chat_template: str | None = flag(None, "Jinja chat template to use instead of the tokenizer's.")
    too_long: str = flag("cut", TOO_LONG_HELP, choices=TOO_LONG)
    special_tokens_in_text: str | None = flag(None, SPELLED_HELP, choices=SPELLED)

    def problems(self) -> list[str]:
        if self.dataset is None:
            return ["--dataset is missing: name a folder, a .jsonl file, or a hub data set"]
        found = source_problems("dataset", self.dataset, self.dataset_probs)
        found += source_problems("eval_dataset", self.eval_dataset)
        return found + ([] if self.apply_chat_template else template_problems(self.input_template))


@dataclass(frozen=True)
class SFTDataConfig(DataConfig):
    """Data."""

    input_template: str | None = flag("User: {}\nAssistant: ", "Template with one {} for the prompt; '' means none.")
    input_key: str = flag("input", "Column of the prompt, the conversation, or the raw text.")
    output_key: str | None = flag(None, "Column of the answer; default is the last message of --input_key.")
    multiturn: bool = flag(False, "Train on every assistant turn of a conversation.")
    pretrain_mode: bool = flag(False, "Train on every token of the raw text.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.multiturn and not self.apply_chat_template:
            found.append("--multiturn needs --apply_chat_template: the turns are found through the template; add it")
        if self.multiturn and self.pretrain_mode:
            found.append("--multiturn and --pretrain_mode exclude each other: the second masks nothing; drop one")
        if not self.pretrain_mode:
            found += same_key_problems(input_key=self.input_key, output_key=self.output_key)
        said = self.output_key or self.apply_chat_template or self.pretrain_mode
        return found + answer_problems(self, said, NO_DEMONSTRATION)


@dataclass(frozen=True)
class PreferenceDataConfig(DataConfig):
    """Data."""

    max_len: int = flag(512, "Most tokens of a sample.", at_least=2)
    prompt_key: str | None = flag(None, "Column of the prompt; default: the two answers hold everything.")
    chosen_key: str = flag("chosen", "Column of the preferred answer.")
    rejected_key: str = flag("rejected", "Column of the other answer.")

    def problems(self) -> list[str]:
        keys = {"prompt_key": self.prompt_key, "chosen_key": self.chosen_key, "rejected_key": self.rejected_key}
        return super().problems() + same_key_problems(**keys)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints and export."""

    save_path: str = flag("./ckpt", "Folder of the final Hugging Face model.")
    save_steps: int = flag(-1, "Checkpoint every N optimizer steps (PPO: rollout steps); -1 never.", at_least=-1)
    ckpt_path: str = flag("./ckpt/checkpoints", "Folder of checkpoints to resume from.")
    max_ckpt_num: int = flag(3, "Most checkpoints kept, beside the one with the best evaluation.", at_least=1)
    max_ckpt_mem: int = flag(EVERYTHING, "Most gigabytes of checkpoints kept.", at_least=1)
    load_checkpoint: bool = flag(False, "Resume from the latest whole checkpoint in --ckpt_path.")
    save_hf_ckpt: bool = flag(False, "Write a Hugging Face model beside each checkpoint.")
    disable_ds_ckpt: bool = flag(False, "Do not write the part of a checkpoint that training resumes from.")
    allow_config_change: bool = flag(False, "Resume although data or flags that change the training are others.")
    use_ds_universal_ckpt: bool = flag(False, "Resume a checkpoint of another number of ranks or ZeRO stage.")

    def problems(self) -> list[str]:
        if self.save_steps:
            return []
        return ["--save_steps 0 is not a cadence: use -1 for never, or a positive number"]

    def notices(self) -> list[str]:
        if self.saves_at_steps or self.save_steps < 1:
            return []
        return ["--save_steps has no effect here: --disable_ds_ckpt leaves --save_hf_ckpt, which is not given"]

    @property
    def saves_at_steps(self) -> bool:
        """Whether there is anything to write every ``save_steps`` steps."""
        return self.save_steps > 0 and (self.save_hf_ckpt or not self.disable_ds_ckpt)


@dataclass(frozen=True)
class LoggingConfig:
    """Logging."""

    logging_steps: int = flag(1, "Log every N optimizer steps (PPO: rollout steps).", at_least=1)
    eval_steps: int = flag(-1, "Evaluate every N steps; -1 once an epoch.", at_least=-1)
    use_wandb: str | None = flag(
        None, "Log to Weights & Biases: True (logged in, or WANDB_API_KEY), or a file with the API key, or the key."
    )
    wandb_org: str | None = flag(None, "W&B entity.")
    wandb_group: str | None = flag(None, "W&B group.")
    wandb_project: str = flag("openrlhf", "W&B project.")
    wandb_run_name: str | None = flag(None, "Name of the run; default is the command and the time.")
    use_tensorboard: str | None = flag(None, "Folder for TensorBoard; used when W&B is off.")
    run_path: str | None = flag(None, "Folder of metrics, samples, report and log; default is <save_path>_run.")
    show_samples: bool = flag(False, "With --dry_run: read the data too and show three samples; a run always does.")
    profile_steps: str | None = flag(None, "Write a trace of these steps to the run folder, as in 3-5.")

    def problems(self) -> list[str]:
        found = []
        if not self.eval_steps:
            found.append("--eval_steps 0 is not a cadence: use -1 for once an epoch, or a positive number")
        if self.use_wandb and self.use_wandb.lower() in NOT_LOGGED:
            found.append(
                f"--use_wandb {self.use_wandb} is no API key: leave the flag out to log without Weights & Biases"
            )
        if self.profile_steps and not profiled_steps(self.profile_steps):
            found.append(
                f"--profile_steps {self.profile_steps} is not a range of steps, counted from 1: write for example 3-5"
            )
        return found

    def notices(self) -> list[str]:
        """Return what to tell about a key that others can read."""
        if not literal_key(self.use_wandb):
            return []
        return [
            "--use_wandb holds the key itself, which everyone on this machine sees in the list of processes: put it "
            "into WANDB_API_KEY and write --use_wandb True, or name a file that holds it"
        ]


def run_folder(save_path: str, run_path: str | None) -> str:
    """Return the run folder: ``--run_path``, or ``<save_path>_run`` beside the exported model."""
    return run_path or f"{save_path.rstrip('/')}_run"


def common_problems(config: Any) -> list[str]:
    """Return what is wrong across the groups that every training command has."""
    return [
        *missing_model(config.model.pretrain),
        *config.deepspeed.dtype_problems(config.model.bf16),
        *config.lora.stage_problems(config.deepspeed.zero_stage),
    ]
