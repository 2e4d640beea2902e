"""Our losses and TRL's on the same token batches and the same tiny random models: the largest difference of each.

    python benchmarks/parity_trl.py --peer-python PYTHON [--out FILE]

PYTHON belongs to the environment of the peer (see ``peer_trl.py``). It runs this file with ``--peer FOLDER``: TRL's
trainers tokenise random words, make batches of them and compute their losses, and all that is written down. Our
trainers then compute the losses of the very same batches. The peer is only called: trainer, data loader,
``compute_loss``. Its DPO loss has no label smoothing, so cDPO is put together there: with eps the share of labels
that are wrong, it is (1 - eps) times the loss of the pairs plus eps times that of the flipped pairs. For KTO the peer
says which rows are mismatched. Exit code 1 when a loss differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

TOLERANCE = 1e-5
BATCHES, ROWS = 4, 6
BETA, SMOOTHING, DESIRABLE, UNDESIRABLE = 0.3, 0.1, 1.3, 0.7
LOSSES = ("sft", "dpo", "cdpo", "rm", "rm with margin", "kto")


def lines(seed: int, count: int, least: int, most: int) -> list[str]:
    """Return lines of random words, each of ``least`` to ``most``."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def below(end: int, size: int) -> list[int]:
        return torch.randint(end, (size,), generator=generator).tolist()

    def word() -> str:
        return "".join("abcdefgh"[letter] for letter in below(8, 4))

    return [" ".join(word() for _ in range(least + more)) for more in below(most + 1 - least, count)]


def rows(loss: str) -> list[dict]:
    """Return the rows of all batches of a loss, in the peer's standard formats."""
    seed, count = 3 * LOSSES.index(loss), BATCHES * ROWS
    prompts, firsts, seconds = lines(seed, count, 2, 9), lines(seed + 1, count, 1, 12), lines(seed + 2, count, 1, 12)
    found = []
    for number, (prompt, first, second) in enumerate(zip(prompts, firsts, seconds, strict=True)):
        if loss == "sft":
            found.append({"prompt": prompt, "completion": f" {first}"})
        elif loss == "kto":
            found.append({"prompt": prompt, "completion": f" {first}", "label": number % 3 > 0})
        else:
            margin = {"margin": number / count} if "margin" in loss else {}
            found.append({"prompt": prompt, "chosen": f" {first}", "rejected": f" {second}", **margin})
    return found


