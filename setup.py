"""Packaging. ``OPENRLHF_BUILD_MODE=nightly`` builds ``openrlhf-nightly`` with the date in its version."""

import os
from datetime import datetime, timezone
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
NIGHTLY = os.environ.get("OPENRLHF_BUILD_MODE") == "nightly"


def lines(name):
    """Return the lines of a text file beside this one, without empty ones and comments."""
    rows = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [row.strip() for row in rows if row.strip() and not row.startswith("#")]


def long_description():
    """Return the README, which a source archive may lack."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


version = lines("version.txt")[0]
setup(
    name="openrlhf-nightly" if NIGHTLY else "openrlhf",
    version=f"{version}.dev{datetime.now(timezone.utc):%Y%m%d}" if NIGHTLY else version,
    description="Supervised fine-tuning, reward models and PPO with DeepSpeed, Ray and vLLM, on any machine",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["openrlhf", "openrlhf.*"]),
    package_data={"openrlhf.trainer": ["*.css", "*.js"]},
    install_requires=lines("requirements.txt"),
    entry_points={"console_scripts": ["openrlhf = openrlhf.cli.main:main"]},
    extras_require={
        "vllm": ["vllm>=0.18"],
        "vllm_latest": ["vllm>=0.32"],
        "flash_attn": ["flash-attn>=2.7"],
        "ring": ["ring-flash-attn>=0.1.4"],
        "liger": ["liger-kernel>=0.5"],
        "math": ["math-verify>=0.9"],
        "docs": ["latex2mathml>=3.77", "mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
        "dev": ["build", "math-verify>=0.9", "pytest>=8", "pytest-timeout>=2.3", "ruff==0.17.5"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
