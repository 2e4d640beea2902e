"""A reward model that reads texts: what ``serve_rm`` serves."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from openrlhf.config.groups import LoRAConfig, ModelConfig
from openrlhf.config.serve import ServeConfig
from openrlhf.device import current_device
from openrlhf.models.loading import load_value_model
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.models.value_head import ValueModel

BATCH = 16


class RewardScorer:
    """A reward model with its tokenizer. Not for several threads at a time.

    Raises:
        DataError: the folder cannot be loaded, or has no trained head.
    """

    def __init__(self, config: ServeConfig):
        path, flag = config.reward_pretrain, "--reward_pretrain"
        self.tokenizer = load_tokenizer(
            path,
            use_fast=not config.disable_fast_tokenizer,
            trust_remote_code=config.trust_remote_code,
            flag=flag,
        )
        model = load_value_model(
            path,
            ModelConfig(pretrain=path, bf16=config.bf16, trust_remote_code=config.trust_remote_code),
            lora=LoRAConfig(load_in_4bit=config.load_in_4bit),
            init_value_head=False,
            value_head_prefix=config.value_head_prefix,
            normalize_reward=config.normalize_reward,
            pad_token_id=self.tokenizer.pad_token_id,
            flag=flag,
        )
        self.device = current_device()
        self.model = ValueModel(model, read="last").eval().to(self.device)
        self._max_len = config.max_len
        self._batch = config.batch_size or BATCH
        ends = sorted({self.tokenizer.eos_token, self.tokenizer.pad_token}, key=len, reverse=True)
        around = "|".join(map(re.escape, ends))
        self._padding = re.compile(rf"^(?:{around})+|(?:{around})+$")

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Return the reward of each text, whatever the others are.

        End and padding tokens around a text are taken off, one end token is put behind it, and what is longer than
        ``--max_len`` loses the tokens before that.
        """
        rows = [self._tokens(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        rewards = [0.0] * len(rows)
        for first in range(0, len(order), self._batch):
            part = order[first : first + self._batch]
            for index, reward in zip(part, self._forward([rows[index] for index in part]), strict=True):
                rewards[index] = reward
        return rewards

    def _tokens(self, text: str) -> list[int]:
        """Return the token ids that the model reads."""
        bare = self._padding.sub("", text)
        tokens = self.tokenizer(bare, add_special_tokens=False).input_ids
        return [*tokens[: self._max_len - 1], self.tokenizer.eos_token_id]

    def _forward(self, rows: Sequence[list[int]]) -> list[float]:
        lengths = torch.tensor([len(row) for row in rows])
        padded = [row + [self.tokenizer.pad_token_id] * (int(lengths.max()) - len(row)) for row in rows]
        sequences = torch.tensor(padded, device=self.device)
        mask = (torch.arange(sequences.shape[1]) < lengths[:, None]).to(self.device)
        return self.model.reward(sequences, mask).float().tolist()
