"""The flags of ``batch_inference``."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from openrlhf.config.checks import source_problems, template_problems
from openrlhf.config.flags import flag
from openrlhf.config.groups import (
    EVERYTHING,
    SPELLED,
    SPELLED_HELP,
    TOO_LONG,
    TOO_LONG_HELP,
    DeepSpeedConfig,
    ModelConfig,
)

GENERATE, GENERATE_VLLM, RATE = "generate", "generate_vllm", "rm"
TASKS = (GENERATE_VLLM, GENERATE, RATE)
REJECTION_SAMPLING, ITERATIVE_DPO, CONDITIONAL_SFT = "rs", "iter_dpo", "csft"
PROCESSORS = (REJECTION_SAMPLING, ITERATIVE_DPO, CONDITIONAL_SFT)
NO_PROCESSOR = "null"
REWARD_TEMPLATE = "{input} <rm_score>: {reward} "


@dataclass(frozen=True)
class InferenceModelConfig:
    """Model."""

    pretrain: str | None = flag(None, "Policy, or for --eval_task rm the reward model: a folder or a hub name.")
    value_head_prefix: str = flag("value_head", "Name of the reward model's head; the one in config.json wins.")
    bf16: bool = flag(False, "Compute with bf16 weights; without it in fp32.")
    flash_attn: bool = flag(False, "Use FlashAttention.")
    disable_fast_tokenizer: bool = flag(False, "Load the slow tokenizer.")
    trust_remote_code: bool = flag(False, "Run model code that comes with the model folder.")
    use_ms: bool = flag(False, "Take models and data sets that are not on this machine from ModelScope.")

    @property
    def loading(self) -> ModelConfig:
        """What loading a model asks for."""
        return ModelConfig(pretrain=self.pretrain, bf16=self.bf16, trust_remote_code=self.trust_remote_code)


@dataclass(frozen=True)
class RanksConfig:
    """Ranks and batches."""

    zero_stage: int = flag(0, "ZeRO stage; 3 cuts the weights over the ranks.", choices=(0, 1, 2, 3))
    local_rank: int = flag(-1, "Set by the DeepSpeed launcher; -1 reads LOCAL_RANK.")
    collective_timeout: int = flag(600, "Seconds that a rank waits for the others before it gives up.", at_least=1)
    micro_batch_size: int = flag(16, "Most samples per rank that are generated, or rated, together.", at_least=1)
    tp_size: int | None = flag(None, "Devices that share one model in vLLM; default is all of them.", at_least=1)
    max_num_seqs: int = flag(256, "Most sequences that vLLM works on at a time.", at_least=1)
    enable_prefix_caching: bool = flag(False, "Share vLLM's cache of equal prompt beginnings.")
    seed: int = flag(1234, "Seed of mixing and sampling.", at_least=0)

    @property
    def deepspeed(self) -> DeepSpeedConfig:
        """What the strategy asks for."""
        return DeepSpeedConfig(
            zero_stage=self.zero_stage, local_rank=self.local_rank, collective_timeout=self.collective_timeout
        )


@dataclass(frozen=True)
class InferenceDataConfig:
    """Data."""

    dataset: str | None = flag(None, "Data sets, separated by commas: hub names, folders, or files.")
    dataset_probs: str = flag("1.0", "Mixing probability of each data set, separated by commas.")
    dataset_split: str = flag("train", "Split to read.")
    max_samples: int = flag(EVERYTHING, "Most rows used of each data set, and of the mixture.", at_least=1)
    input_key: str = flag("input", "Column of the prompt or the conversation.")
    output_key: str = flag("output", "Column of the answer to rate; '' means the last message of --input_key.")
    apply_chat_template: bool = flag(False, "Use the chat template of the tokenizer.")
    tokenizer_chat_template: str | None = flag(None, "Jinja chat template to use instead of the tokenizer's.")
    input_template: str | None = flag(None, "Template with one {} for the prompt; '' means none.")
    prompt_max_len: int = flag(1024, "Most tokens of a prompt.", at_least=1)
    max_len: int = flag(2048, "Most tokens of a prompt and its answer that are rated.", at_least=2)
    too_long: str = flag("cut", TOO_LONG_HELP, choices=TOO_LONG)
    special_tokens_in_text: str | None = flag(None, SPELLED_HELP, choices=SPELLED)
    iter: int | None = flag(None, "Take the slice of this number, from 0, of --rollout_batch_size rows.", at_least=0)
    rollout_batch_size: int = flag(2048, "Rows of a slice.", at_least=1)

    @property
    def of_prompts(self) -> InferenceDataConfig:
        """The same without a column of answers."""
        return replace(self, output_key="")

    def problems(self) -> list[str]:
        if self.dataset is None:
            return ["--dataset is missing: name a folder, a .jsonl file, or a hub data set"]
        found = source_problems("dataset", self.dataset, self.dataset_probs)
        return found + ([] if self.apply_chat_template else template_problems(self.input_template))


@dataclass(frozen=True)
class AnswerConfig:
    """Generation."""

    best_of_n: int = flag(1, "Answers to each prompt.", at_least=1)
    max_new_tokens: int = flag(1024, "Most tokens of an answer.", at_least=1)
    greedy_sampling: bool = flag(False, "Take the likeliest token at every step.")
    top_p: float = flag(
        1.0, "Sample from the smallest set of tokens with this share of probability.", above=0, at_most=1
    )
    temperature: float = flag(1.0, "Sampling temperature; 0 is greedy.", at_least=0)
    repetition_penalty: float = flag(1.0, "Divides the positive scores of tokens that were there before.", above=0)
    enable_csft: bool = flag(False, "Put --csft_prompt behind every prompt.")
    csft_prompt: str = flag("<rm_score>: 5.00", "What a prompt for a conditionally trained model ends with.")

    @property
    def prompt_end(self) -> str:
        """What every prompt gets at its end."""
        return f"{self.csft_prompt.strip()} " if self.enable_csft else ""

    def notices(self) -> list[str]:
        if self.best_of_n > 1 and (self.greedy_sampling or self.temperature == 0):
            return [f"--best_of_n {self.best_of_n}: greedy answers to one prompt are all the same"]
        return []


@dataclass(frozen=True)
class BatchInferenceConfig:
    """Batch inference.

    Answer every prompt of a data set, or rate answers with a reward model, and write JSON lines.
    """

    run_prefix: ClassVar[str] = "batch"
    eval_task: str | None = flag(None, "generate_vllm, generate (transformers, any number of ranks), or rm.")
    output_path: str | None = flag(None, "File of JSON lines to write; it appears when it is whole.")
    window_size: int = flag(1024, "Rows that are worked on between two writes to <output_path>.partial.", at_least=1)
    post_processor: str | None = flag(
        None, "What becomes of rated answers: rs keeps the best, iter_dpo best and worst, csft tells the reward."
    )
    normalize_reward: bool = flag(False, "csft: tell rewards as standard deviations from their mean over the file.")
    reward_template: str | None = flag(None, f"csft: template of the prompt; default is {REWARD_TEMPLATE!r}.")
    model: InferenceModelConfig = field(default_factory=InferenceModelConfig)
    data: InferenceDataConfig = field(default_factory=InferenceDataConfig)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    @property
    def processor(self) -> str | None:
        """The post-processor, or None."""
        return None if self.post_processor == NO_PROCESSOR else self.post_processor

    def problems(self) -> list[str]:
        found = []
        if self.eval_task not in TASKS:
            said = "is missing" if self.eval_task is None else f"{self.eval_task} is not known"
            found.append(f"--eval_task {said}: write one of {', '.join(TASKS)}")
        if not self.model.pretrain:
            found.append("--pretrain is missing: name the folder or hub name of the model")
        if not self.output_path:
            found.append("--output_path is missing: name the file to write, such as answers.jsonl")
        return found + self._processor_problems()

    def notices(self) -> list[str]:
        """Return a line for each flag of the tasks that this one is not."""
        task = "rm" if self.eval_task == RATE else "generate"
        idle = [*(item.name for item in fields(AnswerConfig)), "prompt_max_len", "iter"]
        if self.eval_task != RATE:
            idle = ["max_len", "value_head_prefix"]
        groups = (self.answers, self.data, self.model)
        found = [
            f"--{item.name} has no effect here: --eval_task {task} does not read it"
            for group in groups
            for item in fields(group)
            if item.name in idle and getattr(group, item.name) != item.default
        ]
        if self.normalize_reward and self.processor != CONDITIONAL_SFT:
            found.append("--normalize_reward has no effect here: it needs --post_processor csft")
        return found

    def _processor_problems(self) -> list[str]:
        if self.processor is None:
            return []
        if self.processor not in PROCESSORS:
            known = ", ".join((*PROCESSORS, NO_PROCESSOR))
            return [f"--post_processor {self.processor} is not known: write one of {known}"]
        found = []
        if self.eval_task in (GENERATE, GENERATE_VLLM):
            found.append(f"--post_processor {self.processor} needs rewards: it goes with --eval_task rm")
        template = self.reward_template
        missing = [name for name in ("{input}", "{reward}") if template is not None and name not in template]
        if missing and self.processor == CONDITIONAL_SFT:
            found.append(f"--reward_template {template!r} has no {' and no '.join(missing)}: it needs both")
        return found
