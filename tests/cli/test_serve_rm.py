"""``serve_rm`` as a user starts it, with a real tiny reward model, and a run of PPO that learns from it."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import requests
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from openrlhf.config.arguments import parse
from openrlhf.config.ppo import PPOModelConfig, RewardConfig
from openrlhf.config.serve import ServeConfig
from openrlhf.errors import UsageError
from openrlhf.rollout.rewards import reward_source
from openrlhf.trainer.ppo.rating import Rater
from tests.cli.supervised import ROOT, environment
from tests.cli.test_train_ppo_ray import data, metrics, ppo
from tests.trainer.ppo.harness import local_loop, reward_file, rollout_of, tiny_ppo_config, tiny_reward_model

CANARY = "the text of a user"


class Served:
    """A running ``serve_rm``: its address, and what it has printed when it has ended."""

    def __init__(self, folder: str, *flags: str, **extra: str):
        words = [sys.executable, "-m", "openrlhf.cli.serve_rm", "--reward_pretrain", folder, "--port", "0", *flags]
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**environment(), **extra}, cwd=ROOT
        )
        self.output = ""
        try:
            self.url = self._address()
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    def _address(self, seconds: float = 150.0) -> str:
        deadline = time.monotonic() + seconds
        while "/get_reward" not in self.output:
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            if select.select([self.process.stdout], [], [], 1.0)[0]:
                self.output += os.read(self.process.stdout.fileno(), 2**16).decode()
        return next(word for word in self.output.split() if word.endswith("/get_reward"))

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the server with a signal; return its exit status."""
        self.process.send_signal(number)
        self.output += self.process.communicate(timeout=60)[0].decode()
        return self.process.returncode


