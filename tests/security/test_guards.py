"""Guards hold under ``python -O``, which removes every assert."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_folder
from tests.security.canary import pickled

PROGRAM = """
import json, sys
from pathlib import Path

root = Path(sys.argv[1])

def wrong_flag():
    from openrlhf.config.arguments import parse
    from openrlhf.config.supervised import SFTConfig
    parse(SFTConfig, ["--pretrain", "m", "--dataset", "d", "--train_batch_size", "0"], "train_sft")

def name_that_leads_out():
    from openrlhf.paths import inside
    inside(root, "../x", "a test")

def pickled_weights():
    from openrlhf.models.loading import check_path
    check_path(str(root / "pickled"), trust_remote_code=False)

def code_of_a_model():
    from openrlhf.models.loading import check_path
    check_path(str(root / "with_code"), trust_remote_code=False)

def reward_that_is_not_finite():
    from openrlhf.rollout.reward_source import RewardFunction
    RewardFunction(root / "reward.py").score(["q"], ["p"])

def random_state_of_a_stranger():
    from openrlhf.strategy.unpickling import load_tensors
    load_tensors(root / "canary.pt")

def unknown_operation():
    from openrlhf.strategy.comm import SoloComm
    SoloComm().all_reduce(1.0, "product")

def probabilities_that_do_not_fit():
    from openrlhf.datasets.blending import parse_probabilities
    parse_probabilities("0.5,0.6", 2, "--dataset")

from openrlhf.errors import OpenRLHFError

if __debug__:
    sys.exit("run this with -O")
found = {}
for name in sys.argv[2:]:
    try:
        globals()[name]()
        found[name] = "nothing"
    except OpenRLHFError as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""


LIGHT = {
    "wrong_flag": "UsageError",
    "name_that_leads_out": "DataError",
    "reward_that_is_not_finite": "NumericError",
    "probabilities_that_do_not_fit": "UsageError",
}
HEAVY = {
    "pickled_weights": "DataError",
    "code_of_a_model": "DataError",
    "random_state_of_a_stranger": "DataError",
    "unknown_operation": "UsageError",
}


# Without -O python has compiled torch and transformers long ago; with it they are compiled first, for half a minute.
@pytest.mark.parametrize("expected", [LIGHT, pytest.param(HEAVY, marks=pytest.mark.full)], ids=["light", "heavy"])
def test_guards_hold_without_asserts(tmp_path, expected):
    folder = Path(tiny_folder(tmp_path / "pickled"))
    (folder / "model.safetensors").rename(tmp_path / "weights")
    (folder / "pytorch_model.bin").write_bytes(pickled(tmp_path / "canary"))
    (tmp_path / "with_code").mkdir()
    (tmp_path / "with_code" / "config.json").write_text('{"model_type": "my_own", "auto_map": {}}')
    (tmp_path / "reward.py").write_text("def reward_func(queries, prompts, labels):\n    return [float('nan')]\n")
    (tmp_path / "canary.pt").write_bytes(pickled(tmp_path / "canary"))
    words = [sys.executable, "-O", "-c", PROGRAM, str(tmp_path), *expected]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert not (tmp_path / "canary").exists()
