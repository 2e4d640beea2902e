"""Checkpoints for another number of ranks or another ZeRO stage, through DeepSpeed's universal format.

The files of a whole, verified checkpoint are taken apart into one folder a weight, which every ZeRO stage above 0 can
read on any number of ranks. What DeepSpeed's tool leaves out between the stages is added here.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from openrlhf.strategy.unpickling import by_value, load_tensors, tensors_only

CONVERTIBLE = {"world_size", "zero_stage"}
WEIGHTS = "zero"
GLOBAL_STATE = "optimizer_state.pt"
STEP = "step.pt"


def convertible(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether files of the layout ``before`` can be converted to the layout ``now``.

    Stage 0 has no ZeRO files to convert, neither from nor to. Several roles, each with its own ranks, are not
    converted.
    """
    if "world_size" not in now:
        return False
    differ = {name for name in {*before, *now} if before.get(name) != now.get(name)}
    return differ <= CONVERTIBLE and bool(before.get("zero_stage")) and bool(now.get("zero_stage"))


def is_universal(folder: Path) -> bool:
    """Return whether ``folder`` was written by `convert`."""
    return (folder / WEIGHTS / GLOBAL_STATE).is_file()


def convert(source: Path, target: Path) -> None:
    """Write the role folder ``source`` (DeepSpeed's files, already verified) to ``target`` in universal format."""
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with tensors_only(source), by_value():
        ds_to_universal.main(arguments)
        _complete_state(target / WEIGHTS)
    _name_for_all_stages(target)


@contextmanager
def reading_universal(engine: Any, folder: Path) -> Iterator[None]:
    """Let a DeepSpeed ``engine`` load ``folder`` inside the block, as a universal one if it is one."""
    if not is_universal(folder):
        yield
        return
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    # Stage 3 gives all weights one and the same counter, which every one of them would count up.
    base = engine.optimizer.optimizer
    for state in base.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


def _complete_state(weights: Path) -> None:
    """Make what came from any stage readable by all.

    Stages 1 and 2 look for Adam's step beside every weight and want the weights in dictionaries, stage 3 looks for
    the step in the global state.
    """
    import deepspeed
    from deepspeed.checkpoint.constants import DS_VERSION, OPTIMIZER_STATE_DICT, PARAM, PARAM_GROUPS

    state = load_tensors(weights / GLOBAL_STATE)
    folders = [path.parent for path in weights.rglob("exp_avg.pt")]
    if OPTIMIZER_STATE_DICT in state:
        step = state[OPTIMIZER_STATE_DICT]["state"][0]["step"]
        for folder in folders:
            for path in folder.glob("*.pt"):
                torch.save({PARAM: load_tensors(path)}, path)
            torch.save(step, folder / STEP)
    else:
        step = load_tensors(folders[0] / STEP)
        state[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": step}}, "param_groups": state[PARAM_GROUPS]}
    torch.save({DS_VERSION: deepspeed.__version__, **state}, weights / GLOBAL_STATE)


def _name_for_all_stages(target: Path) -> None:
    """Give the file of the common state the name that stages 1 and 2 expect, and the name of stage 3."""
    names = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    there = next(target / name for name in names if (target / name).is_file())
    for name in names:
        if not (target / name).is_file():
            shutil.copyfile(there, target / name)
