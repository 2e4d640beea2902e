"""What the example scripts are given with ``SMOKE=1``: tiny models, rows with the columns of the named data, a server.

All of it is made in the folder ``SMOKE_DIR`` when a command first asks for it.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

ROWS = 16
STEP_END = "\u043a\u0438"
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SERVER_S = 120


def place(*names: str) -> Path:
    """Return a path below the folder of this script's run."""
    return Path(os.environ["SMOKE_DIR"]).joinpath(*names)


def turns(question: str, answer: str | None = None) -> list[dict]:
    """Return a conversation of one question, and its answer."""
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


def rows_like(name: str) -> list[dict]:
    """Return rows with the columns of the data set ``name``: sums of two numbers, half of them wrong."""
    draw = random.Random(0)
    rows = []
    for index in range(ROWS):
        one, other = draw.randint(1, 9), draw.randint(1, 9)
        asked, right, wrong = f"{one} + {other}?", f"It is {one + other}.", f"It is {one + other + 1}."
        columns = {
            "Open-Orca/OpenOrca": {"question": asked, "response": right},
            "OpenRLHF/preference_dataset_mixture2_and_safe_pku": {
                "chosen": turns(asked, right),
                "rejected": turns(asked, wrong),
            },
            "OpenRLHF/prompt-collection-v0.1": {"context_messages": turns(asked)},
            "Dylan2048/ultrafeedback-unpaired-preferences": {
                "instruction": asked,
                "response": right if index % 2 else wrong,
                "score": index % 2,
            },
            "zhuzilin/Math-Shepherd": {
                "input": f"{asked} Step 1: add {STEP_END} Step 2: {right} {STEP_END}",
                "value": ["+", "+-"[index % 2]],
            },
            "openai/gsm8k@main": {"question": asked, "answer": f"{one} and {other} make it. #### {one + other}"},
        }
        rows.append(columns[name])
    return rows


def data_file(name: str) -> str:
    """Return a file with rows like those of the data set ``name``; what is a file here already stays."""
    if Path(name).exists():
        return str(Path(name).absolute())
    path = place("data", re.sub(r"\W+", "-", name) + ".jsonl")
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_like(name)))
    return str(path)


def model_folder(name: str, *, reward: bool) -> str:
    """Return the folder of a tiny random model of the family of ``name``; what is a folder here already stays."""
    if Path(name).exists():
        return str(Path(name).absolute())
    family = "mixtral" if "mixtral" in name.lower() else "llama"
    path = place("models", f"{family}-reward" if reward else family)
    if not path.exists():
        write_model(path, family, reward=reward)
    return str(path)


def write_model(path: Path, family: str, *, reward: bool) -> None:
    """Write a random model of 2 layers, and a tokenizer of single bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, logging

    logging.disable_progress_bar()
    size = write_tokenizer(path)
    extra = {"num_local_experts": 2} if family == "mixtral" else {}
    extra |= {"mean": 0.0, "std": 1.0, "value_head_prefix": "score"} if reward else {}
    config = AutoConfig.for_model(
        family, vocab_size=size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, num_labels=1, bos_token_id=None, eos_token_id=2,
        pad_token_id=0, **extra,
    )  # fmt: skip
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    kind.from_config(config, dtype=torch.float32).save_pretrained(path)


def write_tokenizer(path: Path) -> int:
    """Write a tokenizer with a ChatML template, of bytes and the end of a step; return the size of its vocabulary."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(SPECIAL_TOKENS)
    bytes_only.add_tokens([AddedToken(STEP_END, normalized=False)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(path)
    return len(tokenizer)


def free_port() -> int:
    """Return a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def reward_server(flags: dict[str, list[str]] | None = None) -> Iterator[str]:
    """Serve a tiny reward model with the flags of ``serve_rm`` and yield its address once it answers."""
    port = free_port()
    chosen = {"reward_pretrain": [model_folder("reward", reward=True)], **(flags or {}), "port": [str(port)]}
    words = [word for name, values in chosen.items() for word in (f"--{name}", *values)]
    url = f"http://127.0.0.1:{port}/get_reward"
    with place("serve_rm.log").open("w") as log:
        line = [sys.executable, "-m", "openrlhf.cli.serve_rm", *words]
        server = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(url, server)
        yield url
    finally:
        server.terminate()
        server.wait()


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Return once the server has rated a text.

    Raises:
        SystemExit: it ended, or did not answer in time.
    """
    question = {"query": ["1 + 1? It is 2."], "prompts": ["1 + 1?"]}
    request = Request(url, json.dumps(question).encode(), {"Content-Type": "application/json"})
    direct, end = build_opener(ProxyHandler({})), time.monotonic() + SERVER_S
    while time.monotonic() < end and server.poll() is None:
        try:
            with direct.open(request, timeout=SERVER_S) as answer:
                print(f"the reward server said {answer.read().decode().strip()}")
                return
        except URLError:
            time.sleep(0.5)
    raise SystemExit(f"error: the reward server did not answer; see {place('serve_rm.log')}")
