"""One command of an example script, on tiny random models and made-up rows, for ``SMOKE=1``; see ``smoke.sh``.

    python smoke.py LAUNCHER ARGUMENT ...         in the folder SMOKE_DIR

Commands of this project run through the launcher that the script names, with small sizes. What reaches beyond this
machine (a cluster's ``srun``, ``ray job submit``, a container) is shown, and the command inside runs here. Other
commands run as they are.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from smoke_inputs import data_file, free_port, model_folder, reward_server

from openrlhf.device import gpu_present

MODULE = re.compile(r"openrlhf\.cli\.(\w+)")
MODELS = ("pretrain", "ref_pretrain", "reward_pretrain", "critic_pretrain", "teacher_model")
DATA = ("dataset", "eval_dataset", "prompt_data", "pretrain_data")
PLACES = ("save_path", "ckpt_path", "run_path", "output_path")
AT_MOST = {
    "train_batch_size": 4,
    "micro_train_batch_size": 2,
    "rollout_batch_size": 4,
    "micro_rollout_batch_size": 2,
    "micro_batch_size": 2,
    "batch_size": 2,
    "n_samples_per_prompt": 2,
    "best_of_n": 2,
    "max_len": 256,
    "prompt_max_len": 128,
    "generate_max_len": 12,
    "max_new_tokens": 12,
    "max_samples": 8,
    "save_steps": 2,
    "eval_steps": 2,
    "lora_rank": 4,
    "tp_size": 1,
    "vllm_num_engines": 1,
    "vllm_tensor_parallel_size": 1,
    **{f"{role}_num_nodes": 1 for role in ("actor", "critic", "ref", "reward")},
    **{f"{role}_num_gpus_per_node": 1 for role in ("actor", "critic", "ref", "reward")},
}
ELSEWHERE = ("srun", "ray", "docker", "sudo", "curl")


def flags_of(words: list[str]) -> dict[str, list[str]]:
    """Return the values of every flag in the words behind a command's name."""
    flags: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name] = [value] if equals else []
        else:
            flags[list(flags)[-1]].append(word)
    return flags


def small(command: str, flags: dict[str, list[str]], stack: ExitStack) -> dict[str, list[str]]:
    """Return the flags of the same command for a laptop; a server that it needs runs until ``stack`` closes."""
    shrunk = dict(flags)
    scores = command == "serve_rm" or flags.get("eval_task") == ["rm"]
    for name, values in flags.items():
        if name in AT_MOST and int(values[0]) > AT_MOST[name]:
            shrunk[name] = [str(AT_MOST[name])]
        elif name in MODELS:
            shrunk[name] = [model_folder(values[0], reward=scores or name == "reward_pretrain")]
        elif name in DATA:
            shrunk[name] = [",".join(data_file(entry) for entry in values[0].split(","))]
        elif name in PLACES:
            shrunk[name] = [values[0].lstrip("/")]
        elif name == "remote_rm_url" and "://" in values[0]:
            shrunk[name] = [stack.enter_context(reward_server())]
    if not gpu_present():
        shrunk.pop("adam_offload", None)  # all of it is in main memory, and DeepSpeed would compile for a minute
    if not find_spec("vllm"):
        shrunk |= {"vllm_num_engines": ["0"]} if "vllm_num_engines" in flags else {}
        shrunk |= {"eval_task": ["generate"]} if flags.get("eval_task") == ["generate_vllm"] else {}
    return shrunk


def launched(launcher: str, command: str, flags: dict[str, list[str]]) -> list[str]:
    """Return the words that start ``command`` here: on as many ranks as a ring of the flags has, else on one."""
    ranks, module = flags.get("ring_attn_size", ["1"])[0], f"openrlhf.cli.{command}"
    words = [word for name, values in flags.items() for word in (f"--{name}", *values)]
    if launcher == "deepspeed":
        where = ["--num_accelerators", ranks, "--master_port", str(free_port())]
        return ["deepspeed", *where, "--module", module, *words]
    if launcher == "torchrun":
        return ["torchrun", "--standalone", "--nproc_per_node", ranks, "--module", module, *words]
    return [sys.executable, "-m", module, *words]


def run(words: list[str]) -> int:
    """Do what ``words``, the launcher and its arguments, stand for here; return the exit status."""
    place = next((index for index, word in enumerate(words) if MODULE.fullmatch(word)), None)
    if place is None:
        if words[0] in ELSEWHERE:
            print(f"== not run here: {shlex.join(words)}")
            return 0
        return subprocess.run([sys.executable if words[0] == "python3" else words[0], *words[1:]]).returncode
    command = words[place].rpartition(".")[2]
    launcher = next(word for word in reversed(words[:place]) if word in ("deepspeed", "torchrun", "python3"))
    with ExitStack() as stack:
        flags = small(command, flags_of(words[place + 1 :]), stack)
        if command == "serve_rm":
            print(f"== openrlhf.cli.{command}")
            print(f"the server answered at {stack.enter_context(reward_server(flags))}")
            return 0
        line = launched(launcher, command, flags)
        print(f"== {shlex.join(line)}", flush=True)
        return subprocess.run(line).returncode


if __name__ == "__main__":
    Path(os.environ["SMOKE_DIR"]).mkdir(parents=True, exist_ok=True)
    sys.exit(run(sys.argv[1:]))
