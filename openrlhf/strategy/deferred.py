"""DeepSpeed's checkpoint files, written after its collectives instead of between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from openrlhf.strategy.unpickling import by_value


@contextmanager
def write_after(engine: Any, kept: Callable[[str], bool]) -> Iterator[None]:
    """Let a DeepSpeed ``engine`` collect inside the block what it saves, and write it when the block is done.

    Of the weights of the module only those are written whose name is ``kept``.

    Between two collectives a slow or a full disk of one rank would keep the others waiting until their deadline.
    """
    writer, files = engine.checkpoint_engine, []
    engine.checkpoint_engine = _Collector(writer, files)
    try:
        yield
    finally:
        engine.checkpoint_engine = writer
    for state, path in files:
        if isinstance(state.get("module"), dict):
            state["module"] = {name: tensor for name, tensor in state["module"].items() if kept(name)}
        with by_value():
            writer.save(state, path)


class _Collector:
    """Stands in for a checkpoint engine of DeepSpeed: ``save`` only takes note, all else is the engine's own."""

    def __init__(self, writer: Any, files: list[tuple[Any, str]]):
        self._writer, self._files = writer, files

    def save(self, state_dict: Any, path: str) -> None:
        self._files.append((state_dict, path))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)
