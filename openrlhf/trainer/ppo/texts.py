"""PPO-ptx: texts that the policy goes on to learn as a language model, in the optimizer steps of its policy loss.

Every optimizer step reads ``--train_batch_size`` texts over all ranks. Which ones depends on the run's seed and on how
many steps came before, so a run that is resumed reads on where it was. Ouyang et al. 2022, section 3.4,
https://arxiv.org/abs/2203.02155.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openrlhf.config.groups import SFTDataConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.datasets.batch import TokenBatch
from openrlhf.datasets.blending import load_mixture, recognised, required_keys
from openrlhf.datasets.fingerprint import fingerprint
from openrlhf.datasets.sampler import StepSampler
from openrlhf.datasets.sft import SFTDataset
from openrlhf.errors import NumericError, UsageError
from openrlhf.ops.lm_loss import next_token_loss
from openrlhf.strategy.deepspeed import DeepSpeedStrategy, TrainEngine
from openrlhf.trainer.continuity import check_position
from openrlhf.trainer.inputs import TOKENS
from openrlhf.trainer.metrics import MetricSums

FLAG, STATE = "--pretrain_data", "texts.json"


def load_texts(config: PPOConfig, tokenizer: Any) -> SFTDataset:
    """Return the tokenised texts: every token of the column ``text``, or else of ``--input_key``, is trained.

    They are kept in the run folder, so only the first process that asks makes them. Raises DataError.
    """
    prompts, spec = config.prompts, config.prompts.pretrain_data
    own = {name: getattr(prompts, name) for name in ("max_samples", "too_long", "special_tokens_in_text")}
    unnamed = SFTDataConfig(pretrain_mode=True, max_len=config.rollout.max_model_len, **own)
    data = recognised(unnamed, SFTDataset.FORMATS, spec, prompts.pretrain_split, FLAG)
    if data == unnamed:
        data = replace(data, input_key=prompts.input_key)
    rows = load_mixture(
        spec,
        prompts.pretrain_data_probs,
        split=prompts.pretrain_split,
        max_samples=int(data.max_samples),
        seed=config.batch.seed,
        stopping="first_exhausted",
        flag=FLAG,
        required=required_keys(data),
    )
    run_path = config.logging.run_path
    cache = Path(run_path) / TOKENS / "texts.rows" if run_path else None
    return SFTDataset(rows, tokenizer, data, f"{FLAG} {spec}", cache)


def load_pretrain_texts(config: PPOConfig, strategy: DeepSpeedStrategy, tokenizer: Any) -> PretrainTexts | None:
    """Return the texts that the policy learns on this rank; None without ``--pretrain_data``."""
    if not config.prompts.pretrain_data:
        return None
    return PretrainTexts(config, strategy, load_texts(config, tokenizer))


def check_texts(config: PPOConfig, path: Path) -> None:
    """Raise UsageError when this run has texts and the one that wrote the checkpoint ``path`` had none, or so."""
    had, has = (path / STATE).is_file(), bool(config.prompts.pretrain_data)
    if had != has and not config.checkpoint.allow_config_change:
        before, now = ("with", "give the same texts") if had else ("without", "leave it out")
        raise UsageError(f"{FLAG}: {path} was written {before} texts: {now}, or add --allow_config_change")


class PretrainTexts:
    """The language-model loss beside the loss of the policy. All ranks of the policy call its methods together.

    Args:
        config: the run.
        strategy: of the policy.
        rows: :func:`load_texts`.
    """

    def __init__(self, config: PPOConfig, strategy: DeepSpeedStrategy, rows: SFTDataset):
        batch, budget = config.batch, config.batch.max_tokens_per_gpu
        self._strategy, self._rows, self._coef = strategy, rows, config.algorithm.ptx_coef
        self._allow_change = config.checkpoint.allow_config_change
        self._sampler = StepSampler(
            len(rows),
            batch.train_batch_size,
            batch.micro_train_batch_size,
            batch.seed,
            rank=strategy.data_parallel_rank,
            world_size=strategy.data_parallel_size,
            lengths=rows.lengths,
            max_tokens=budget and budget * strategy.ring.size,
        )
        # The ranks of a ring compute the same numbers.
        self._counts = strategy.ring.rank == 0
        self._steps = 0
        self._coming = self._from(0)
        self._read: list[list[int]] = []
        self._losses: list[Tensor] = []

    def learn(self, engine: TrainEngine) -> MetricSums:
        """Add the gradients of the next texts to those that ``engine`` holds; return the metrics of this rank.

        The loss is a mean over the tokens of these texts on all ranks, times ``--ptx_coef``.
        """
        self._read = next(self._coming)
        self._steps += 1
        batches = [self._rows.collate([self._rows[row] for row in rows]) for rows in self._read]
        mine = [float(batch.loss_mask.sum()) for batch in batches]
        filled = float(sum(map(bool, self._read)))
        counts = torch.tensor([sum(mine), filled], dtype=torch.float64, device=self._strategy.device) * self._counts
        tokens, micros = self._strategy.comm.all_reduce(counts).tolist()
        aux_weight = tokens / micros / self._strategy.ring.size
        sums, self._losses = MetricSums(), []
        for rows, batch in zip(self._read, batches, strict=True):
            loss, metrics = self._loss(engine, batch.to(self._strategy.device), aux_weight)
            engine.backward(loss * self._coef if rows else loss * 0.0, tokens)
            self._losses.append(loss.detach())
            sums.add(metrics, counted=self._counts and bool(rows))
        return sums

    def _loss(
        self, engine: Callable, batch: TokenBatch, aux_weight: float
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """Return the loss of a micro-batch, to be divided by the tokens of the step, and its metrics."""
        output = engine(batch.sequences, batch.attention_mask, where=batch.loss_mask)
        loss = next_token_loss(output.log_probs, batch.loss_mask)
        return loss + output.aux_loss * aux_weight, {"ptx_loss": (loss.detach(), batch.loss_mask.sum())}

    def look(self, error: NumericError) -> None:
        """Raise NumericError that names the texts whose loss is not finite, if it was them that made a step fail."""
        pairs = zip(self._read, self._losses, strict=True)
        spoilt = [row for rows, loss in pairs if not torch.isfinite(loss) for row in rows]
        found = sorted({row for rows in self._strategy.comm.all_gather_object(spoilt) for row in rows})
        if found:
            raise NumericError(f"{error}; the loss is not finite on rows {found} of {FLAG}", error.rows) from error

    def save(self, path: Path) -> None:
        """Write how many steps were read to the folder ``path``; one rank calls it."""
        (path / STATE).write_text(json.dumps({"steps": self._steps, **self._facts()}), encoding="utf-8")

    def load(self, path: Path) -> None:
        """Read on from what :meth:`save` wrote, or from the start. Raises UsageError when the texts are others."""
        file = path / STATE
        if not file.is_file():
            return
        state = json.loads(file.read_text(encoding="utf-8"))
        check_position(state, self._facts(), FLAG, self._allow_change)
        self._steps = int(state["steps"])
        self._coming = self._from(self._steps)

    def _facts(self) -> dict[str, Any]:
        return {
            "rows": len(self._rows),
            "data": fingerprint(self._rows),
            "steps_per_epoch": self._sampler.steps_per_epoch,
        }

    def _from(self, done: int) -> Iterator[list[list[int]]]:
        """Yield the micro-batches of every step after the first ``done``, pass after pass."""
        epoch, step = divmod(done, self._sampler.steps_per_epoch)
        while True:
            yield from self._sampler.epoch(epoch, start_step=step)
            epoch, step = epoch + 1, 0
