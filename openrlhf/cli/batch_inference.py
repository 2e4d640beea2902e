"""Answer every prompt of a data set, or rate answers with a reward model, and write JSON lines.

    python -m openrlhf.cli.batch_inference --eval_task generate_vllm --pretrain MODEL --dataset FILE --output_path OUT
    deepspeed --module openrlhf.cli.batch_inference --eval_task generate ...       (transformers, on all ranks)
    deepspeed --module openrlhf.cli.batch_inference --eval_task rm --pretrain RM --dataset OUT --post_processor rs ...

Windows of rows are appended to ``<output_path>.partial``; the same command goes on behind them after any interruption,
and the file is what it would have been without. What libraries print goes to ``<output_path>.log``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from openrlhf.cli.common import run
from openrlhf.config.inference import GENERATE_VLLM, RATE, BatchInferenceConfig
from openrlhf.config.plan import count_rows, setting_sections
from openrlhf.errors import InfraError, Preempted
from openrlhf.strategy import signals
from openrlhf.trainer.console import OURS, Console, noise_to, our_lines

if TYPE_CHECKING:
    from openrlhf.datasets.rows import TokenisedRows
    from openrlhf.strategy.deepspeed import DeepSpeedStrategy


def problems(config: BatchInferenceConfig) -> list[str]:
    """Return what is wrong with the ranks of the launcher."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if config.eval_task != GENERATE_VLLM or ranks == 1:
        return []
    return [
        f"--eval_task {GENERATE_VLLM} is one process, not {ranks} ranks: start it with python -m; vLLM takes the "
        "devices that --tp_size says"
    ]


def plan(config: BatchInferenceConfig, ranks: int) -> list[str]:
    """Return what would be done."""
    data, answers = config.data, config.answers
    rows = count_rows(data.dataset, int(data.max_samples))
    known = f"{rows:,} rows of {data.dataset}" if rows else data.dataset
    if config.eval_task == RATE:
        what = f"rate {known} with {config.model.pretrain}, then: {config.processor or 'no post-processor'}"
    else:
        part = "" if data.iter is None else f", slice {data.iter} of {data.rollout_batch_size} rows"
        most = f"at most {answers.max_new_tokens} tokens"
        what = f"{answers.best_of_n} x answers of {most} from {config.model.pretrain} to {known}{part}"
    where = "in vLLM" if config.eval_task == GENERATE_VLLM else f"on {ranks} rank{'s' if ranks > 1 else ''}"
    lines = [what, f"{where}, written to {config.output_path} every {config.window_size:,} rows"]
    return setting_sections(config, lines)


def infer(config: BatchInferenceConfig) -> None:
    """Do what ``config`` says, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
    try:
        with _talking(Path(config.output_path)) as console:
            _infer(config, console)
    except KeyboardInterrupt:
        raise Preempted(
            f"stopped by {signals.requested() or 'SIGINT'}: the same command goes on behind what is in "
            f"{config.output_path}.partial"
        ) from None


def _infer(config: BatchInferenceConfig, console: Console) -> None:
    from openrlhf.inference.job import Voice, run_job

    voice = Voice(OURS.info, console.status)
    if config.eval_task == GENERATE_VLLM:
        from openrlhf.inference.generation import VLLMGeneration

        with closing(VLLMGeneration(config)) as task:
            _warn(task.rows, config)
            run_job(config, task, voice, task.load)
        return
    from openrlhf.inference.generation import RankGeneration
    from openrlhf.inference.rating import Rating

    task = Rating(config) if config.eval_task == RATE else RankGeneration(config)
    _warn(task.rows, config)
    with _joined(config) as strategy:
        run_job(config, task, voice, partial(task.load, strategy), strategy.comm)


def _warn(rows: TokenisedRows, config: BatchInferenceConfig) -> None:
    """Tell of texts that will be read otherwise from the output than they are here."""
    if count := rows.spelled_as_text:
        OURS.warning(
            f"{count:,} row{' spells' if count == 1 else 's spell'} a special token: plain text here, but in "
            f"{config.output_path} it looks like the template's own, and what trains on that file or rates it takes "
            "it as the token; --special_tokens_in_text error names the row"
        )


@contextmanager
def _talking(output: Path) -> Iterator[Console]:
    """Send what libraries print to a log beside the output, and our lines to the terminal too."""
    rank = int(os.environ.get("RANK", "0"))
    log = output.with_name(f"{output.name}{f'.rank{rank}' if rank else ''}.log")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
    except OSError as error:
        raise InfraError(f"--output_path {output}: cannot be written ({error}); name another place") from error
    with noise_to(log) as terminal, our_lines(Console(terminal, quiet=rank != 0)) as console:
        yield console


@contextmanager
def _joined(config: BatchInferenceConfig) -> Iterator[DeepSpeedStrategy]:
    """Join the ranks of the launcher and leave them at the end of the block."""
    from openrlhf.strategy.deepspeed import DeepSpeedStrategy

    strategy = DeepSpeedStrategy(
        config.ranks.deepspeed,
        bf16=config.model.bf16,
        micro_batch_size=config.ranks.micro_batch_size,
        seed=config.ranks.seed,
    )
    with strategy.joined():
        yield strategy


if __name__ == "__main__":
    run(BatchInferenceConfig, infer, "batch_inference", plan, problems=problems)
