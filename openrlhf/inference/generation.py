"""Answering prompts: with transformers on any number of ranks, or with vLLM in one process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from openrlhf import device
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.datasets.blending import load_mixture, recognised, required_keys
from openrlhf.datasets.prompts import Prompt, PromptDataset
from openrlhf.errors import DataError, UsageError
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.models.suitability import check_language_model, context_length
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.rollout.hf_engine import HFEngine
from openrlhf.rollout.types import Rollout, SamplingParams
from openrlhf.rollout.vllm_engine import VLLMEngine
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.signals import PATIENCE_S

Answers = list[list[Any]]
"""Of each answer to a prompt its text, its number of tokens, and whether it came to its end."""


class Generation:
    """The task of answering prompts; subclasses bring what generates.

    An answer depends on the prompt, its number, ``--seed`` and ``--iter``, whatever the number of ranks.

    Raises:
        DataError: the model folder or the prompts cannot be used.
    """

    def __init__(self, config: BatchInferenceConfig):
        self.config = config
        model, answers = config.model, config.answers
        check_language_model(model.pretrain, trust_remote_code=model.trust_remote_code)
        self.tokenizer = load_tokenizer(
            model.pretrain,
            use_fast=not model.disable_fast_tokenizer,
            trust_remote_code=model.trust_remote_code,
            chat_template=config.data.tokenizer_chat_template,
        )
        self.rows = read_prompts(config, self.tokenizer)
        self.longest = _longest(config, self.rows)
        self.sampling = SamplingParams(
            max_new_tokens=answers.max_new_tokens,
            temperature=0.0 if answers.greedy_sampling else answers.temperature,
            top_p=answers.top_p,
            repetition_penalty=answers.repetition_penalty,
            n=answers.best_of_n,
            seed=config.ranks.seed,
            step=config.data.iter or 0,
        )

    def lines(self, results: Sequence[Answers]) -> list[dict]:
        """Return one line an answer: first answers to all prompts, then second ones, and so on."""
        return [
            {"input": prompt.text, "output": answers[number][0]}
            for number in range(self.sampling.n)
            for prompt, answers in zip(self.rows, results, strict=True)
        ]

    def summary(self, results: Sequence[Answers]) -> str:
        """Return how long the answers are."""
        each = [answer for answers in results for answer in answers]
        tokens, cut = sum(answer[1] for answer in each), sum(not answer[2] for answer in each)
        return (
            f"{len(each):,} answers to {len(results):,} prompts, {tokens / len(each):.1f} tokens on average, "
            f"{cut / len(each):.1%} cut at their most tokens (--max_new_tokens {self.sampling.max_new_tokens})"
        )

    def _answers(self, rollouts: Sequence[Rollout]) -> list[Answers]:
        """Return the answers of each prompt of ``rollouts``."""
        texts = [self._answer(rollout) for rollout in rollouts]
        return [texts[start : start + self.sampling.n] for start in range(0, len(texts), self.sampling.n)]

    def _answer(self, rollout: Rollout) -> list[Any]:
        ids = list(rollout.response_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [text, len(ids), rollout.finish_reason == "stop"]


class RankGeneration(Generation):
    """Answering with transformers, on all ranks of a strategy.

    Ranks take turns in blocks of prompts that are one forward pass, so that what shares a pass is the same on any
    number of them.
    """

    def load(self, strategy: DeepSpeedStrategy) -> None:
        """Load the policy, in shards under ZeRO-3."""
        config, self._comm = self.config, strategy.comm
        model = load_causal_lm(
            config.model.pretrain, config.model.loading, context=partial(strategy.loading_context, train=False)
        )
        prepared = strategy.prepare_eval(Actor(model))
        actor = prepared if isinstance(prepared, Actor) else prepared.module
        self._engine = HFEngine(
            actor, self.tokenizer, config.ranks.micro_batch_size, max_len=self.longest, comm=self._comm
        )

    def work(self, rows: Sequence[Prompt]) -> list[Answers]:
        """Return the answers to each prompt."""
        size = max(1, self.config.ranks.micro_batch_size // self.sampling.n)
        blocks = [list(rows[start : start + size]) for start in range(0, len(rows), size)]
        mine = {}
        for turn in range(0, len(blocks), self._comm.world_size):
            number = turn + self._comm.rank
            block = blocks[number] if number < len(blocks) else []
            mine[number] = self._answers(self._engine.generate(block, self.sampling))
        self._comm.barrier("the answers of a window", PATIENCE_S)
        everyones = {number: found for part in self._comm.all_gather_object(mine) for number, found in part.items()}
        return [answers for number in range(len(blocks)) for answers in everyones[number]]


class VLLMGeneration(Generation):
    """Answering with vLLM in this process, which keeps its memory until :meth:`close`."""

    _engine: VLLMEngine | None = None

    def load(self) -> None:
        """Start vLLM."""
        model, ranks = self.config.model, self.config.ranks
        self._engine = VLLMEngine(
            model.pretrain,
            dtype="bfloat16" if model.bf16 else "float32",
            seed=ranks.seed,
            max_model_len=self.longest,
            max_num_seqs=ranks.max_num_seqs,
            enable_prefix_caching=ranks.enable_prefix_caching,
            tensor_parallel_size=ranks.tp_size or device.visible_devices(),
            trust_remote_code=model.trust_remote_code,
        )

    def work(self, rows: Sequence[Prompt]) -> list[Answers]:
        """Return the answers to each prompt."""
        return self._answers(self._engine.generate(list(rows), self.sampling))

    def close(self) -> None:
        """Stop vLLM, where it was started."""
        if self._engine is not None:
            self._engine.close()


def read_prompts(config: BatchInferenceConfig, tokenizer: Any) -> PromptDataset:
    """Return the prompts of ``--dataset``, or the slice of them that ``--iter`` names.

    Raises:
        UsageError: the data ends before that slice.
        DataError: a source or a row cannot be used.
    """
    data, flag = config.data.of_prompts, f"--dataset {config.data.dataset}"
    data = recognised(data, PromptDataset.FORMATS, data.dataset, data.dataset_split)
    rows = load_mixture(
        data.dataset,
        data.dataset_probs,
        split=data.dataset_split,
        max_samples=int(data.max_samples),
        seed=config.ranks.seed,
        stopping="first_exhausted",
        required=required_keys(data),
    )
    if data.iter is not None:
        first = data.iter * data.rollout_batch_size
        if first >= len(rows):
            raise UsageError(
                f"--iter {data.iter}: with --rollout_batch_size {data.rollout_batch_size} this slice begins at row "
                f"{first:,}, but {flag} has {len(rows):,} rows; slices are counted from 0"
            )
        rows = rows.select(range(first, min(first + data.rollout_batch_size, len(rows))))
    return PromptDataset(rows, tokenizer, data, data.prompt_max_len, name=flag, end=config.answers.prompt_end)


def _longest(config: BatchInferenceConfig, prompts: PromptDataset) -> int:
    """Return the most tokens of a prompt and its answer. Raises DataError when the model has no room for an answer."""
    model = config.model
    prompt = max(len(each.token_ids) for each in prompts)
    limit = context_length(model.pretrain, trust_remote_code=model.trust_remote_code)
    if limit is not None and prompt >= limit:
        raise DataError(
            f"--pretrain {model.pretrain}: a prompt has {prompt} tokens and the model reads {limit} in all "
            f"(max_position_embeddings in config.json): lower --prompt_max_len below {limit}"
        )
    wanted = prompt + config.answers.max_new_tokens
    return wanted if limit is None else min(wanted, limit)