@contextmanager
def served(folder: str, *flags: str, **extra: str):
    server = Served(folder, *flags, **extra)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Return the folder of a tiny reward model."""
    return tiny_reward_model(tmp_path_factory.mktemp("rm") / "rm", mean=0.01, std=0.02)


def test_texts_get_the_rewards_of_the_model_and_the_server_ends_in_order(folder, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["How many clips?", CANARY, "A robot " * 30]
    with torch.no_grad():
        ids = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
        expected = [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in ids]
    config = tiny_ppo_config(tmp_path)
    with served(folder) as server:
        assert requests.post(server.url, json={"query": texts}, timeout=60).json()["rewards"] == pytest.approx(
            expected, abs=1e-5
        )
        assert requests.post(server.url, json={"query": CANARY}, timeout=60).status_code == 422
        health = requests.get(server.url.replace("get_reward", "health"), timeout=60).json()
        assert health == {"status": "ok", "model": folder, "waiting": 0}
        _same_rewards_as_a_worker(config, folder, server.url)
        assert server.end() == 0
    assert server.output.rstrip().endswith("stopped")
    assert server.url.startswith("http://127.0.0.1:") and CANARY not in server.output


def _same_rewards_as_a_worker(config, folder, url):
    """The server gives answers, whole ones and cut ones, the rewards that a worker of the run gives them."""
    config = replace(config, model=PPOModelConfig(pretrain=config.model.pretrain, reward_pretrain=folder))
    loop, _ = local_loop(replace(config, reward=RewardConfig()))
    tokenizer = loop.maker.rater.tokenizer
    answers = [" It is 42.", f" Natalia sold 48 clips.{tokenizer.eos_token}", " A", f" Write{tokenizer.eos_token}"]
    rollouts = [
        rollout_of(prompt, tokenizer(answer).input_ids) for prompt, answer in zip(loop.prompts, answers, strict=False)
    ]
    own = loop.maker.rater.rate(rollouts).scores.tolist()
    remote = replace(config, reward=RewardConfig(remote_rm_url=url, reward_weights="0,1"))
    rater = Rater(remote, loop.roles, tokenizer, reward_source(remote))
    assert rater.rate(rollouts).scores.tolist() == pytest.approx(own, abs=1e-5)
    assert len({round(reward, 4) for reward in own}) == 4


@pytest.mark.full
def test_a_key_from_the_environment_is_asked_for_and_never_shown(folder):
    with served(folder, "--api_key", "RM_KEY", "--normalize_reward", RM_KEY="s3cret-canary") as server:
        assert requests.post(server.url, json={"query": ["a"]}, timeout=60).status_code == 401
        headers = {"Authorization": "Bearer s3cret-canary"}
        assert requests.post(server.url, json={"query": ["a"]}, headers=headers, timeout=60).status_code == 200
        command_line = Path(f"/proc/{server.process.pid}/cmdline").read_text()
        assert server.end(signal.SIGINT) == 0
    assert "s3cret-canary" not in server.output + command_line


@pytest.mark.full
def test_ppo_learns_from_a_server_and_a_file_and_ends_clearly_when_the_server_is_gone(folder, tmp_path, monkeypatch):
    one = [f"--{role}_num_gpus_per_node=1" for role in ("actor", "ref")]
    flags = [*data(tmp_path), *one, "--advantage_estimator", "reinforce", "--train_batch_size", "8"]
    flags += ["--remote_rm_key", "RM_KEY", "--remote_rm_tries", "2", "--logging_steps", "1"]
    monkeypatch.setenv("RM_KEY", "s3cret-canary")
    with served(folder, "--api_key", "RM_KEY") as server:
        sources = f"{server.url},{reward_file(tmp_path)}"
        done = ppo(*flags, "--remote_rm_url", sources, "--reward_weights", "1,0.5", cwd=tmp_path)
        assert server.end() == 0
        assert done.returncode == 0, done.stderr
        rows = metrics(tmp_path / "out_run")
        assert [row["step"] for row in rows] == [1, 2]
        for row in rows:
            total = row["reward_source_1"] + 0.5 * row["reward_source_2"]
            assert row["reward"] == pytest.approx(total, abs=1e-4)
        assert files_with(b"s3cret-canary", tmp_path) == [] and "s3cret-canary" not in done.stdout + done.stderr
        gone = ppo(*flags, "--remote_rm_url", sources, cwd=tmp_path)
    assert gone.returncode == 4
    assert "after 2 tries in" in gone.stderr and server.url in gone.stderr and "Traceback" not in gone.stderr


def files_with(secret: bytes, folder: Path) -> list[Path]:
    """Return the files below a folder that hold a secret."""
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.mark.full
def test_under_load_every_answer_is_right(tmp_path):
    words = [sys.executable, "benchmarks/reward_server.py", "--seconds", "8", "--runs", "1"]
    done = subprocess.run(
        [*words, "--out", str(tmp_path / "rows.json")],
        capture_output=True, text=True, timeout=280, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["clients"] for row in rows] == [16, 64]
    for row in rows:
        assert row["wrong rewards"] == row["unexpected 5xx"] == row["bad requests answered wrongly"] == 0
        assert row["bad requests"] > 0 and row["requests_per_s"] > 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "--reward_pretrain is missing"),
        ("--reward_pretrain rm --host 0.0.0.0", "--host 0.0.0.0 can be reached from other machines"),
        ("--reward_pretrain rm --host ::", "--host :: can be reached"),
        ("--reward_pretrain rm --host example.org", "--host example.org can be reached"),
        ("--reward_pretrain rm --api_key s3cret", "--api_key names neither a file nor an environment variable"),
        ("--reward_pretrain rm --port 70000", "--port must be at most 65535"),
        ("--reward_pretrain rm --batch_size 0", "--batch_size must be at least 1"),
    ],
)
def test_wrong_flags_of_the_server_are_refused_at_once(words, says):
    with pytest.raises(UsageError, match=says) as caught:
        parse(ServeConfig, words.split(), "serve_rm")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.3.2.1"])
def test_this_machine_needs_no_key(host, tmp_path, capsys):
    (tmp_path / "key").write_text("k")
    assert parse(ServeConfig, ["--reward_pretrain", "rm", "--host", host], "serve_rm")[0].is_private
    words = ["--reward_pretrain", "rm", "--host", "0.0.0.0", "--api_key", str(tmp_path / "key")]
    assert not parse(ServeConfig, words, "serve_rm")[0].is_private
