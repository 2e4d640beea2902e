"""Who may import whom, and what package code may not contain: read from the source with ``ast``."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "openrlhf"

FLOORS = {
    "ops": 0,
    "config": 1,
    "models": 2,
    "datasets": 2,
    "strategy": 3,
    "rollout": 4,
    "inference": 5,
    "trainer": 5,
    "ray": 6,
    "cli": 7,
}
BESIDE = ("errors", "device", "paths", "locks")

DOORS = {
    "ray": ["ray/*"],
    "vllm": ["rollout/vllm_*.py", "ray/vllm_*.py", "ray/weight_sync.py"],
    "deepspeed": ["strategy/*"],
    "transformers": ["models/*", "strategy/deepspeed.py", "strategy/optimizer.py", "rollout/hf_engine.py"],
    "peft": ["models/*"],
    "bitsandbytes": ["models/*"],
    "flash_attn": ["models/*"],
    "ring_flash_attn": ["models/*"],
    "liger_kernel": ["models/*"],
    "datasets": ["datasets/*"],
    "modelscope": ["cli/downloads.py"],
    "tyro": ["config/*"],
    "wandb": ["trainer/loggers.py"],
    "tensorboard": ["trainer/loggers.py"],
    "torch.utils.tensorboard": ["trainer/loggers.py"],
    "matplotlib": ["trainer/report.py"],
    "plotly": ["trainer/report.py"],
    "fastapi": ["rollout/reward_server.py"],
    "uvicorn": ["rollout/reward_server.py"],
    "aiohttp": ["rollout/*"],
    "requests": ["rollout/*"],
}
OPTIONAL = ("vllm", "flash_attn", "ring_flash_attn", "liger_kernel", "bitsandbytes", "wandb", "modelscope")
SAYS_CUDA = ["device.py", "models/*", "strategy/*", "ray/weight_sync.py", "ray/vllm_*.py"]
HEAVY = ("torch", "ray", "vllm", "transformers", "deepspeed", "datasets")


@dataclass(frozen=True)
class Module:
    """A source file of the package: its path below ``openrlhf/`` and its text."""

    path: str
    source: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.source)

    @property
    def package(self) -> str:
        """The floor it lives on, ``""`` beside the floors."""
        return self.path.split("/")[0] if "/" in self.path else ""

    @property
    def is_lazy(self) -> bool:
        return self.path.endswith("__init__.py")


@cache
def modules() -> tuple[Module, ...]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return tuple(Module(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8")) for path in paths)


def imported_by(node: ast.AST) -> list[str]:
    """Return the dotted names that one statement or call imports; a relative import starts with a dot."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
        return [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return []


def called(node: ast.Call) -> str:
    """Return the last name of what is called: ``load`` of ``torch.load(...)``."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def imports(module: Module) -> list[str]:
    return [name for node in ast.walk(module.tree) for name in imported_by(node)]


def imports_when_loaded(module: Module) -> list[str]:
    """Return what is imported by loading the module: everything outside functions and ``TYPE_CHECKING``."""
    names, queue = [], list(module.tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue.extend(node.orelse)
            continue
        names.extend(imported_by(node))
        queue.extend(ast.iter_child_nodes(node))
    return names


def starts_with(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def within(path: str, patterns: list[str]) -> bool:
    return any(fnmatch(path, pattern) for pattern in patterns)


def against_the_floors(module: Module) -> list[str]:
    if module.is_lazy:
        return []
    problems = []
    for name in imports(module):
        if name.startswith("."):
            problems.append(f"relative import of {name}")
        if not starts_with(name, "openrlhf"):
            continue
        target = (name.split(".") + [""])[1]
        if target in BESIDE:
            allowed = module.package != "ops"
        elif module.package not in FLOORS or target not in FLOORS:
            allowed = False
        else:
            allowed = target == module.package or FLOORS[target] < FLOORS[module.package]
        if not allowed:
            problems.append(f"imports {name}")
    return problems


def against_the_doors(module: Module) -> list[str]:
    problems = [
        f"imports {name}, whose door is {', '.join(doors)}"
        for name in imports(module)
        for library, doors in DOORS.items()
        if starts_with(name, library) and not within(module.path, doors)
    ]
    if not fnmatch(module.path, "*/vllm_*.py"):
        for name in imports_when_loaded(module):
            problems += [f"needs {library} to be imported" for library in OPTIONAL if starts_with(name, library)]
    return problems


def against_purity(module: Module) -> list[str]:
    """The lowest floor knows torch and the standard library, the flags not even torch."""
    if module.package == "ops":
        own = ("torch", "openrlhf.ops", *sys.stdlib_module_names)
        return [f"imports {name}" for name in imports(module) if not any(starts_with(name, known) for known in own)]
    if module.package == "config":
        return [f"imports {name}" for name in imports(module) if starts_with(name, "torch")]
    return []


def against_one_device(module: Module) -> list[str]:
    if within(module.path, SAYS_CUDA):
        return []
    lines = enumerate(module.source.splitlines(), start=1)
    return [f"line {number} says cuda" for number, line in lines if "cuda" in line]


def against_safety(module: Module) -> list[str]:
    found = [(node, forbidden(node)) for node in ast.walk(module.tree)]
    return [f"line {node.lineno}: {what}" for node, what in found if what]


def forbidden(node: ast.AST) -> str:
    """Return what is wrong with one syntax node, ``""`` when nothing is."""
    if isinstance(node, ast.Assert):
        return "assert vanishes under -O: raise an error"
    if isinstance(node, ast.ExceptHandler):
        return forbidden_handler(node)
    if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
        return "import of *"
    if isinstance(node, ast.Call):
        return forbidden_call(node)
    return ""


def forbidden_handler(node: ast.ExceptHandler) -> str:
    if node.type is None:
        return "bare except"
    catches_all = ast.unparse(node.type) in ("Exception", "BaseException")
    if catches_all and all(isinstance(statement, (ast.Pass, ast.Continue)) for statement in node.body):
        return "an except that hides every error"
    return ""


def forbidden_call(node: ast.Call) -> str:
    target = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if target in ("eval", "exec", "builtins.eval", "builtins.exec"):
        return f"{target}()"
    if keywords.get("trust_remote_code") == "True":
        return "trust_remote_code=True"
    if target == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    return ""


def against_unfinished_work(module: Module) -> list[str]:
    words = ("TODO", "FIXME", "XXX")
    lines = enumerate(module.source.splitlines(), start=1)
    return [f"line {number} says {word}" for number, line in lines for word in words if word in line]


RULES = [
    against_the_floors,
    against_the_doors,
    against_purity,
    against_one_device,
    against_safety,
    against_unfinished_work,
]


@pytest.mark.parametrize("rule", RULES)
def test_the_package_keeps_the_rule(rule):
    problems = [f"{module.path}: {problem}" for module in modules() for problem in rule(module)]
    assert not problems, "\n".join(problems)


def test_every_package_stands_on_a_floor():
    packages = {module.package for module in modules()} - {""}
    assert packages <= {*FLOORS, "utils"}


def test_commands_can_be_imported_without_anything_heavy():
    names = [
        "openrlhf." + module.path.removesuffix(".py").replace("/", ".")
        for module in modules()
        if module.package == "cli" and not module.is_lazy
    ]
    program = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=PACKAGE.parent, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not set(HEAVY) & set(done.stdout.split())


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (against_the_floors, "models/x.py", "from openrlhf.datasets import batch"),
        (against_the_floors, "datasets/x.py", "import openrlhf.models.actor"),
        (against_the_floors, "strategy/x.py", "def f():\n    from openrlhf.trainer.loop import Trainer"),
        (
            against_the_floors,
            "trainer/x.py",
            "from importlib import import_module\nimport_module('openrlhf.ray.group')",
        ),
        (against_the_floors, "trainer/x.py", "from openrlhf import ray"),
        (against_the_floors, "cli/x.py", "from openrlhf.utils import get_tokenizer"),
        (against_the_floors, "ops/x.py", "from .masking import masked_sum"),
        (against_the_floors, "ops/x.py", "from openrlhf.errors import NumericError"),
        (against_the_floors, "device.py", "from openrlhf.ops import kl"),
        (against_the_doors, "cli/x.py", "import ray"),
        (against_the_doors, "ray/group.py", "import vllm"),
        (against_the_doors, "trainer/x.py", "from torch.utils.tensorboard import SummaryWriter"),
        (against_the_doors, "trainer/x.py", "def f():\n    import matplotlib.pyplot as plt"),
        (against_the_doors, "trainer/loggers.py", "import wandb"),
        (against_the_doors, "datasets/x.py", "def f():\n    import modelscope"),
        (against_the_doors, "models/x.py", "try:\n    import flash_attn\nexcept ImportError:\n    flash_attn = None"),
        (against_purity, "ops/x.py", "import numpy"),
        (against_purity, "config/x.py", "def f():\n    import torch"),
        (against_one_device, "ray/group.py", "device = 'cuda'"),
        (against_safety, "ops/x.py", "assert True"),
        (against_safety, "ops/x.py", "try:\n    pass\nexcept:\n    raise"),
        (against_safety, "ops/x.py", "try:\n    pass\nexcept Exception:\n    pass"),
        (against_safety, "ops/x.py", "eval('1')"),
        (against_safety, "ops/x.py", "import torch\ntorch.load('x')"),
        (against_safety, "ops/x.py", "import torch\ntorch.load('x', weights_only=False)"),
        (against_safety, "ops/x.py", "load('x', trust_remote_code=True)"),
        (against_safety, "ops/x.py", "from math import *"),
        (against_unfinished_work, "ops/x.py", "# TO" + "DO later"),
    ],
)
def test_the_rule_notices_what_it_forbids(rule, path, source):
    assert rule(Module(path, source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "ops/x.py",
            "from __future__ import annotations\nimport math\nimport torch\nfrom openrlhf.ops.kl import approx_kl",
        ),
        (
            "cli/x.py",
            "from openrlhf.errors import UsageError\ndef main():\n    from openrlhf.trainer.sft import SFTTrainer",
        ),
        ("ray/vllm_actor.py", "import ray\nimport vllm\nfrom openrlhf.ray.host import Host\ndevice = 'cuda'"),
        ("trainer/loggers.py", "def f():\n    import wandb"),
        ("datasets/x.py", "import datasets\nfrom openrlhf.datasets.batch import TokenBatch"),
        ("models/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import flash_attn\nmodel.eval()"),
        ("trainer/x.py", "import torch\ntorch.load('x', weights_only=True)\nload(trust_remote_code=config.trust)"),
        ("trainer/x.py", "try:\n    f()\nexcept Exception as error:\n    print(error)"),
        ("utils/__init__.py", "from openrlhf.models.tokenizer import get_tokenizer"),
    ],
)
def test_the_rules_leave_good_code_alone(path, source):
    assert [problem for rule in RULES for problem in rule(Module(path, source))] == []
