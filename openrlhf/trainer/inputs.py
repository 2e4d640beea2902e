"""What a supervised run reads before any model is loaded, so that wrong data fails in seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from openrlhf.datasets.blending import load_train_eval, recognised
from openrlhf.datasets.rows import NothingUsable
from openrlhf.models.suitability import check_language_model
from openrlhf.models.tokenizer import check_vocabulary, load_tokenizer

TOKENS = "tokens"
"""The folder of tokenised rows in a run folder."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The tokenizer, and the rows to train and to evaluate on; ``evaluation`` may be empty.

    ``folder`` is where tokenised rows are kept, and what else is made of them once; None keeps nothing.
    """

    tokenizer: Any
    train: Any
    evaluation: Sequence[Any]
    folder: Path | None = None

    def sets(self) -> list[Any]:
        """Return both sets of rows."""
        return [self.train, self.evaluation]


def read_inputs(
    config: Any,
    dataset: type,
    stopping: str,
    check: Callable = check_language_model,
    beside: Mapping[str, str | None] | None = None,
    run_path: Path | None = None,
    least_rows: int = 1,
) -> Inputs:
    """Read the tokenizer and the data of a supervised command.

    Args:
        dataset: the class of the rows, called as ``dataset(rows, tokenizer, config.data, name)``; one that stores its
            rows (``PARTS``) takes ``cache`` too.
        stopping: when a mixture ends: ``"first_exhausted"`` or ``"all_exhausted"``.
        check: what the model folder must pass, of :mod:`openrlhf.models.suitability`.
        beside: flag -> path of language models that read the same token ids; None where there is none.
        run_path: the run folder, where tokenised rows are kept; None keeps them nowhere.
        least_rows: how many rows a set must have.

    Raises:
        DataError: the model folder, the tokenizer or a row cannot be used, or too few rows are left.
    """
    model, data = config.model, config.data
    check(model.pretrain, trust_remote_code=model.trust_remote_code)
    tokenizer = load_tokenizer(
        model.pretrain,
        use_fast=not model.disable_fast_tokenizer,
        trust_remote_code=model.trust_remote_code,
        chat_template=data.tokenizer_chat_template,
    )
    for flag, path in (beside or {}).items():
        if path and path != model.pretrain:
            check_language_model(path, trust_remote_code=model.trust_remote_code, flag=flag)
            check_vocabulary(path, tokenizer, model, flag)
    data = recognised(data, dataset.FORMATS, data.dataset, data.train_split)
    train_rows, eval_rows = load_train_eval(data, config.batch.seed, stopping)
    folder = run_path and run_path / TOKENS
    make = partial(_made, dataset, folder, least_rows)
    train = make("train", train_rows, tokenizer, data, f"--dataset {data.dataset}")
    return Inputs(tokenizer, train, _evaluation(eval_rows, partial(make, "eval"), tokenizer, data), folder)


def _made(
    dataset: Any, folder: Path | None, least_rows: int, file: str, rows: Any, tokenizer: Any, data: Any, name: str
) -> Any:
    """Return the set of ``rows``, kept in ``folder`` where it can be; raise ``NothingUsable`` when it is too small."""
    cache = {"cache": folder / f"{file}.rows"} if folder and dataset.PARTS else {}
    made = dataset(rows, tokenizer, data, name, **cache)
    if len(made) < least_rows:
        few = "row is" if len(made) == 1 else "rows are"
        raise NothingUsable(
            f"{name}: {len(made)} {few} not enough, rows are compared with each other: give {least_rows}"
        )
    return made


def _evaluation(rows: Any, dataset: Callable, tokenizer: Any, data: Any) -> Sequence[Any]:
    """Return the rows to evaluate on; none where nobody asked for these and none of them can be used."""
    if data.eval_dataset:
        return dataset(rows, tokenizer, data, f"--eval_dataset {data.eval_dataset}")
    try:
        return dataset(rows, tokenizer, data, f"evaluation rows of {data.dataset}")
    except NothingUsable as error:
        logger.warning("%s; the run does not evaluate", error)
        return []
