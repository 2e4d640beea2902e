"""Generation with vLLM inside this process: used by batch inference, and by the Ray engine actor.

On a machine without a GPU the CPU build of vLLM serves; ``VLLM_CPU_KVCACHE_SPACE`` (GiB, default 1) sizes its cache,
``OMP_NUM_THREADS`` its threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from openrlhf import device
from openrlhf.errors import DataError, InfraError, UsageError
from openrlhf.rollout.engine import CACHE, WEIGHTS
from openrlhf.rollout.types import Prompt, Rollout, SamplingParams, sample_seed
from openrlhf.rollout.weights import BUCKET_BYTES, alone, in_buckets
from openrlhf.strategy import signals

PREFILL_TOKENS = 4096
"""Prompt tokens of one engine step on a CPU."""
WORKER_EXTENSION = "openrlhf.ray.vllm_worker.WeightReloader"
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core stays in this process: starts in 4 s instead of 26 s
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else a model over two processes wants two NUMA nodes
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}


class VLLMEngine:
    """A :class:`~openrlhf.rollout.engine.RolloutEngine` that serves the model folder ``model_path`` with vLLM.

    Args:
        model_path: Hugging Face folder or hub id.
        dtype: ``"float32"`` or ``"bfloat16"``; must be the trainer's, or every log-prob differs from it.
        seed: seed of the engine; samples do not depend on it, each has its own (:func:`sample_seed`).
        max_model_len: longest prompt plus answer in tokens; None takes the model's own limit.
        max_num_seqs: most sequences that are worked on at a time; None leaves it to vLLM.
        enable_prefix_caching: share the cache of equal prompt beginnings; emptied before every call of
            :meth:`generate`, so that no sample depends, to the last bit, on what was answered before.
        enforce_eager: do not compile and do not capture CUDA graphs. Always so on a CPU, where compiling needs a
            C++ compiler and 25 s for a tenth of the speed.
        gpu_memory_utilization: fraction of GPU memory for weights and cache; no effect on a CPU.
        tensor_parallel_size: devices that share one model.
        trust_remote_code: run the model folder's own code.
        sleep: allow :meth:`sleep` to free GPU memory; no effect on a CPU.
        repack_tied_head: see :func:`openrlhf.ray.vllm_worker.repack_tied_heads`.

    Attributes:
        version: of the policy that is served.
        steps: engine steps done so far; grows while the engine generates.

    Raises:
        DataError: vLLM cannot serve this model.
        InfraError: vLLM is not installed.
    """

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "bfloat16",
        seed: int = 42,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_prefix_caching: bool = False,
        enforce_eager: bool = False,
        gpu_memory_utilization: float = 0.9,
        tensor_parallel_size: int = 1,
        trust_remote_code: bool = False,
        sleep: bool = False,
        repack_tied_head: bool = True,
    ):
        self.version = 0
        self.steps = 0
        self.repack_tied_head = repack_tied_head
        self.tensor_parallel_size = tensor_parallel_size
        on_cpu = device.device_type() == "cpu"
        self._eager = enforce_eager or on_cpu
        self._can_sleep = sleep and not on_cpu
        self._asleep: set[str] = set()
        self._requests = 0
        self.llm = _load(
            model_path,
            dtype=dtype,
            seed=seed,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            enable_prefix_caching=enable_prefix_caching,
            enforce_eager=self._eager,
            tensor_parallel_size=tensor_parallel_size,
            distributed_executor_backend="uni" if tensor_parallel_size == 1 else "mp",
            trust_remote_code=trust_remote_code,
            enable_sleep_mode=self._can_sleep,
            **(_cpu_options(max_model_len) if on_cpu else {"gpu_memory_utilization": gpu_memory_utilization}),
        )

    def generate(self, prompts: list[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """Return ``sampling.n`` rollouts a prompt; a sample depends on (seed, step, uid, its number) alone.

        The log-probs are those of the distribution that was sampled from: at ``temperature`` (1 when greedy), and
        with ``top_p`` below 1 renormalised over the tokens it leaves, so up to ``-log(top_p)`` above the policy's.
        """
        wanted = [
            (prompt, sample_seed(sampling.seed, sampling.step, prompt.uid, index))
            for prompt in prompts
            for index in range(sampling.n)
        ]
        self._empty_prefix_cache()
        outputs = self._run([(prompt.token_ids, seed) for prompt, seed in wanted], sampling)
        return [self._rollout(prompt, seed, output) for (prompt, seed), output in zip(wanted, outputs, strict=True)]

    def update_weights(
        self, weights: Iterable[tuple[str, Any]], version: int, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        """Serve ``weights`` (all of them, named as in the checkpoint) from now on, as policy ``version``.

        They are taken about ``bucket_bytes`` at a time.
        """
        self.llm.collective_rpc("begin_weights")
        for bucket in in_buckets(weights, bucket_bytes):
            several = self.tensor_parallel_size > 1  # then it crosses process borders
            self.llm.collective_rpc("take_weights", args=(alone(bucket) if several else bucket,))
        self.llm.collective_rpc("end_weights", args=(self.repack_tied_head,))
        self._empty_prefix_cache()
        self.version = version

    def sleep(self) -> None:
        """Move the weights to the host and drop the cache, where vLLM was started to do so; else do nothing."""
        if self._can_sleep and not self._asleep:
            self.llm.sleep(level=1)
            self._asleep = {WEIGHTS, CACHE}

    def wake_up(self, part: str) -> None:
        """Take the memory of ``WEIGHTS`` or of the ``CACHE`` back."""
        if part in self._asleep:
            self.llm.wake_up(tags=[part])
            self._asleep.remove(part)

    def close(self) -> None:
        """Give back the memory, processes and process group of vLLM; nothing can be generated afterwards."""
        if self.llm is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        cleanup_dist_env_and_memory()

    def _empty_prefix_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise InfraError("vLLM kept its prefix cache: it would mix two policies.")

    def _run(self, requests: list[tuple[tuple[int, ...], int]], sampling: SamplingParams) -> list[Any]:
        """Generate for ``(token_ids, seed)`` pairs and return vLLM's outputs in the same order."""
        engine, outputs = self.llm.llm_engine, {}
        numbers = range(self._requests, self._requests + len(requests))
        self._requests += len(requests)
        try:
            for number, (token_ids, seed) in zip(numbers, requests, strict=True):
                params = _vllm_sampling(sampling, seed)
                engine.add_request(str(number), {"prompt_token_ids": list(token_ids)}, params)
            with self._compilation():
                while engine.has_unfinished_requests():
                    signals.check()
                    outputs.update((int(out.request_id), out) for out in engine.step() if out.finished)
                    self.steps += 1
        finally:
            engine.abort_request([str(number) for number in numbers if number not in outputs])
        return [outputs[number] for number in numbers]

    def _compilation(self):
        """Return the context to step the engine in: vLLM's sampler compiles even when it was told not to."""
        import torch

        return torch.compiler.set_stance("force_eager" if self._eager else "default")

    def _rollout(self, prompt: Prompt, seed: int, output: Any) -> Rollout:
        answer = output.outputs[0]
        response = tuple(answer.token_ids)
        log_probs = tuple(step[token].logprob for step, token in zip(answer.logprobs, response, strict=True))
        start = len(prompt.token_ids)
        return Rollout(
            prompt=prompt,
            token_ids=prompt.token_ids + response,
            action_spans=((start, start + len(response)),),
            log_probs=log_probs,
            finish_reason=answer.finish_reason,
            policy_version=self.version,
            seed=seed,
        )


