"""What every supervised command does around its trainer: ranks before, callbacks between, export and report after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from openrlhf.config.continuing import training_flags
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.trainer.alarms import Alarms, loss_alarms
from openrlhf.trainer.callbacks import Callback, Checkpointing, Evaluation, MetricLogging, ProgressLine
from openrlhf.trainer.loggers import JsonlLogger, build_loggers
from openrlhf.trainer.loop import Trainer
from openrlhf.trainer.profiling import Profiling, Recorder
from openrlhf.trainer.report import report_line
from openrlhf.trainer.setup import Run


@contextmanager
def joined_ranks(config: Any) -> Iterator[DeepSpeedStrategy]:
    """Join the ranks of a supervised command and leave them at the end of the block.

    Not after an error: to leave in good order a rank would wait for the others, which may be gone.
    """
    strategy = DeepSpeedStrategy(
        config.deepspeed,
        bf16=config.model.bf16,
        max_norm=config.optim.max_norm,
        micro_batch_size=config.batch.micro_train_batch_size,
        seed=config.batch.seed,
        ring_size=config.attention.ring_attn_size,
        ring_head_stride=config.attention.ring_head_stride,
    )
    strategy.setup_distributed()
    yield strategy
    strategy.close()


def supervised_callbacks(
    config: Any, run: Run, strategy: DeepSpeedStrategy, export: Callable[[Path], None], shown: Sequence[str]
) -> list[Callback]:
    """Return the callbacks of a supervised command in their order.

    ``export(folder)`` writes a Hugging Face folder, ``shown`` are the metrics of the progress line, the loss first.
    """
    talks, recorder = strategy.rank == 0, Recorder()
    return [
        Alarms(loss_alarms(shown[0]), run.say),
        ProgressLine(run.console, shown),
        MetricLogging(
            JsonlLogger(run.path / "metrics.jsonl") if talks else None,
            build_loggers(config.logging, run.flags, run.path) if talks else [],
            config.logging.logging_steps,
        ),
        Profiling(
            config.logging.profile_steps,
            recorder.start,
            partial(recorder.stop, name=f"rank{strategy.rank}"),
            run.path,
            run.say,
        ),
        Evaluation(config.logging.eval_steps),
        Checkpointing(
            CheckpointManager(
                config.checkpoint, strategy.comm, layout=strategy.layout, flags=training_flags(config), say=run.say
            ),
            config.checkpoint,
            export,
        ),
    ]


def finish_run(
    config: Any, run: Run, strategy: DeepSpeedStrategy, export: Callable[[Path], None], trainer: Trainer
) -> None:
    """Export the model to ``--save_path``, write the report, and say where both are.

    Asked to stop meanwhile, it ends all this, saves the last step too, and raises ``Preempted`` as ``trainer.fit``.
    """
    path = Path(config.checkpoint.save_path)
    with trainer.saved_when_stopped():
        run.phase("export")
        export(path)
        if strategy.rank == 0:
            run.say(f"done: model in {path}, {report_line(run.path)}")
        trainer.leave_if_asked()
