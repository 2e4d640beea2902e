"""Sources of rewards that work together."""

from __future__ import annotations

from dataclasses import replace

import pytest

from openrlhf.config.plan import plan_lines
from openrlhf.config.ppo import PPOConfig, PPOModelConfig, RewardConfig
from openrlhf.errors import DataError, NumericError
from openrlhf.rollout.rewards import reward_source
from tests.rollout import fake_reward_server as fake
from tests.rollout.fake_reward_server import FakeRewardServer, reward_of

QUERIES = ["one", "two!", "three"]
LENGTHS = (
    "def reward_func(queries, prompts, labels):\n"
    "    lengths = [len(query) for query in queries]\n"
    "    return {'rewards': lengths, 'scores': [1, 0, 1], 'extra_logs': {'length': lengths}}\n"
)


@pytest.fixture
def lengths(tmp_path):
    """Return the path of a file that rewards length."""
    (tmp_path / "lengths.py").write_text(LENGTHS)
    return str(tmp_path / "lengths.py")


def run_with(**reward) -> PPOConfig:
    return PPOConfig(reward=RewardConfig(**reward))


def score(config: PPOConfig):
    return reward_source(config).score(QUERIES, QUERIES, ["", "", ""])


def test_without_an_address_there_is_no_source():
    assert reward_source(PPOConfig()) is None


def test_files_and_servers_are_added_up_with_their_weights(lengths):
    with FakeRewardServer(fake.good) as one, FakeRewardServer(fake.rewards(lambda right: [8.0] * 3)) as other:
        urls = f"{one.url}, {lengths},{other.url}"
        plain = score(run_with(remote_rm_url=urls))
        weighted = score(run_with(remote_rm_url=urls, reward_weights="2,-1,0.5"))
    assert plain.rewards == [len(query) + reward_of(query) + 8 for query in QUERIES]
    assert weighted.rewards == [2 * len(query) - reward_of(query) + 4 for query in QUERIES]
    assert plain.extra["reward_source_1"] == plain.extra["length"] == [3.0, 4.0, 5.0]
    assert plain.extra["reward_source_2"] == [reward_of(query) for query in QUERIES]
    assert plain.extra["scores"] == [1.0, 0.0, 1.0] and plain.extra["reward_source_3"] == [8.0] * 3


def test_logs_of_one_name_are_kept_apart(lengths, tmp_path):
    (tmp_path / "other.py").write_text(LENGTHS.replace("[1, 0, 1]", "[0, 0, 0]"))
    found = score(run_with(remote_rm_url=f"{lengths},{tmp_path / 'other.py'}"))
    assert found.extra["scores"] == [1.0, 0.0, 1.0] and found.extra["scores_2"] == [0.0, 0.0, 0.0]
    assert found.rewards == [6.0, 8.0, 10.0]


def test_replicas_are_one_source_with_one_weight():
    with FakeRewardServer(fake.good) as one, FakeRewardServer(fake.good) as other:
        reward = {"remote_rm_url": f"{one.url},{other.url}", "remote_rm_mode": "replicas", "reward_weights": "3"}
        config = run_with(**reward)
        assert score(config).rewards == [3 * reward_of(query) for query in QUERIES]
        assert len(one.requests) + len(other.requests) == 1
        config = replace(config, rollout=replace(config.rollout, micro_rollout_batch_size=1))
        assert score(config).rewards == [3 * reward_of(query) for query in QUERIES]
        assert len(one.requests) + len(other.requests) == 4


def test_a_source_alone_logs_only_what_it_says(lengths):
    assert set(score(run_with(remote_rm_url=lengths)).extra) == {"scores", "length"}


def test_one_bad_source_spoils_the_whole_answer(lengths):
    for mode, error in ((fake.body("{}"), DataError), (fake.rewards(lambda right: [float("nan")] * 3), NumericError)):
        with FakeRewardServer(mode) as server, pytest.raises(error, match=server.url):
            score(run_with(remote_rm_url=f"{lengths},{server.url}"))


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    (tmp_path / "key").write_text(" from-a-file\n")
    monkeypatch.setenv("MY_KEY", "from-the-environment")
    with FakeRewardServer(fake.good) as server:
        for where in (str(tmp_path / "key"), "MY_KEY"):
            score(run_with(remote_rm_url=server.url, remote_rm_key=where))
    sent = [headers["Authorization"] for headers in server.headers]
    assert sent == ["Bearer from-a-file", "Bearer from-the-environment"]


def test_the_plan_names_every_source_with_its_weight(lengths):
    reward = RewardConfig(remote_rm_url=f"http://h/,{lengths},http://i/")
    config = PPOConfig(model=PPOModelConfig(reward_pretrain="a"), reward=reward)
    assert f"  reward: a + {lengths} + http://h/ + http://i/" in plan_lines(config, 1)
    reward = replace(reward, remote_rm_mode="replicas", reward_weights="1,2,0.5")
    lines = plan_lines(replace(config, reward=reward), 1)
    assert f"  reward: 1 x a + 2 x {lengths} + 0.5 x http://h/ | http://i/" in lines


def test_weights_go_to_models_then_files_then_servers(lengths):
    reward = RewardConfig(remote_rm_url=f"http://h/,{lengths},http://i/", reward_weights="1,2,3,4,5")
    config = PPOConfig(model=PPOModelConfig(reward_pretrain="a,b"), reward=reward)
    assert config.reward_weights == ([1.0, 2.0], [3.0, 4.0, 5.0])
    for weights in ("1,2,3,4", "1,2,3,4,5,6"):
        with pytest.raises(ValueError, match="one finite weight for each of the 5 sources"):
            replace(reward, reward_weights=weights).weights(2)
