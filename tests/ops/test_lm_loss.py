"""Losses over tokens: next token, a teacher's distribution, the labels of steps."""

import math

import pytest
import torch

from openrlhf.ops.lm_loss import distillation_loss, next_token_loss, process_reward_loss

LOGITS = torch.randn(5, 11, generator=torch.Generator().manual_seed(3))
REWARD_IDS = torch.tensor([7, 2, 9])


def test_the_next_token_loss_equals_cross_entropy_over_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 5, 11, generator=generator), torch.randint(0, 11, (3, 5), generator=generator)
    mask = torch.rand(3, 5, generator=generator) < 0.5
    labels = targets.masked_fill(~mask, -100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    log_probs = torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(next_token_loss(log_probs, mask), expected)


def test_padding_never_counts_whatever_it_holds():
    log_probs, mask = torch.tensor([[-1.0, -2.0, math.nan]]), torch.tensor([[True, True, False]])
    log_probs.requires_grad_()
    loss = next_token_loss(log_probs, mask)
    loss.backward()
    assert loss.item() == 3.0
    assert log_probs.grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_the_distillation_loss_is_the_sum_over_the_tokens_that_count():
    cross_entropy, mask = torch.tensor([[1.0, 2.0, math.nan]]), torch.tensor([[True, True, False]])
    assert distillation_loss(cross_entropy, mask).item() == 3.0


def test_a_step_may_be_labelled_with_any_token():
    labels = torch.tensor([3, 0, 10, int(LOGITS[3].argmax()), 5])
    log_probs = LOGITS.double() - LOGITS.double().exp().sum(-1, keepdim=True).log()
    loss, right = process_reward_loss(LOGITS, labels)
    assert loss.item() == pytest.approx(-sum(log_probs[i, label].item() for i, label in enumerate(labels)), abs=1e-5)
    assert right == (LOGITS.argmax(-1) == labels).sum() and right >= 1


def test_reward_tokens_are_the_only_ones_that_compete():
    labels = torch.tensor([2, 7, 9, 9, 2])
    expected, right = 0.0, 0
    for row, label in zip(LOGITS.double().tolist(), labels.tolist()):
        weights = {token: math.exp(row[token]) for token in REWARD_IDS.tolist()}
        expected -= math.log(weights[label] / sum(weights.values()))
        right += max(weights, key=weights.get) == label
    loss, judged_right = process_reward_loss(LOGITS, labels, REWARD_IDS)
    assert loss.item() == pytest.approx(expected, abs=1e-5) and judged_right == right


def test_a_soft_label_is_the_probability_of_the_first_reward_token():
    labels, tokens = torch.tensor([0.9, 0.2, 1.0, 0.0, 0.6]), REWARD_IDS[:2]
    expected, right = 0.0, 0
    for row, label in zip(LOGITS.double().tolist(), labels.tolist()):
        positive = 1 / (1 + math.exp(row[2] - row[7]))
        expected -= label * math.log(positive) + (1 - label) * math.log(1 - positive)
        right += (positive > 0.5) == (label > 0.5)
    loss, judged_right = process_reward_loss(LOGITS, labels, tokens)
    assert loss.item() == pytest.approx(expected, abs=1e-5) and judged_right == right


def test_certain_soft_labels_are_hard_labels():
    labels = torch.tensor([7, 2, 2, 7, 7])
    hard = process_reward_loss(LOGITS, labels, REWARD_IDS[:2])
    soft = process_reward_loss(LOGITS, (labels == 7).float(), REWARD_IDS[:2])
    torch.testing.assert_close(hard, soft)


@pytest.mark.parametrize("labels", [torch.zeros(0, dtype=torch.int64), torch.zeros(0)])
def test_no_steps_cost_nothing(labels):
    logits = torch.zeros(0, 11, requires_grad=True)
    loss, right = process_reward_loss(logits, labels, REWARD_IDS[:2])
    loss.backward()
    assert loss == 0 and right == 0