def write_models(folder: Path) -> None:
    """Write policy, reference and reward model: random weights, far enough from each other to tell losses apart."""
    import torch
    from model import train_tokenizer
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

    tokenizer = train_tokenizer(lines(0, 50, 20, 40))
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": tokenizer.pad_token_id}
    config = partial(Qwen2Config, **shape, **heads, initializer_range=0.15, bos_token_id=None)
    builders = {"policy": Qwen2ForCausalLM, "reference": Qwen2ForCausalLM, "reward": Qwen2ForSequenceClassification}
    for seed, (name, builder) in enumerate(builders.items()):
        torch.manual_seed(seed)
        labels = {"num_labels": 1} if name == "reward" else {}
        builder(config(**labels)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run_peer(folder: Path) -> None:
    """Compute the peer's losses and write them down with the batches."""
    import torch
    import transformers
    import trl

    found = {loss: list(peer_losses(loss, folder)) for loss in LOSSES}
    versions = {library.__name__: library.__version__ for library in (trl, transformers, torch)}
    (folder / "peer.json").write_text(json.dumps({"versions": versions, "losses": found}))


def peer_losses(loss: str, folder: Path) -> Iterator[dict]:
    """Yield each batch of the peer's trainer with its loss."""
    import torch

    trainer = peer_trainer(loss, folder)
    trainer.model.eval()

    @torch.no_grad()
    def loss_of(batch: dict) -> float:
        return float(trainer.compute_loss(trainer.model, dict(batch)))

    for batch in trainer.get_train_dataloader():
        value = loss_of(batch)
        if loss == "cdpo":
            flipped = {name: torch.cat(tensor.chunk(2)[::-1]) for name, tensor in batch.items()}
            value = (1 - SMOOTHING) * value + SMOOTHING * loss_of(flipped)
        tensors = {name: tensor.tolist() for name, tensor in batch.items() if torch.is_tensor(tensor)}
        yield {"batch": tensors, "loss": value}


def peer_trainer(loss: str, folder: Path):
    """Return the peer's trainer for a loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    common = {"output_dir": str(folder / "out"), "per_device_train_batch_size": ROWS, "use_cpu": True, "bf16": False}
    common |= {"report_to": [], "max_length": None, "disable_tqdm": True}
    data = {"train_dataset": Dataset.from_list(rows(loss))}
    if loss == "sft":
        return SFTTrainer(str(folder / "policy"), SFTConfig(**common), **data)
    if loss.startswith("rm"):
        return RewardTrainer(str(folder / "reward"), RewardConfig(**common), **data)
    reference = AutoModelForCausalLM.from_pretrained(folder / "reference")
    if loss == "kto":
        weights = {"desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE}
        return KTOTrainer(str(folder / "policy"), reference, KTOConfig(**common, beta=BETA, **weights), **data)
    return DPOTrainer(str(folder / "policy"), reference, DPOConfig(**common, beta=BETA), **data)


def our_trainer(loss: str, folder: Path):
    """Return our trainer for a loss, and its reference; it is given batches, so it has no data."""
    from openrlhf.config.groups import BatchConfig, DeepSpeedConfig, ModelConfig, OptimConfig
    from openrlhf.models.actor import Actor
    from openrlhf.models.loading import load_causal_lm, load_value_model
    from openrlhf.models.value_head import ValueModel
    from openrlhf.ops.preference_loss import dpo_loss
    from openrlhf.strategy.deepspeed import DeepSpeedStrategy
    from openrlhf.trainer.dpo import DPOTrainer
    from openrlhf.trainer.frozen import answer_log_probs
    from openrlhf.trainer.kto import KTOTrainer
    from openrlhf.trainer.reward_model import RewardModelTrainer
    from openrlhf.trainer.sft import SFTTrainer

    strategy = DeepSpeedStrategy(DeepSpeedConfig(zero_stage=0))
    strategy.setup_distributed()
    if loss.startswith("rm"):
        module = ValueModel(load_value_model(str(folder / "reward"), ModelConfig()), read="last")
    else:
        module = Actor(load_causal_lm(str(folder / "policy"), ModelConfig()))
    engine = strategy.prepare_train(module, OptimConfig(), 1)
    common = engine, strategy, [None], [], BatchConfig()
    if loss == "sft":
        return SFTTrainer(*common), None
    if loss.startswith("rm"):
        return RewardModelTrainer(*common, margin_loss=True), None
    frozen = strategy.prepare_eval(Actor(load_causal_lm(str(folder / "reference"), ModelConfig())))
    reference = partial(answer_log_probs, frozen)
    if loss == "kto":
        weights = {"desirable_weight": DESIRABLE, "undesirable_weight": UNDESIRABLE}
        return KTOTrainer(*common, reference=reference, beta=BETA, **weights), reference
    smoothing = SMOOTHING if loss == "cdpo" else 0.0
    pair_loss = partial(dpo_loss, beta=BETA, label_smoothing=smoothing)
    return DPOTrainer(*common, pair_loss=pair_loss, beta=BETA, reference=reference), reference


def our_losses(loss: str, folder: Path, batches: list[dict]) -> Iterator[float]:
    """Yield our loss of each batch of the peer."""
    import torch

    trainer, reference = our_trainer(loss, folder)
    trainer.engine.eval()
    with torch.no_grad():
        for given in batches:
            batch = our_batch(given)
            if loss == "kto":
                trainer.drift = mismatched_drift(trainer.engine, reference, given)
            yield float(trainer.compute_loss(batch).loss_sum / trainer.weight(batch))


def our_batch(given: dict):
    """Return a batch of the peer as ours: column t of the loss mask speaks of token t + 1."""
    import torch

    from openrlhf.datasets.batch import PreferenceBatch, TokenBatch, UnpairedBatch

    tensors = {name: torch.tensor(values) for name, values in given.items()}
    sequences, real = tensors["input_ids"], tensors["attention_mask"].bool()
    if "labels" in tensors:
        return TokenBatch(sequences, real, tensors["labels"][:, 1:] != -100)
    trained = tensors["completion_mask"][:, 1:].bool() if "completion_mask" in tensors else real[:, 1:]
    if "label" in tensors:
        return UnpairedBatch(sequences, real, trained, tensors["label"].bool())
    margin = tensors.get("margin", torch.zeros(len(sequences) // 2))
    return PreferenceBatch(sequences, real, trained, margin)


def mismatched_drift(policy, reference, given: dict):
    """Return the KL term of the peer's own mismatched rows: the mean of their log-ratios, not below 0."""
    from openrlhf.trainer.frozen import answer_log_probs

    prefix = "KL_"
    own = {name.removeprefix(prefix): values for name, values in given.items() if name.startswith(prefix)}
    batch = our_batch({**own, "label": given["label"]})
    log_ratios = answer_log_probs(policy, batch) - reference(batch)
    return log_ratios.mean().clamp(min=0)


def compare(peer_python: str, folder: Path) -> dict:
    """Run the peer, then ours; return the versions of the peer and, by loss, the figures."""
    write_models(folder)
    command = [peer_python, str(Path(__file__).resolve()), "--peer", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    peer = json.loads((folder / "peer.json").read_text())
    figures = {}
    for loss, found in peer["losses"].items():
        theirs = [entry["loss"] for entry in found]
        ours = list(our_losses(loss, folder, [entry["batch"] for entry in found]))
        difference = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
        figures[loss] = {"ours": ours, "peer": theirs, "largest difference": difference}
    return {"versions": peer["versions"], "losses": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = parser.add_mutually_exclusive_group(required=True)
    sides.add_argument("--peer-python")
    sides.add_argument("--peer", type=Path, metavar="FOLDER", help="be the peer's side")
    parser.add_argument("--out", type=Path, help="write all figures to this JSON file")
    arguments = parser.parse_args()
    if arguments.peer:
        return run_peer(arguments.peer)
    with tempfile.TemporaryDirectory() as folder:
        result = compare(arguments.peer_python, Path(folder))
    print("  ".join(f"{library} {version}" for library, version in result["versions"].items()))
    for loss, figures in result["losses"].items():
        values = "  ".join(f"{value:.6f}" for value in figures["ours"])
        print(f"{loss:16} largest difference {figures['largest difference']:.1e}   ours: {values}")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if any(figures["largest difference"] > TOLERANCE for figures in result["losses"].values()):
        raise SystemExit(f"a loss differs by more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
