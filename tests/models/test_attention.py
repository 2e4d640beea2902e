import pytest
import torch
import torch.nn.functional as F

from openrlhf.models.attention import (
    REFUSED,
    UNPADDED,
    UnpaddedAttentionError,
    plan_mask,
    register,
    switch_attention,
    takes,
    unpadded_attention,
)
from openrlhf.models.packing import Rows
from tests.helpers import tiny_causal_lm

LENGTHS = (5, 9, 1)
ROWS = Rows(LENGTHS, torch.tensor([0, 5, 14, 15], dtype=torch.int32))


@pytest.fixture
def heads():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 8, generator=generator)
    key, value = torch.randn(2, 1, 2, sum(LENGTHS), 8, generator=generator)
    return query, key, value


def by_hand(query, key, value, *, window=0, softcap=None, sinks=None, scale=8**-0.5):
    outputs = []
    for q, k, v in zip(*(x.split(LENGTHS, dim=2) for x in (query, key, value)), strict=True):
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.transpose(2, 3) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        hidden = (distance < 0) | (distance >= window if window else torch.zeros_like(distance, dtype=torch.bool))
        scores = scores.masked_fill(hidden, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], -1)
        outputs.append((torch.softmax(scores, -1)[..., : q.shape[2]] @ v).transpose(1, 2))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("window", [0, 3, 9, 100])
def test_each_sequence_sees_itself_only_within_its_window(heads, window):
    output, _ = unpadded_attention(None, *heads, window, unpadded=ROWS)
    torch.testing.assert_close(output, by_hand(*heads, window=window))


def test_scaling_softcap_and_sinks_are_applied(heads):
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    output, _ = unpadded_attention(None, *heads, 3, scaling=0.7, softcap=2.0, s_aux=sinks, unpadded=ROWS)
    torch.testing.assert_close(output, by_hand(*heads, window=3, softcap=2.0, sinks=sinks, scale=0.7))


def test_gradients_equal_those_by_hand(heads):
    ours = [x.clone().requires_grad_() for x in heads]
    theirs = [x.clone().requires_grad_() for x in heads]
    unpadded_attention(None, *ours, 3, unpadded=ROWS)[0].square().sum().backward()
    by_hand(*theirs, window=3).square().sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_dropout_is_applied(heads):
    torch.manual_seed(0)
    assert not torch.allclose(unpadded_attention(None, *heads, 0, dropout=0.5, unpadded=ROWS)[0], by_hand(*heads))


def test_a_keyword_that_is_not_known_is_refused(heads):
    with pytest.raises(UnpaddedAttentionError, match="position_bias"):
        unpadded_attention(None, *heads, 0, unpadded=ROWS, position_bias=torch.zeros(1), position_ids=torch.zeros(1))


def test_missing_lengths_are_refused(heads):
    with pytest.raises(UnpaddedAttentionError, match="lengths"):
        unpadded_attention(None, *heads, 0)


def test_a_tensor_mask_is_refused(heads):
    with pytest.raises(UnpaddedAttentionError):
        unpadded_attention(None, *heads, torch.ones(1, 1, 15, 15), unpadded=ROWS)


def test_the_plan_of_a_causal_mask_is_0_and_of_a_window_its_size():
    assert plan_mask(mask_function=lambda b, h, q, k: k <= q) == 0
    for size in (1, 2, 4096):
        assert (
            plan_mask(mask_function=lambda b, h, q, k, size=size: (k <= q) & (k > q - size), local_size=size) == size
        )


def test_chunks_and_bidirectional_masks_are_refused():
    assert plan_mask(mask_function=lambda b, h, q, k: q >= 0) == REFUSED
    assert plan_mask(mask_function=lambda b, h, q, k: (k <= q) & (k // 8 == q // 8), local_size=8) == REFUSED


def test_a_model_hands_the_lengths_down_and_takes_the_function():
    register()
    model = tiny_causal_lm(None, "llama")
    assert switch_attention(model, UNPADDED)
    assert model.config._attn_implementation == UNPADDED
    assert switch_attention(model, "sdpa")
    assert not switch_attention(tiny_causal_lm(None, "bloom"), UNPADDED)


def test_the_saved_config_does_not_name_our_attention(tmp_path):
    register()
    model = tiny_causal_lm(None, "llama")
    switch_attention(model, UNPADDED)
    model.save_pretrained(tmp_path)
    assert UNPADDED not in (tmp_path / "config.json").read_text()


def test_sdpa_without_a_mask_is_what_runs_for_plain_sequences(heads, monkeypatch):
    masks = []
    plain = F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        masks.append(kwargs.get("attn_mask"))
        return plain(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    unpadded_attention(None, *heads, 0, unpadded=ROWS)
    assert masks == [None] * len(LENGTHS)


def test_a_kernel_is_taken_only_when_it_has_every_parameter_that_is_passed():
    def older(query, key, value, starts, *, scale=None, is_causal=False): ...

    assert takes(older, "scale", "is_causal")
    assert not takes(older, "scale", "window_size", "enable_gqa")
