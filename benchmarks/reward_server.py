"""Load on ``serve_rm``: clients that ask without a pause, one request in twenty bad, and a probe of its health.

    python benchmarks/reward_server.py [--seconds 60] [--clients 16 64] [--runs 3] [--model RM] [--out FILE.json]

Every answer is compared with the reward that transformers' own forward gives the text alone. The exit status is 1 when
a reward was wrong, when a good request was not answered with rewards (or told to come again), or a bad one was not
answered with the status that it deserves. Times are printed and decide nothing. Without ``--model`` the model is a toy
of two layers: what is measured then is the server.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
SENTENCE = "Natalia sold clips to 48 of her friends in April and then she sold half as many clips in May"
TEXTS, PER_REQUEST, BAD, TOLERANCE, PROBE_S = 200, 4, 0.05, 1e-4, 0.1
BAD_REQUESTS = (
    (b"{}", 422),
    (b'{"query": "no list"}', 422),
    (b'{"query": []}', 422),
    (b'{"query": [1]}', 422),
    (b'{"query": ["cut"', 400),
    (b'{"query": ["\xff"]}', 400),
    (json.dumps({"query": ["x"] * 1025}).encode(), 413),
    (json.dumps({"query": ["x" * 70_000]}).encode(), 413),
)


def write_toy(folder: Path) -> None:
    """Write a reward model of two layers with random weights."""
    import torch
    from model import train_tokenizer
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = train_tokenizer(sample_texts())
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForSequenceClassification(config)
    model.score.weight.data.normal_(0.0, 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sample_texts() -> list[str]:
    """Return texts of 5 to 60 words."""
    chance, words = random.Random(0), SENTENCE.split()
    return [" ".join(chance.choices(words, k=chance.randint(5, 60))) for _ in range(TEXTS)]


def true_rewards(folder: str, texts: list[str]) -> dict[str, float]:
    """Return the reward of each text alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = {}
    with torch.no_grad():
        for text in texts:
            tokens = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            found[text] = float(model(input_ids=torch.tensor([tokens])).logits[0, 0])
    return found


class Tally:
    """What happened in a run."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.times: list[float] = []
        self.health: list[float] = []

    def figures(self, seconds: float) -> dict[str, float]:
        """Return the figures of a run that took so long."""
        p50, p99 = percentile(self.times, 50), percentile(self.times, 99)
        figures = {
            "requests_per_s": len(self.times) / seconds,
            "p50_ms": p50,
            "p99_ms": p99,
            "p99_over_p50": p99 / p50,
        }
        return {**figures, "health_p99_ms": percentile(self.health, 99), **self.events}


def percentile(seconds: list[float], percent: int) -> float:
    """Return a percentile in milliseconds."""
    ordered = sorted(seconds)
    return 1000 * ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


async def one_client(session: aiohttp.ClientSession, url: str, rewards: dict, until: float, seed: int, tally: Tally):
    """Ask without a pause until the time is over."""
    chance, texts = random.Random(seed), list(rewards)
    while time.monotonic() < until:
        if chance.random() < BAD:
            body, deserved = chance.choice(BAD_REQUESTS)
            async with session.post(url, data=body) as response:
                await response.read()
            tally.events["bad requests"] += 1
            tally.events["bad requests answered wrongly"] += response.status != deserved
            continue
        asked = chance.sample(texts, PER_REQUEST)
        body = json.dumps({"query": asked, "prompts": asked, "labels": [""] * PER_REQUEST}).encode()
        started = time.monotonic()
        async with session.post(url, data=body) as response:
            answer = await response.read()
        if response.status == 429:
            tally.events["told to come again"] += 1
            await asyncio.sleep(float(response.headers["Retry-After"]))
            continue
        tally.times.append(time.monotonic() - started)
        tally.events["unexpected 5xx"] += response.status >= 500
        tally.events["other unexpected answers"] += response.status != 200 and response.status < 500
        if response.status == 200:
            got = json.loads(answer)["rewards"]
            right = len(got) == PER_REQUEST
            right = right and all(abs(g - rewards[text]) <= TOLERANCE for g, text in zip(got, asked, strict=True))
            tally.events["wrong rewards"] += not right


def probe(url: str, seconds: float) -> list[tuple[float, int]]:
    """Ask for the server's health, ten times a second; return how long each answer took, and its status.

    For a process of its own: beside the clients it would measure how busy they are.
    """
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    found, until = [], time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.monotonic()
        connection.request("GET", "/health")
        response = connection.getresponse()
        response.read()
        found.append((time.monotonic() - started, response.status))
        time.sleep(PROBE_S)
    connection.close()
    return found


async def load(url: str, rewards: dict[str, float], clients: int, seconds: float) -> dict[str, float]:
    """Return the figures of one run."""
    tally = Tally()
    timeout, connector = aiohttp.ClientTimeout(total=60), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        for _ in range(5):
            await (await session.post(url, json={"query": list(rewards)[:PER_REQUEST]})).read()
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(pool, probe, url, 0.0)  # the process has started when the clock does
            probing = loop.run_in_executor(pool, probe, url, seconds)
            until = time.monotonic() + seconds
            await asyncio.gather(*(one_client(session, url, rewards, until, seed, tally) for seed in range(clients)))
            answers = await probing
    tally.health = [took for took, _ in answers]
    tally.events["unhealthy"] = sum(status != 200 for _, status in answers)
    return tally.figures(seconds)


def start(folder: str) -> tuple[subprocess.Popen, str]:
    """Start ``serve_rm`` on a free port; return it and its address."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "openrlhf.cli.serve_rm", "--reward_pretrain", folder, "--port", "0"]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    for line in server.stdout:
        if line.startswith("serving rewards at "):
            return server, line.split()[-1]
    raise SystemExit(f"serve_rm ended with {server.wait()}")


def measure(folder: str, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Return the medians over the runs for each number of clients; counts are sums."""
    rewards = true_rewards(folder, sample_texts())
    server, url = start(folder)
    rows = []
    try:
        for clients in arguments.clients:
            runs = [asyncio.run(load(url, rewards, clients, arguments.seconds)) for _ in range(arguments.runs)]
            timed = {name for name in runs[0] if name.endswith(("_ms", "_s", "_p50"))}
            row = {name: statistics.median(run[name] for run in runs) for name in runs[0] if name in timed}
            counts = {name for run in runs for name in run if name not in timed}
            row.update({name: sum(run.get(name, 0) for run in runs) for name in sorted(counts)})
            rows.append({"clients": clients, "seconds": arguments.seconds, "runs": arguments.runs, **row})
            print(json.dumps({name: round(value, 2) for name, value in rows[-1].items()}), flush=True)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run")
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 64], help="how many ask at a time")
    parser.add_argument("--runs", type=int, default=3, help="runs whose median is told")
    parser.add_argument("--model", help="folder of a reward model")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.model:
            write_toy(Path(folder))
        rows = measure(arguments.model or folder, arguments)
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=1))
    harmless = ("bad requests", "told to come again")
    wrong = {name for row in rows for name in row if " " in name or name == "unhealthy"} - set(harmless)
    raise SystemExit(any(row.get(name) for row in rows for name in wrong))


if __name__ == "__main__":
    main()
