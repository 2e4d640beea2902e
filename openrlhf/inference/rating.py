"""Rating answers with a reward model, on any number of ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from openrlhf.config.inference import CONDITIONAL_SFT, BatchInferenceConfig
from openrlhf.datasets.answers import Answer, AnswerDataset
from openrlhf.datasets.batch import pad_rows
from openrlhf.datasets.blending import load_mixture, recognised, required_keys
from openrlhf.errors import NumericError
from openrlhf.inference.processors import normalized, processed
from openrlhf.models.loading import load_value_model
from openrlhf.models.suitability import check_reward_model
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.models.value_head import ValueModel
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.signals import PATIENCE_S


class Rating:
    """The task of rating answers. Rewards are normalised where the model's config.json has ``mean`` and ``std``.

    Answers of like length share a forward pass; ranks take turns in them, so that what shares one is the same on any
    number of ranks.

    Raises:
        DataError: the model folder or the answers cannot be used.
    """

    def __init__(self, config: BatchInferenceConfig):
        self.config = config
        model = config.model
        check_reward_model(
            model.pretrain,
            trust_remote_code=model.trust_remote_code,
            value_head_prefix=model.value_head_prefix,
            normalize_reward=False,
            flag="--pretrain",
        )
        self.tokenizer = load_tokenizer(
            model.pretrain,
            use_fast=not model.disable_fast_tokenizer,
            trust_remote_code=model.trust_remote_code,
            chat_template=config.data.tokenizer_chat_template,
        )
        self.rows = read_answers(config, self.tokenizer)

    def load(self, strategy: DeepSpeedStrategy) -> None:
        """Load the reward model, in shards under ZeRO-3."""
        model, self._comm, self._device = self.config.model, strategy.comm, strategy.device
        classifier = load_value_model(
            model.pretrain,
            model.loading,
            gather=strategy.gather,
            context=partial(strategy.loading_context, train=False),
            init_value_head=False,
            value_head_prefix=model.value_head_prefix,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        settings = classifier.config
        settings.normalize_reward = hasattr(settings, "mean") and hasattr(settings, "std")
        self._model = strategy.prepare_eval(ValueModel(classifier, read="last"))

    @torch.no_grad()
    def work(self, rows: Sequence[Answer]) -> list[float]:
        """Return the reward of each answer. Raises NumericError when one is not finite."""
        size, ranks = self.config.ranks.micro_batch_size, self._comm.world_size
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].token_ids))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        rewards: dict[int, float] = {}
        for turn in range(0, len(batches), ranks):
            number = turn + self._comm.rank
            # Ranks that share the weights must all call the model: the last turn may leave one without a batch.
            batch = batches[min(number, len(batches) - 1)]
            found = self._rewards([rows[index] for index in batch])
            rewards |= dict(zip(batch, found, strict=True))
        self._comm.barrier("the rewards of a window", PATIENCE_S)
        everyones = {index: reward for part in self._comm.all_gather_object(rewards) for index, reward in part.items()}
        wrong = [index for index in range(len(rows)) if not math.isfinite(everyones[index])]
        if wrong:
            uids = ", ".join(rows[index].uid for index in wrong[:5])
            raise NumericError(f"--pretrain {self.config.model.pretrain}: no finite reward for row {uids} of the data")
        return [everyones[index] for index in range(len(rows))]

    def lines(self, results: Sequence[float]) -> Sequence[dict]:
        """Return every answer with its reward, or what ``--post_processor`` makes of them."""
        rated = [
            {"input": row.prompt, "output": row.answer, "reward": reward}
            for row, reward in zip(self.rows, results, strict=True)
        ]
        config = self.config
        options = {"normalize": config.normalize_reward, "template": config.reward_template}
        return processed(config.processor, rated, **options)

    def summary(self, results: Sequence[float]) -> str:
        """Return mean and standard deviation of the rewards; for conditional SFT also what can be asked for."""
        mean, spread = statistics.fmean(results), statistics.stdev(results) if len(results) > 1 else 0.0
        said = f"{len(results):,} rewards: mean {mean:.4f}, standard deviation {spread:.4f}"
        if self.config.processor != CONDITIONAL_SFT:
            return said
        rated = [{"reward": reward} for reward in results]
        told = [row["reward"] for row in (normalized(rated) if self.config.normalize_reward else rated)]
        return f"{said}; told as {min(told):.2f} to {max(told):.2f}, so ask for one of these (--csft_prompt)"

    def _rewards(self, rows: Sequence[Answer]) -> list[float]:
        sequences, mask = pad_rows([list(row.token_ids) for row in rows], self.tokenizer.pad_token_id)
        return self._model(sequences.to(self._device), mask.to(self._device), read="last").float().tolist()


def read_answers(config: BatchInferenceConfig, tokenizer) -> AnswerDataset:
    """Return the answers of ``--dataset``. Raises DataError when a source or a row cannot be used."""
    data = replace(config.data, output_key=config.data.output_key or None)
    data = recognised(data, AnswerDataset.FORMATS, data.dataset, data.dataset_split)
    rows = load_mixture(
        data.dataset,
        data.dataset_probs,
        split=data.dataset_split,
        max_samples=int(data.max_samples),
        seed=config.ranks.seed,
        stopping="first_exhausted",
        required=required_keys(data),
    )
    return AnswerDataset(rows, tokenizer, data, f"--dataset {data.dataset}")
