"""Text of every kind, from a file to tokens and back, and into the samples that a run writes."""

from __future__ import annotations

import json

from openrlhf.config.ppo import PromptDataConfig
from openrlhf.datasets.blending import load_mixture
from openrlhf.datasets.prompts import PromptDataset
from openrlhf.rollout.types import Rollout
from openrlhf.trainer.ppo.sample_log import SampleLog, Scored

TEXTS = [
    "plain",
    "emoji 🙂👩‍👩‍👧",
    "שלום עולם",
    "مرحبا\u200f",
    "zero\u200bwidth",
    "\ufeffmark inside",
    "line\r\nbreak",
    "tab\t",
    "nul\x00inside",
    "  spaces  kept  ",
    "combining e\u0301",
    "中文和日本語",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    'quote " and \\ back',
    "\u2028separator\u2029",
    "{braces} {}",
    "<b>tag</b>",
    "\x7f\x1b[0m",
    "ｆｕｌｌｗｉｄｔｈ",
    "🇩🇪 flag",
]


def test_texts_of_every_kind_come_through_file_tokens_and_samples_unchanged(chatml, tmp_path):
    path = tmp_path / "rows.jsonl"
    for ascii_only in (True, False):
        lines = [json.dumps({"input": text}, ensure_ascii=ascii_only) for text in TEXTS]
        path.write_bytes("".join(f"{line}\r\n" for line in lines).encode("utf-8-sig"))
        rows = load_mixture(
            str(path), None, split="train", max_samples=99, seed=1, stopping="x", required={"input": "--input_key"}
        )
        prompts = list(PromptDataset(rows, chatml, PromptDataConfig(prompt_data="d"), 999))
        assert [prompt.text for prompt in prompts] == TEXTS
        assert [chatml.decode(prompt.token_ids) for prompt in prompts] == TEXTS
    rollouts = [Rollout(p, p.token_ids, ((0, 1),), (0.0,), "stop", 0, 0) for p in prompts]
    SampleLog(tmp_path / "samples.jsonl", chatml).write("train", 1, Scored(rollouts, [0.0] * 20, samples=20))
    written = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["prompt"] for line in written] == TEXTS
