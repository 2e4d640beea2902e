"""The example scripts as modules."""

import importlib
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "examples/scripts"


@pytest.fixture
def script(monkeypatch):
    """Import an example script by its name, as python does for the folder of the one that it runs."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module
