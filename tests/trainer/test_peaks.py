"""The estimate of memory against what processes really take, on a CPU: within 15 percent."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

from openrlhf.config.needs import Pool, phase_needs, ppo_roles, supervised_roles
from tests.helpers import tiny_config, tiny_folder, tiny_tokenizer
from tests.strategy.ranks import run_ranks
from tests.trainer.peaks import PPO_ROLES, config_of

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads what Linux knows")
SIZES = {"hidden": 512, "layers": 6, "vocab": 8192, "intermediate_size": 1536, "num_attention_heads": 8}


def estimate(kind: str, *arguments) -> float:
    config = config_of(kind, *arguments)
    if kind in PPO_ROLES:
        roles = ppo_roles(config, {"actor": 1, kind: 1}, 0.9)
        roles = [role for role in roles if role.name == kind]
        for role in roles:
            role.phases.pop("generate", None)
    else:
        roles = supervised_roles(config, 1)
    return max(phase_needs(Pool([role.name for role in roles], at_once=False), roles, 0.0).values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """A large and a small language model, and a large and a small reward model."""
    root = tmp_path_factory.mktemp("models")
    other = {"hidden": 64, "vocab": SIZES["vocab"]}
    language = tiny_folder(root / "large", **SIZES), tiny_folder(root / "small", **other)
    return {"language": language, "reward": (reward(root / "large-rm", **SIZES), reward(root / "small-rm", **other))}


def reward(path: Path, **sizes) -> str:
    AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1, **sizes)).save_pretrained(path)
    tiny_tokenizer(path)
    return str(path)


def check(folders, monkeypatch, kind: str, stage: int = 0, bf16: bool = False, checkpointing: bool = False) -> None:
    # Freed memory goes back at once, as if every tensor were one of its own.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")
    large, small = folders["reward" if kind in ("critic", "reward") else "language"]
    asked = {"stage": stage, "bf16": bf16, "checkpointing": checkpointing}
    asked |= {"kind": kind, "folder": large, "small": small}
    [measured] = run_ranks("tests.trainer.peaks:measure", 1, fresh=True, **asked)
    expected = estimate(kind, large, stage, bf16, checkpointing)
    assert expected == pytest.approx(measured, rel=0.15), (expected / 2**20, measured / 2**20)


@pytest.mark.timeout(240)
def test_supervised_training_takes_what_was_estimated(folders, monkeypatch):
    check(folders, monkeypatch, "sft", stage=2)


@pytest.mark.full
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("kind", "stage", "bf16", "checkpointing"),
    [
        ("sft", 0, False, False),
        ("sft", 2, True, True),
        ("sft", 3, False, True),
        ("sft", 3, True, True),
        ("dpo", 2, False, False),
        ("dpo", 2, False, True),
        ("actor", 2, False, False),
        ("actor", 2, True, True),
        ("critic", 2, False, False),
        ("ref", 2, False, False),
        ("reward", 2, False, False),
    ],
)
def test_every_role_takes_what_was_estimated(folders, monkeypatch, kind, stage, bf16, checkpointing):
    check(folders, monkeypatch, kind, stage, bf16, checkpointing)
