"""Ranks that share sequences in PPO report what one rank alone reports."""

from __future__ import annotations

import json

import pytest

from tests.helpers import tiny_folder
from tests.strategy.ranks import run_ranks
from tests.trainer.ppo.harness import reward_file, tiny_reward_model
from tests.trainer.ppo.ring_programs import reported


@pytest.mark.parametrize("ways", [[[2, 0], [2, 30]]])
def test_two_ranks_that_share_sequences_score_learn_and_generate_as_one(tmp_path, ways):
    for name, seed in (("policy", 0), ("prm", 1)):
        tiny_folder(tmp_path / name, seed=seed)
    tiny_reward_model(tmp_path / "reward")
    reward_file(tmp_path)
    texts = [f"Natalia sold {number} clips" + " in May" * number for number in range(4)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = reported(str(tmp_path), 1, 0)
    found = run_ranks("tests.trainer.ppo.ring_programs:reported_each_way", 2, folder=str(tmp_path), ways=ways)
    for way, first, second in zip(ways, *found, strict=True):
        for ours, theirs in zip(first["returns"] + second["returns"], expected["returns"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), way
        assert sorted(first["sampled"] + second["sampled"]) == sorted(expected["sampled"])
        for rank in (first, second):
            for ours, theirs in zip(rank["learned"], expected["learned"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5), way
