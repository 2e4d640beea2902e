"""The flags of what PPO samples: prompts, rollouts, and evaluation during training."""

from __future__ import annotations

from dataclasses import dataclass

from openrlhf.config.checks import file_problems, source_problems, template_problems
from openrlhf.config.flags import flag
from openrlhf.config.groups import EVERYTHING, SPELLED, SPELLED_HELP, TOO_LONG, TOO_LONG_HELP

NO_BEST = "none"


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
