"""What every supervised command does, written once; a :class:`Recipe` says what one of them differs in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from openrlhf.config.continuing import training_flags
from openrlhf.models.actor import Actor
from openrlhf.models.loading import load_causal_lm
from openrlhf.models.suitability import check_language_model
from openrlhf.strategy import signals
from openrlhf.strategy.checkpoint import CheckpointManager
from openrlhf.strategy.deepspeed import DeepSpeedStrategy
from openrlhf.strategy.engine import TrainEngine
from openrlhf.strategy.export import export_model
from openrlhf.trainer.alarms import Alarms, loss_alarms
from openrlhf.trainer.callbacks import Callback, Evaluation, MetricLogging, ProgressLine
from openrlhf.trainer.checkpointing import Checkpointing
from openrlhf.trainer.inputs import Inputs, read_inputs
from openrlhf.trainer.loggers import JsonlLogger, build_loggers
from openrlhf.trainer.loop import Trainer, total_steps
from openrlhf.trainer.profiling import Profiling, Recorder
from openrlhf.trainer.report import report_line
from openrlhf.trainer.setup import Run, start_up_lines


def load_policy(config: Any, strategy: DeepSpeedStrategy, inputs: Inputs) -> Actor:
    """Return the language model of ``--pretrain``."""
    model = load_causal_lm(
        config.model.pretrain,
        config.model,
        lora=config.lora,
        context=strategy.loading_context,
        seed=config.batch.seed,
    )
    return Actor(model, packing_samples=config.attention.packing_samples, aux_loss_coef=config.model.aux_loss_coef)


def nothing_more(config: Any, strategy: DeepSpeedStrategy, inputs: Inputs, engine: TrainEngine) -> dict[str, Any]:
    """Return no options: the trainer takes none of its own."""
    return {}


@dataclass(frozen=True)
class Recipe:
    """What a supervised command differs in.

    Attributes:
        trainer: the algorithm; the first of its ``window_names`` is the loss.
        dataset: the class of the rows.
        mixing: when a mixture of data sets ends: ``"first_exhausted"`` or ``"all_exhausted"``.
        model: ``model(config, strategy, inputs)`` loads what is trained.
        options: ``options(config, strategy, inputs, engine)`` returns what the trainer takes beside what all take,
            frozen models among it; ``engine`` holds what is trained.
        check: what the folder of ``--pretrain`` must pass.
        beside: flag -> path of the language models that read the same token ids.
        least_rows: how many rows a set must have.
    """

    trainer: type[Trainer]
    dataset: type
    mixing: str
    model: Callable[[Any, DeepSpeedStrategy, Inputs], nn.Module] = load_policy
    options: Callable[[Any, DeepSpeedStrategy, Inputs, TrainEngine], dict[str, Any]] = nothing_more
    check: Callable[..., Any] = check_language_model
    beside: Mapping[str, str | None] | None = None
    least_rows: int = 1

    def read(self, config: Any, run_path: Path | None = None) -> Inputs:
        """Return the tokenizer and the data, before any model; tokenised rows are kept in the run folder."""
        return read_inputs(config, self.dataset, self.mixing, self.check, self.beside, run_path, self.least_rows)


def train(config: Any, opened: Run, recipe: Recipe) -> None:
    """Train as ``config`` and ``recipe`` say, on this rank. Raises the errors of :mod:`openrlhf.errors`."""
    opened.phase("data preparation")
    inputs = recipe.read(config, opened.path)
    with joined_ranks(config) as strategy:
        opened.phase("model")
        model = recipe.model(config, strategy, inputs)
        opened.say(*start_up_lines(config, opened, strategy, model, inputs.train, inputs.evaluation))
        engine = strategy.prepare_train(model, config.optim, total_steps(len(inputs.train), config.batch))
        options = recipe.options(config, strategy, inputs, engine)
        export = partial(export_model, engine, strategy, tokenizer=inputs.tokenizer)
        callbacks = supervised_callbacks(config, opened, strategy, export, tuple(recipe.trainer.window_names))
        data = inputs.train, inputs.evaluation
        trainer = recipe.trainer(engine, strategy, *data, config.batch, callbacks, **options)
        with signals.held():
            trainer.fit()
            finish_run(config, opened, strategy, export, trainer)


@contextmanager
def joined_ranks(config: Any) -> Iterator[DeepSpeedStrategy]:
    """Join the ranks of a supervised command and leave them at the end of the block."""
    strategy = DeepSpeedStrategy(
        config.deepspeed,
        bf16=config.model.bf16,
        max_norm=config.optim.max_norm,
        micro_batch_size=config.batch.micro_train_batch_size,
        seed=config.batch.seed,
        ring_size=config.attention.ring_attn_size,
        ring_head_stride=config.attention.ring_head_stride,
    )
    with strategy.joined():
        yield strategy


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
