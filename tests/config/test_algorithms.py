"""The list of advantage estimators."""

from __future__ import annotations

import pytest

from openrlhf.config.algorithms import ESTIMATORS, POLICY_LOSSES
from openrlhf.config.flags import flag_table
from openrlhf.config.ppo import AlgorithmConfig, PPOConfig


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_baseline_of_an_estimator_exists_and_names_its_paper(name):
    assert "https://" in ESTIMATORS[name].load_baseline().__doc__


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_function_of_a_policy_loss_exists_and_names_its_paper(name):
    assert "https://" in POLICY_LOSSES[name].load().__doc__


def test_the_estimators_differ_in_what_they_need():
    def those(fact):
        return [name for name, facts in ESTIMATORS.items() if getattr(facts, fact)]

    assert those("needs_critic") == ["gae"]
    assert those("needs_group") == ["reinforce_baseline", "rloo", "group_norm", "dr_grpo"]
    assert those("needs_greedy") == ["remax"]
    assert those("whiten") == ["gae", "reinforce", "reinforce_baseline", "rloo"]
    assert those("of_whole_answers") == [*those("needs_group"), *those("needs_greedy")]


def test_the_flags_offer_exactly_the_lists():
    flags = flag_table(PPOConfig)
    assert flags["advantage_estimator"].metadata["choices"] == tuple(ESTIMATORS)
    assert flags["policy_loss_type"].metadata["choices"] == tuple(POLICY_LOSSES)


@pytest.mark.parametrize(("name", "discount"), [("gae", 0.9), ("reinforce", 0.9), ("rloo", 1.0), ("remax", 1.0)])
def test_what_compares_whole_answers_has_no_discount(name, discount):
    assert AlgorithmConfig(advantage_estimator=name, gamma=0.9).discount == discount


def test_a_loss_of_sequences_is_a_mean_over_sequences_and_the_others_are_as_the_flag_says():
    assert AlgorithmConfig(policy_loss_type="gspo").policy_reduction == "sequence"
    assert AlgorithmConfig(policy_loss_type="gspo").loss_reduction == "token"
    assert AlgorithmConfig(loss_reduction="sequence").policy_reduction == "sequence"
    assert AlgorithmConfig().clip_range == (0.2, 0.2)
    assert AlgorithmConfig(eps_clip_low_high=(0.1, 0.3)).clip_range == (0.1, 0.3)


@pytest.mark.parametrize(("given", "used"), [((0.5, 5.0), (0.5, 5.0)), ((2.0,), (0.0, 2.0))])
def test_one_threshold_of_the_correction_is_a_cap(given, used):
    assert AlgorithmConfig(vllm_is_truncated_threshold=given).correction_range == used
