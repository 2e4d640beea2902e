"""The flags of ``interactive_chat``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from openrlhf.config.checks import file_problems, template_problems
from openrlhf.config.flags import flag
from openrlhf.config.groups import LoRAConfig, ModelConfig

SETTABLE = ("temperature", "top_p", "repetition_penalty", "greedy_sampling", "max_len", "seed")
"""Flags that can be changed while one talks."""


@dataclass(frozen=True)
class ChatConfig:
    """Chat.

    Talk to a model: lines from standard input, answers as they come. /help lists what else a line can say.
    """

    run_prefix: ClassVar[str] = "chat"
    pretrain: str | None = flag(None, "Model to talk to: a local folder or a hub name.")
    bf16: bool = flag(False, "Compute with bf16 weights; without it in fp32.")
    flash_attn: bool = flag(False, "Use FlashAttention.")
    disable_fast_tokenizer: bool = flag(False, "Load the slow tokenizer.")
    load_in_4bit: bool = flag(False, "Load the weights as 4-bit NF4.")
    trust_remote_code: bool = flag(False, "Run model code that comes with the model folder.")
    use_ms: bool = flag(False, "Take a model that is not on this machine from ModelScope.")
    max_len: int = flag(4096, "Most tokens of the conversation, the answer among them.", at_least=2)
    greedy_sampling: bool = flag(False, "Take the likeliest token at every step.")
    top_p: float = flag(
        0.9, "Sample from the smallest set of tokens with this share of probability.", above=0, at_most=1
    )
    temperature: float = flag(0.2, "Sampling temperature; 0 is greedy.", at_least=0)
    repetition_penalty: float = flag(1.2, "Divides the positive scores of tokens that were there before.", above=0)
    seed: int = flag(42, "Seed of sampling.", at_least=0)
    input_template: str | None = flag("User: {}\nAssistant: ", "Template with one {} for a line; '' means none.")
    apply_chat_template: bool = flag(False, "Use the chat template of the tokenizer.")
    tokenizer_chat_template: str | None = flag(None, "Jinja chat template to use instead of the tokenizer's.")
    ta_prompt: str | None = flag(None, "File whose text begins every conversation.")
    enable_csft: bool = flag(False, "Put --csft_prompt behind every prompt.")
    csft_prompt: str = flag("<rm_score>: 5.00", "What a prompt for a conditionally trained model ends with.")

    @property
    def loading(self) -> ModelConfig:
        """What loading the model asks for."""
        return ModelConfig(pretrain=self.pretrain, bf16=self.bf16, trust_remote_code=self.trust_remote_code)

    @property
    def weights(self) -> LoRAConfig:
        """How the weights are held."""
        return LoRAConfig(load_in_4bit=self.load_in_4bit)

    @property
    def prompt_end(self) -> str:
        """What every prompt gets at its end."""
        return f"{self.csft_prompt.strip()} " if self.enable_csft else ""

    def problems(self) -> list[str]:
        found = [] if self.pretrain else ["--pretrain is missing: name the folder or hub name of the model"]
        found += [] if self.apply_chat_template else template_problems(self.input_template)
        if self.ta_prompt and self.apply_chat_template:
            found.append("--ta_prompt begins a text, and --apply_chat_template makes messages: leave one of them out")
        return found + file_problems("ta_prompt", self.ta_prompt)
