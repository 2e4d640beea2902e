"""The package as it is built and installed."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import openrlhf

ROOT = Path(__file__).resolve().parents[2]
LIGHT = ("openrlhf.config.groups", "openrlhf.config.ppo", "openrlhf.cli.common", "openrlhf.errors")


def test_the_package_knows_the_version_of_the_archive():
    assert openrlhf.__version__ == (ROOT / "version.txt").read_text(encoding="utf-8").strip()


def test_the_license_is_apache_2():
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def setup_says(*words, **environment):
    command = [sys.executable, "setup.py", "--quiet", *words]
    return subprocess.check_output(command, cwd=ROOT, env={**os.environ, **environment}, text=True)


@pytest.mark.full
def test_a_nightly_build_has_its_own_name_and_the_date():
    assert setup_says("--name", OPENRLHF_BUILD_MODE="nightly").strip() == "openrlhf-nightly"
    assert ".dev20" in setup_says("--version", OPENRLHF_BUILD_MODE="nightly")


@pytest.mark.full
def test_a_wheel_and_a_source_archive_build_and_import(tmp_path):
    """From a copy, so that a build folder never lands in the working tree."""
    source = tmp_path / "source"
    source.mkdir()
    names = "setup.py pyproject.toml requirements.txt version.txt LICENSE MANIFEST.in openrlhf"
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names.split()), str(source)], check=True)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    [wheel] = (tmp_path / "dist").glob("openrlhf-*.whl")
    assert list((tmp_path / "dist").glob("openrlhf-*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        tops = {name.split("/")[0] for name in archive.namelist()}
        for name in ("rollout_browser.css", "rollout_browser.js"):
            path = f"openrlhf/trainer/{name}"
            assert archive.read(path) == (ROOT / path).read_bytes()
    assert tops == {"openrlhf", f"openrlhf-{openrlhf.__version__}.dist-info"}
    code = "import sys; sys.path.insert(0, sys.argv[1]); import " + ", ".join(LIGHT) + "; print(openrlhf.__file__)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path / "installed")], capture_output=True, text=True, check=True
    )
    assert str(tmp_path / "installed") in done.stdout
