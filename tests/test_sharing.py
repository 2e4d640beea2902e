"""What the supervised commands have in common is written once."""

from __future__ import annotations

import ast
from itertools import combinations
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "openrlhf"
COMMANDS = [PACKAGE / "cli" / f"train_{name}.py" for name in ("sft", "rm", "dpo", "kto", "kd", "prm")]
TRAINERS = [PACKAGE / "trainer" / f"{name}.py" for name in ("sft", "reward_model", "dpo", "kto", "kd", "prm")]
SHARED = 6


def own_lines(path: Path) -> list[str]:
    """Return the lines of a module that are neither blank nor an import, a guard or a docstring of the module."""
    source = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(source), source.splitlines()
    for node in ast.walk(tree):
        guard = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")
        if guard or isinstance(node, (ast.Import, ast.ImportFrom)) or node is tree.body[0]:
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return [line.strip() for line in lines if line.strip()]


def runs(path: Path) -> set[tuple[str, ...]]:
    lines = own_lines(path)
    return {tuple(lines[start : start + SHARED]) for start in range(len(lines) - SHARED + 1)}


@pytest.mark.parametrize(("paths", "limit"), [(COMMANDS, 600), (TRAINERS, 550)], ids=["commands", "trainers"])
def test_the_six_are_short_together(paths, limit):
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) < limit


@pytest.mark.parametrize(
    ("one", "other"),
    [*combinations(COMMANDS, 2), *combinations(TRAINERS, 2)],
    ids=lambda path: path.stem,
)
def test_no_two_share_six_lines(one, other):
    assert not runs(one) & runs(other)
