"""The list of advantage estimators."""

from __future__ import annotations

import pytest

from openrlhf.config.algorithms import ESTIMATORS
from openrlhf.config.flags import flag_table
from openrlhf.config.ppo import PPOConfig


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_baseline_of_an_estimator_exists(name):
    assert callable(ESTIMATORS[name].load_baseline())


def test_only_gae_needs_a_critic_and_only_rloo_a_group():
    assert [name for name, facts in ESTIMATORS.items() if facts.needs_critic] == ["gae"]
    assert [name for name, facts in ESTIMATORS.items() if facts.needs_group] == ["rloo"]


def test_the_flag_offers_exactly_the_list():
    assert flag_table(PPOConfig)["advantage_estimator"].metadata["choices"] == tuple(ESTIMATORS)
