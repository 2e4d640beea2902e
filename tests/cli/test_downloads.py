"""``--use_ms``: names become folders of ModelScope's cache, and everything else is said in one message."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf.cli.downloads import fetched
from openrlhf.config.arguments import parse, to_flat_dict
from openrlhf.config.chat import ChatConfig
from openrlhf.config.inference import BatchInferenceConfig
from openrlhf.config.ppo import PPOConfig
from openrlhf.config.serve import ServeConfig
from openrlhf.config.supervised import RewardModelConfig, SFTConfig
from openrlhf.errors import DataError
from tests.helpers import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = '''
"""Stands in for the package of ModelScope, which is not on this machine: its hub is a folder."""
import os
from pathlib import Path

class NotExistError(Exception):
    pass

def _find(kind, name):
    with (Path(os.environ["HUB"]) / "asked").open("a") as file:
        file.write(f"{kind} {name}\\n")
    folder = Path(os.environ["HUB"]) / kind / name
    if not folder.is_dir():
        raise NotExistError(f"{name} does not exist")
    return str(folder)

def snapshot_download(model_id, revision=None, cache_dir=None, *, ignore_file_pattern=None):
    return _find("models", model_id)

def dataset_snapshot_download(dataset_id, revision=None, cache_dir=None):
    return _find("datasets", dataset_id)
'''
ROWS = [{"question": f"{n} + 30?", "response": f"It is {n + 30}."} for n in range(4)]
WORDS = ["--pretrain", "lab/model", "--dataset", "lab/rows", "--use_ms"]
WORDS += ["--input_key", "question", "--output_key", "response"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that can be reached, with a model and a data set; returns its folder."""
    hub, packages = tmp_path / "hub", tmp_path / "packages"
    (packages / "modelscope").mkdir(parents=True)
    (packages / "modelscope" / "__init__.py").write_text(LIBRARY)
    tiny_folder(hub / "models" / "lab" / "model")
    rows = hub / "datasets" / "lab" / "rows"
    rows.mkdir(parents=True)
    for name in ("1M-part.jsonl", "2M-part.jsonl"):
        (rows / name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (rows / "configuration.json").write_text("{}")
    (rows / "README.md").write_text("not data")
    monkeypatch.setenv("HUB", str(hub))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # behind a proxy the hub is not tried before
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), str(ROOT)]))
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "modelscope", raising=False)
    yield hub
    sys.modules.pop("modelscope", None)


def config(command=SFTConfig, words=WORDS):
    return parse(command, list(words), "train")[0]


def test_names_become_folders_and_what_is_here_stays(hub, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text("{}\n")
    words = [*WORDS, "--dataset", f"lab/rows, {own},json@./d,lab/rows@sub", "--dataset_probs", ".25,.25,.25,.25"]
    found = fetched(config(words=words))
    assert found.model.pretrain == str(hub / "models/lab/model")
    rows = hub / "datasets/lab/rows"
    assert found.data.dataset == f"{rows},{own},json@./d,{rows}@sub"
    assert found.data.eval_dataset is None and found.optim == config().optim
    local = fetched(config(words=[*WORDS, "--pretrain", str(hub / "models/lab/model"), "--dataset", str(own)]))
    assert (local.model.pretrain, local.data.dataset) == (str(hub / "models/lab/model"), str(own))


def test_every_model_of_a_command_is_fetched(hub):
    words = "--pretrain lab/model --reward_pretrain lab/model,lab/model --critic_pretrain lab/model --prompt_data "
    process = ["--prm_pretrain", "lab/model", "--prm_placeholder_token", "x", "--prm_reward_tokens", "+", "-"]
    found = fetched(config(PPOConfig, [*words.split(), "lab/rows", "--use_ms", *process]))
    folder = str(hub / "models/lab/model")
    assert (found.model.pretrain, found.model.critic_pretrain) == (folder, folder)
    assert found.model.reward_pretrain == f"{folder},{folder}"
    assert found.reward.prm_pretrain == folder
    assert found.prompts.prompt_data == str(hub / "datasets/lab/rows")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (BatchInferenceConfig, "--eval_task rm --pretrain lab/model --dataset lab/rows --output_path out.jsonl"),
        (ServeConfig, "--reward_pretrain lab/model"),
        (ChatConfig, "--pretrain lab/model"),
    ],
)
def test_the_commands_beside_training_fetch_too(hub, command, words):
    found = to_flat_dict(fetched(config(command, [*words.split(), "--use_ms"])))
    assert str(hub / "models/lab/model") in (found.get("pretrain"), found.get("reward_pretrain"))
    assert found.get("dataset") in (None, str(hub / "datasets/lab/rows"))


def test_without_the_flag_nothing_is_asked_for(hub):
    plain = config(RewardModelConfig, ["--pretrain", "lab/model", "--dataset", "lab/rows"])
    assert fetched(plain) is plain
    assert not (hub / "asked").exists()


@pytest.mark.parametrize(
    ("flag", "name", "message"),
    [
        ("--pretrain", "lab/other", "--pretrain lab/other: ModelScope does not give it: lab/other does not exist"),
        ("--dataset", "lab/other", "--dataset lab/other: ModelScope does not give it: lab/other does not exist"),
        ("--pretrain", "./model", "--pretrain ./model: no such file or folder here, and names of ModelScope are"),
        ("--pretrain", "model", "--pretrain model: no such file or folder here, and names of ModelScope are"),
        (
            "--dataset",
            "rows",
            "--dataset rows: no such file or folder here, and names of ModelScope are namespace/name",
        ),
    ],
)
def test_a_name_that_cannot_be_had_is_one_message(hub, flag, name, message):
    with pytest.raises(DataError) as caught:
        fetched(config(words=[*WORDS, flag, name]))
    assert str(caught.value).startswith(message)


def test_a_hub_out_of_reach_is_said_at_once(hub, monkeypatch):
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MODELSCOPE_DOMAIN", f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(
            DataError, match="--pretrain lab/model: no such file or folder here, and ModelScope cannot"
        ):
            fetched(config())


def test_a_mistake_of_ours_is_not_hidden(hub, monkeypatch):
    monkeypatch.delenv("HUB")
    with pytest.raises(KeyError):
        fetched(config())


def test_a_command_reads_the_data_of_the_hub_and_tells_what_is_wrong_with_them(hub, tmp_path):
    command = [sys.executable, "-m", "openrlhf.cli.train_sft", *WORDS, "--input_key", "prompt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    where = hub / "datasets/lab/rows/1M-part.jsonl"
    assert f"error: {where}:1: no key 'prompt'; found: question, response; set --input_key" in done.stderr
    assert (hub / "asked").read_text().splitlines() == ["models lab/model", "datasets lab/rows"]


def test_without_the_package_the_flag_is_an_error_in_a_moment(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "openrlhf.cli.train_sft", *WORDS],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "error: --use_ms needs modelscope, which is not installed: pip install 'modelscope', or leave the flag out\n"
    )
