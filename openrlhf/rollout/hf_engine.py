"""Sampling with the policy itself through transformers' ``generate``: the engine that works everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from openrlhf.models.actor import Actor
from openrlhf.models.tokenizer import end_ids
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams, sample_seed
from openrlhf.strategy import signals
from openrlhf.strategy.comm import Comm, SoloComm

LOWEST = torch.finfo(torch.float32).min


class HFEngine:
    """A :class:`~openrlhf.rollout.engine.RolloutEngine` around an :class:`~openrlhf.models.actor.Actor`.

    Every sample has a random generator of its own, so it does not depend on what shares its batch.

    Args:
        actor: the policy, or a function that returns it.
        tokenizer: gives the id of padding, and of the end; the actor's generation settings may name more ends.
        micro_batch_size: samples that are generated together.
        max_len: most tokens of prompt and answer; None leaves the length to the sampling parameters.
        comm: the ranks that share the weights; they call :meth:`generate` together, each with prompts of its own.
        policy_version: see below.

    Attributes:
        policy_version: number of weight updates the policy has seen; written into the rollouts.
    """

    def __init__(
        self,
        actor: Actor | Callable[[], Actor],
        tokenizer,
        micro_batch_size: int = 8,
        policy_version: int = 0,
        max_len: int | None = None,
        comm: Comm | None = None,
    ):
        self._comm = comm or SoloComm()
        self._actor = (lambda: actor) if isinstance(actor, nn.Module) else actor
        self._tokenizer = tokenizer
        self.pad_id: int = tokenizer.pad_token_id
        self.micro_batch_size = max(1, micro_batch_size)
        self.max_len = max_len
        self.policy_version = policy_version

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return ``sampling.n`` rollouts a prompt, next to each other, in the order of ``prompts``."""
        wanted = [(prompt, index) for prompt in prompts for index in range(sampling.n)]
        starts = range(0, len(wanted), self.micro_batch_size)
        idle = self._batches_of_others(len(starts))
        rollouts: list[Rollout] = []
        for start in starts:
            rollouts += self._generate_batch(wanted[start : start + self.micro_batch_size], sampling)
        for _ in range(idle):
            self._generate_batch([(Prompt("", "", (self.pad_id,)), 0)], replace(sampling, max_new_tokens=1))
        return rollouts

    def stream(self, prompt: Prompt, sampling: SamplingParams, show: Callable[[int], None]) -> Rollout:
        """Return one rollout, after ``show`` was called with each of its tokens as it was chosen. Not for ranks that
        share the weights.
        """
        return self._generate_batch([(prompt, 0)], sampling, _Streamer(show))[0]

    def sleep(self) -> None:
        """Do nothing: the engine owns no memory of its own."""

    def wake_up(self, part: str) -> None:
        """Do nothing, as :meth:`sleep`."""

    @property
    def _sharded(self) -> bool:
        """Whether a forward of one rank needs all others."""
        return any(hasattr(parameter, "ds_id") for parameter in self._actor().parameters())

    @property
    def _ends(self) -> list[int]:
        """The tokens that end an answer."""
        return end_ids(self._tokenizer, self._actor().model.generation_config)

    def _batches_of_others(self, own: int) -> int:
        """Return how many batches of nobody this rank must generate after its ``own`` because others need it."""
        return round(self._comm.all_reduce(float(own), op="max")) - own if self._sharded else 0

    def _generate_batch(
        self, wanted: Sequence[tuple[Prompt, int]], sampling: SamplingParams, streamer: _Streamer | None = None
    ) -> list[Rollout]:
        from transformers import GenerationConfig, LogitsProcessorList

        actor = self._actor()
        rooms = [self._room(prompt, sampling) for prompt, _ in wanted]
        seeds = [sample_seed(sampling.seed, sampling.step, prompt.uid, index) for prompt, index in wanted]
        input_ids, attention_mask = pad_left([prompt.token_ids for prompt, _ in wanted], self.pad_id, actor.device)
        sampler = RowSampler(seeds, sampling.temperature, sampling.top_p, actor.device)
        sharded = self._sharded
        # Ranks that share the weights could only leave together.
        processors = [] if sharded else [_leave_if_asked]
        if sampling.repetition_penalty != 1.0:
            processors.append(RepetitionPenalty(sampling.repetition_penalty, attention_mask))
        processors.append(sampler)
        output = actor.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=max(rooms),
                eos_token_id=self._ends,
                pad_token_id=self.pad_id,
            ),
            logits_processor=LogitsProcessorList(processors),
            synced_gpus=sharded,
            streamer=streamer,
        )
        answers = output[:, input_ids.shape[1] :].tolist()
        log_probs = torch.stack(sampler.log_probs, dim=1).tolist()
        return [
            self._rollout(prompt, answer[:room], row, seed)
            for (prompt, _), answer, room, row, seed in zip(wanted, answers, rooms, log_probs, seeds, strict=True)
        ]

    def _room(self, prompt: Prompt, sampling: SamplingParams) -> int:
        """Return the most tokens of an answer to ``prompt``."""
        if self.max_len is None:
            return sampling.max_new_tokens
        return min(sampling.max_new_tokens, self.max_len - len(prompt.token_ids))

    def _rollout(self, prompt: Prompt, answer: list[int], log_probs: list[float], seed: int) -> Rollout:
        """Cut ``answer`` after its first end of sequence and make a rollout of it."""
        ends = self._ends
        until_end = next((count for count, token in enumerate(answer, start=1) if token in ends), None)
        length = until_end or len(answer)
        start = len(prompt.token_ids)
        return Rollout(
            prompt=prompt,
            token_ids=(*prompt.token_ids, *answer[:length]),
            action_spans=((start, start + length),),
            log_probs=tuple(log_probs[:length]),
            finish_reason="stop" if until_end else "length",
            policy_version=self.policy_version,
            seed=seed,
        )