def _vllm_sampling(sampling: SamplingParams, seed: int):
    """Return vLLM's parameters of one sample.

    No minimum length: it would forbid the end of the sequence at the first token, in a way the trainer cannot see.
    """
    import vllm
    from vllm.sampling_params import RequestOutputKind

    try:
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p if sampling.temperature > 0 else 1.0,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            seed=seed,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
    except ValueError as error:
        raise UsageError(f"vLLM refuses these sampling settings: {error}") from None


def _cpu_options(max_model_len: int) -> dict[str, Any]:
    """Return what differs on a CPU: a prompt is read in one go.

    vLLM winds the random generator of a sample back after a part of a prompt, which only generators of a GPU can do.
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(PREFILL_TOKENS, max_model_len)}


def _load(model_path: str, **options: Any):
    """Start ``vllm.LLM``; see :class:`VLLMEngine`."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    device.configure_threads(1)  # left to itself vLLM takes one thread
    try:
        import vllm
    except ImportError as error:
        raise InfraError(f"vLLM cannot be imported ({error}). Install it with: pip install 'openrlhf[vllm]'") from None
    try:
        return vllm.LLM(
            model=model_path,
            logprobs_mode="processed_logprobs",
            load_format="safetensors",  # never a pickle
            worker_extension_cls=WORKER_EXTENSION,
            **options,
        )
    except (ValueError, RuntimeError, OSError, AssertionError) as error:
        raise DataError(f"vLLM cannot serve '{model_path}': {error}") from error
