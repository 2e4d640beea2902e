"""What no file of the repository may contain, read from the source with ``ast``: the package and the examples."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*(ROOT / "openrlhf").rglob("*.py"), *(ROOT / "examples").rglob("*.py"), ROOT / "setup.py"])
TEXTS = [*SOURCES, *(path for path in (ROOT / "examples").rglob("*.sh")), *(ROOT / ".github").rglob("*.yml")]

UNPICKLERS = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")
EVALUATORS = ("eval", "exec", "compile", "builtins.eval", "builtins.exec", "parse_expr", "sympify")
UNSAFE_YAML = ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load")
REMOTE_CODE = "trust_remote_code"


def dangers(source: str) -> list[str]:
    """Return what is dangerous in a source text, one entry a place."""
    found = [(node, what) for node in ast.walk(ast.parse(source)) for what in dangers_of(node)]
    return [f"line {getattr(node, 'lineno', '?')}: {what}" for node, what in found]


def dangers_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Assert):
        return ["assert: it vanishes under -O"]
    if isinstance(node, (ast.Assign, ast.AnnAssign, ast.arguments)):
        return dangers_of_default(ast.unparse(node).replace(" ", ""))
    return dangers_of_call(node) if isinstance(node, ast.Call) else []


def dangers_of_default(text: str) -> list[str]:
    """A variable, field or argument called trust_remote_code may not be born true."""
    return [text] if re.search(rf"\b{REMOTE_CODE}(:bool)?=True", text) else []


def dangers_of_call(node: ast.Call) -> list[str]:
    target = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    module, _, function = target.rpartition(".")
    rules = {
        "unpickling": module in UNPICKLERS and function in ("load", "loads", "Unpickler", "open"),
        "torch.load without weights_only=True": target == "torch.load" and keywords.get("weights_only") != "True",
        "a reader that unpickles": function == "read_pickle" or keywords.get("allow_pickle") == "True",
        "evaluation": target in EVALUATORS or function in ("parse_expr", "sympify"),
        "yaml that makes objects": target in UNSAFE_YAML,
        "a shell": target in SHELLS or keywords.get("shell") == "True",
        "a temporary name that others can take": target == "tempfile.mktemp",
        f"{REMOTE_CODE}=True": keywords.get(REMOTE_CODE) == "True",
        f"from_pretrained without {REMOTE_CODE}": is_loader(node) and REMOTE_CODE not in keywords,
    }
    return [what for what, found in rules.items() if found]


def is_loader(node: ast.Call) -> bool:
    return isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"


def test_no_source_holds_anything_dangerous():
    found = [f"{path.relative_to(ROOT)}: {what}" for path in SOURCES for what in dangers(path.read_text())]
    assert not found, "\n".join(found)


def test_nothing_switches_on_the_pickles_of_vllm_and_torch_or_the_open_ports_of_ray():
    switches = ("VLLM_ALLOW_INSECURE_SERIALIZATION", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "RAY_AUTH_MODE=disabled")
    found = [f"{path}: {name}" for path in TEXTS for name in switches if name in path.read_text()]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "assert x",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "pickle.Unpickler(file)",
        "joblib.load(path)",
        "np.load(path, allow_pickle=True)",
        "pandas.read_pickle(path)",
        "eval(text)",
        "sympy.parse_expr(text)",
        "yaml.load(file, Loader=yaml.Loader)",
        "yaml.unsafe_load(file)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "tempfile.mktemp()",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path)",
        "class C:\n    trust_remote_code: bool = True",
        "trust_remote_code = True",
        "def f(*, trust_remote_code: bool = True): pass",
    ],
)
def test_the_scan_notices(source):
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "pickle.UnpicklingError",
        "model.eval()",
        "yaml.safe_load(file)",
        "subprocess.run([program, text])",
        "AutoModel.from_pretrained(path, trust_remote_code=config.trust_remote_code)",
        "def f(trust_remote_code: bool = False): pass",
        "re.compile(text)",
    ],
)
def test_the_scan_leaves_good_code_alone(source):
    assert dangers(source) == []