class _Streamer:
    """What transformers calls with the tokens of the prompt first, and then with every new one."""

    def __init__(self, show: Callable[[int], None]):
        self._show = show
        self._begun = False

    def put(self, ids: Tensor) -> None:
        """Take the prompt, or the next token ``(1,)``."""
        if self._begun:
            self._show(int(ids))
        self._begun = True

    def end(self) -> None:
        """Do nothing: the answer is returned."""


def _leave_if_asked(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Raise ``Preempted`` between two tokens when the run is asked to stop and may drop the rollout."""
    signals.check()
    return scores


class RepetitionPenalty:
    """A logits processor that makes tokens of the prompt and of the answer so far less likely, as vLLM does.

    Args:
        penalty: divides positive scores and multiplies negative ones.
        attention_mask: ``(rows, S)`` of the prompts, 0 on padding, which is no token that was said.
    """

    def __init__(self, penalty: float, attention_mask: Tensor):
        self._penalty = penalty
        self._padding = attention_mask == 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` (rows, V) with those of ``input_ids`` (rows, S + answer) penalised."""
        said = input_ids.clone()
        prompts = said[:, : self._padding.shape[1]]
        prompts[self._padding] = input_ids[:, -1:].expand_as(prompts)[self._padding]
        found = scores.gather(1, said)
        return scores.scatter(1, said, torch.where(found < 0, found * self._penalty, found / self._penalty))


class RowSampler:
    """A logits processor that makes greedy decoding sample, each row from a random generator of its own.

    The arg-max of log-probs plus Gumbel noise is a sample of the soft-max (Gumbel, 1954; arXiv:1411.0030).

    Attributes:
        log_probs: one ``(rows,)`` float32 tensor a step, of the chosen tokens at the sampling temperature (at 1 when
            decoding is greedy), before ``top_p`` cuts.
    """

    def __init__(self, seeds: Sequence[int], temperature: float, top_p: float, device: torch.device):
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        self.temperature = temperature
        self.top_p = top_p
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` (rows, V) such that the largest of each row is the sampled token."""
        log_probs = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        perturbed = log_probs
        if self.temperature > 0:
            perturbed = nucleus(log_probs, self.top_p) + self._gumbel(log_probs)
        chosen = perturbed.argmax(dim=-1, keepdim=True)
        self.log_probs.append(log_probs.gather(-1, chosen).squeeze(-1))
        return perturbed

    def _gumbel(self, like: Tensor) -> Tensor:
        """Return standard Gumbel noise, row ``i`` from generator ``i``."""
        noise = torch.empty_like(like)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return -noise.log()


def nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """Return ``log_probs`` (rows, V), the lowest number outside the smallest set of mass ``top_p``."""
    if top_p >= 1.0:
        return log_probs
    ordered, order = log_probs.sort(dim=-1, descending=True)
    before = ordered.exp().cumsum(dim=-1) - ordered.exp()
    outside = torch.zeros_like(log_probs, dtype=torch.bool).scatter(-1, order, before >= top_p)
    outside.scatter_(-1, order[:, :1], False)
    return log_probs.masked_fill(outside, LOWEST)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return ``(input_ids (B, S), attention_mask (B, S))`` int64 of ``rows`` padded on the left."""
    width = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        attention_mask[index, width - len(row) :] = 1
    return input_ids.to(device), attention_mask.to(device)
