"""Our side of the comparison of losses with a peer's runs on batches of the peer's form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def peer_batch(loss: str) -> dict:
    """Return four rows of eight tokens, the last of them padding in the first row, prompts of three."""
    tokens = torch.randint(3, 200, (4, 8), generator=torch.Generator().manual_seed(0))
    real = torch.ones(4, 8, dtype=torch.int64)
    real[0, -1] = 0
    answer = real * (torch.arange(8) >= 3)
    batch = {"input_ids": tokens.tolist(), "attention_mask": real.tolist()}
    if loss == "sft":
        return {**batch, "labels": torch.where(answer.bool(), tokens, -100).tolist()}
    batch |= {"margin": [0.5, 0.1]} if "margin" in loss else {}
    batch |= {} if loss.startswith("rm") else {"completion_mask": answer.tolist()}
    if loss == "kto":
        batch |= {f"KL_{name}": values[1:] + values[:1] for name, values in batch.items()}
        batch |= {"label": [True, False, True, True]}
    return batch


@pytest.fixture(scope="module")
def parity():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import parity_trl

        yield parity_trl


@pytest.fixture(scope="module")
def folder(parity, tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    parity.write_models(path)
    return path


def test_our_losses_of_a_peers_batches(parity, folder):
    found = {loss: next(parity.our_losses(loss, folder, [peer_batch(loss)])) for loss in parity.LOSSES}
    assert all(value > 0 for value in found.values())
    assert found["rm with margin"] > found["rm"] and found["cdpo"] != found["dpo"]


def test_our_sft_loss_of_a_peers_batch_is_that_of_transformers(parity, folder):
    from transformers import AutoModelForCausalLM

    batch = peer_batch("sft")
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    with torch.no_grad():
        expected = model(**{name: torch.tensor(values) for name, values in batch.items()}).loss
    assert next(parity.our_losses("sft", folder, [batch])) == pytest.approx(float(expected), abs=1e-5)
