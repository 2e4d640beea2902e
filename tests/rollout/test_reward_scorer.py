"""A reward model that reads texts, against transformers' own classifier on each text alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from openrlhf.config.serve import ServeConfig
from openrlhf.errors import DataError
from openrlhf.rollout.reward_scorer import RewardScorer
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import tiny_reward_model

END, PAD = "<|im_end|>", "<|pad|>"
TEXTS = [
    "How many clips?",
    "",
    f"<|im_start|>user\nA robot{END}\n<|im_start|>assistant\nIt is 42.{END}",
    "Natalia sold clips to 48 of her friends in April, " * 6,
    "é ü 漢字 🙂",
    "x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder of a tiny reward model."""
    return tiny_reward_model(tmp_path_factory.mktemp("rm") / "rm", mean=0.01, std=0.02)


@pytest.fixture(scope="module")
def expected(folder):
    """Return a function that gives the reward of a text, without its end token, by transformers' own forward."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def reward(text: str, max_len: int = 2048) -> float:
        tokens = tokenizer(text, add_special_tokens=False).input_ids[: max_len - 1]
        return float(model(input_ids=torch.tensor([[*tokens, tokenizer.eos_token_id]])).logits[0, 0])

    return reward


def test_a_text_has_one_reward_alone_and_among_others(folder, expected):
    scorer = RewardScorer(ServeConfig(reward_pretrain=folder, batch_size=4))
    alone = [scorer([text])[0] for text in TEXTS]
    assert alone == pytest.approx([expected(text.removesuffix(END)) for text in TEXTS], abs=1e-5)
    assert scorer(TEXTS) == pytest.approx(alone, abs=1e-5)
    assert scorer(TEXTS[::-1] * 3) == pytest.approx(alone[::-1] * 3, abs=1e-5)
    assert len({round(reward, 4) for reward in alone}) == len(TEXTS)


@pytest.mark.parametrize("around", ["{}" + END, PAD * 3 + "{}" + END + PAD * 2, END + "{}", "{}" + END * 3])
def test_padding_and_end_tokens_around_a_text_do_not_count(folder, expected, around):
    scorer = RewardScorer(ServeConfig(reward_pretrain=folder))
    assert scorer([around.format("a b")]) == pytest.approx(scorer(["a b"]), abs=1e-6)
    inside = f"a{END}b"
    assert scorer([around.format(inside)]) == pytest.approx([expected(inside)], abs=1e-5)


def test_the_end_token_stays_when_a_text_is_cut(folder, expected):
    scorer = RewardScorer(ServeConfig(reward_pretrain=folder, max_len=9))
    text = "Natalia sold clips to 48 of her friends in April"
    assert len(scorer.tokenizer(text).input_ids) > 12
    assert scorer([text]) == pytest.approx([expected(text, 9)], abs=1e-5)


def test_rewards_are_normalised_on_request(folder):
    plain = RewardScorer(ServeConfig(reward_pretrain=folder))(TEXTS)
    normal = RewardScorer(ServeConfig(reward_pretrain=folder, normalize_reward=True))(TEXTS)
    assert normal == pytest.approx([(reward - 0.01) / 0.02 for reward in plain], abs=1e-3)


def test_a_language_model_is_no_reward_model(tmp_path):
    with pytest.raises(DataError, match="--reward_pretrain .*head"):
        RewardScorer(ServeConfig(reward_pretrain=tiny_folder(tmp_path / "lm")))
