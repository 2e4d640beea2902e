"""Files that DeepSpeed pickles, written and read so that nobody's code runs with them.

DeepSpeed reads its checkpoints with ``torch.load(weights_only=False)``, which runs code that the file names. Inside
`tensors_only` torch refuses everything but tensors, plain values and the classes of DeepSpeed's own files; `by_value`
lets any Python write them so.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from openrlhf.errors import DataError

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_tensors(path: Path) -> Any:
    """Return what ``torch.save`` wrote to ``path``. Raises ``DataError`` when that is more than tensors and values."""
    try:
        return torch.load(path, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from error


@contextmanager
def tensors_only(source: Path) -> Iterator[None]:
    """Make every ``torch.load`` inside the block refuse code, whatever its caller asks for.

    Raises:
        DataError: a file of ``source`` needs more than data.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        raise _refused(source, error) from error
    finally:
        os.environ.pop(FORCE)
        if before is not None:
            os.environ[FORCE] = before


@contextmanager
def by_value() -> Iterator[None]:
    """Let what is pickled inside the block hold DeepSpeed's stage as its class and value.

    The first releases of Python 3.11 pickle a member of an enumeration as a call of ``getattr``, which `tensors_only`
    refuses.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (ZeroStageEnum, (stage.value,))
    try:
        yield
    finally:
        del ZeroStageEnum.__reduce_ex__


def _refused(source: Path, error: pickle.UnpicklingError) -> DataError:
    named = re.search(r"GLOBAL (\S+)", str(error))
    return DataError(
        f"{source} holds more than tensors and plain values ({named.group(1) if named else 'not a file of torch'}): "
        "this program did not write it so, and reading it could run code"
    )
