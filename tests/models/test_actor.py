import copy

import pytest
import torch

from openrlhf.errors import UsageError
from openrlhf.models.actor import Actor
from openrlhf.models.attention import UNPADDED
from openrlhf.models.backbone import enable_gradient_checkpointing, tell_padding
from tests.helpers import tiny_causal_lm

EXACT = [
    ("qwen2", {}),
    ("qwen3", {}),
    ("llama", {}),
    ("llama", {"tied": False}),
    ("gpt2", {}),
    ("mistral", {}),
    ("phi", {}),
    ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}),
    ("gemma2", {}),
    ("cohere", {}),
    ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 4}),
]
NAMES = [f"{arch}-{'tied' if options.get('tied', True) else 'untied'}" for arch, options in EXACT]


def batch(rows=3, width=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sequences = torch.randint(3, 320, (rows, width), generator=generator)
    lengths = torch.tensor([width, 6, 2][:rows])
    mask = torch.arange(width) < lengths[:, None]
    return sequences.masked_fill(~mask, 0), mask


def naive_log_probs(model, sequences, mask, temperature=1.0):
    """Return (B, T) from plain forwards of each sequence alone, without any of our code."""
    model.set_attn_implementation("eager")
    rows = []
    for row, real in zip(sequences, mask, strict=True):
        length = int(real.sum())
        logits = model(row[None, :length], use_cache=False).logits[0].float() / temperature
        log_probs = torch.log_softmax(logits, -1)[:-1].gather(-1, row[1:length, None]).squeeze(-1)
        rows.append(torch.nn.functional.pad(log_probs, (0, len(row) - length)))
    return torch.stack(rows)


@pytest.mark.parametrize(("arch", "options"), EXACT, ids=NAMES)
def test_packed_log_probs_and_gradients_equal_each_sequence_alone(arch, options):
    model = tiny_causal_lm(None, arch, **options)
    twin = copy.deepcopy(model)
    actor = Actor(model)
    sequences, mask = batch()
    weights = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    output = actor(sequences, mask, temperature=0.7).log_probs
    expected = naive_log_probs(twin, sequences, mask, 0.7)
    assert actor.packed
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(("arch", "options"), EXACT, ids=NAMES)
def test_a_prompt_computed_once_for_several_answers_gives_what_each_gives_alone(arch, options):
    model = tiny_causal_lm(None, arch, **options)
    twin = copy.deepcopy(model)
    actor = Actor(model)
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(3, 320, (4, 30), generator=generator)
    sequences[1, :16], sequences[2, :25], sequences[3, :28] = sequences[0, :16], sequences[0, :25], sequences[2, :28]
    mask = torch.arange(30) < torch.tensor([30, 28, 30, 27])[:, None]
    weights = torch.randn(4, 29, generator=generator)
    output = actor(sequences, mask).log_probs
    expected = naive_log_probs(twin, sequences, mask)
    assert actor.merges and sum(actor.inputs(sequences, mask).rows.lengths) == 47
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("arch", ["bloom", "falcon", "mamba"])
def test_an_architecture_that_cannot_be_packed_is_padded_and_exact(arch):
    model = tiny_causal_lm(None, arch)
    twin = copy.deepcopy(model)
    actor = Actor(model)
    sequences, mask = batch()
    torch.testing.assert_close(
        actor(sequences, mask).log_probs, naive_log_probs(twin, sequences, mask), atol=1e-5, rtol=1e-5
    )
    assert not actor.packed
    assert actor.reason
    assert model.config._attn_implementation != UNPADDED


def test_packing_samples_names_the_architecture_that_cannot():
    with pytest.raises(UsageError, match=r"--packing_samples: bloom \(BloomForCausalLM\)"):
        Actor(tiny_causal_lm(None, "bloom"), packing_samples=True).verify()


def test_padded_and_packed_forwards_agree():
    actor = Actor(tiny_causal_lm(None, "mistral"))
    sequences, mask = batch()
    packed = actor(sequences, mask).log_probs
    actor.packed = False
    actor.model.set_attn_implementation("sdpa")
    torch.testing.assert_close(actor(sequences, mask).log_probs, packed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "bloom"])
def test_logits_and_the_cross_entropy_with_a_teacher_are_those_of_each_sequence_alone(arch):
    model, teacher = tiny_causal_lm(None, arch), tiny_causal_lm(None, "llama", seed=3)
    sequences, mask = batch()
    where = torch.rand(3, 10, generator=torch.Generator().manual_seed(2)) < 0.4
    places = [(b, t) for b, t in (where & mask[:, 1:]).nonzero().tolist()]
    taught = Actor(teacher)(sequences, mask, where=where, read="logits").logits
    actor = Actor(model)
    logits = actor(sequences, mask, where=where, read="logits").logits
    output = actor(sequences, mask, where=where, teacher_logits=taught)
    plain = [copy.deepcopy(one) for one in (model, teacher)]
    for one in plain:
        one.set_attn_implementation("eager")
    for number, (b, t) in enumerate(places):
        ours, theirs = (one(sequences[b, : t + 1][None], use_cache=False).logits[0, -1].float() for one in plain)
        torch.testing.assert_close(logits[number].float(), ours, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            output.log_probs[b, t], ours.log_softmax(-1)[sequences[b, t + 1]], atol=1e-4, rtol=1e-4
        )
        cross_entropy = -(theirs.softmax(-1) * ours.log_softmax(-1)).sum()
        torch.testing.assert_close(output.cross_entropy[b, t], cross_entropy, atol=1e-4, rtol=1e-4)
    assert len(logits) == len(places) > 3
    assert not output.cross_entropy[~(where & mask[:, 1:])].any()


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "bloom"])
def test_the_entropy_is_that_of_the_distributions_of_each_sequence_alone(arch):
    model = tiny_causal_lm(None, arch)
    twin = copy.deepcopy(model)
    actor = Actor(model)
    sequences, mask = batch()
    output = actor(sequences, mask, temperature=0.7, with_entropy=True)
    twin.set_attn_implementation("eager")
    for row, real, found in zip(sequences, mask, output.entropy, strict=True):
        length = int(real.sum())
        logits = twin(row[None, :length], use_cache=False).logits[0, :-1].float() / 0.7
        expected = torch.distributions.Categorical(logits=logits).entropy()
        torch.testing.assert_close(found[: length - 1], expected, atol=1e-4, rtol=1e-4)
        assert not found[length - 1 :].any()
    torch.testing.assert_close(output.log_probs, actor(sequences, mask, temperature=0.7).log_probs)
    output.entropy.sum().backward()
    assert all(param.grad.isfinite().all() for param in model.parameters() if param.grad is not None)
    assert model.get_output_embeddings().weight.grad.abs().sum() > 0


def test_a_final_softcap_or_logit_scale_goes_through_the_full_logits():
    assert not _verified("gemma2").head_is_last
    assert not _verified("cohere").head_is_last
    assert _verified("qwen2").head_is_last


def _verified(arch, dtype=torch.float32):
    actor = Actor(tiny_causal_lm(None, arch).to(dtype))
    actor.verify()
    return actor


@pytest.mark.parametrize("arch", ["qwen2", "llama", "mistral", "gpt2"])
def test_the_check_passes_in_bfloat16(arch):
    actor = _verified(arch, torch.bfloat16)
    assert actor.packed
    assert actor.head_is_last
    sequences, mask = batch()
    expected = naive_log_probs(copy.deepcopy(actor.model), sequences, mask)
    torch.testing.assert_close(actor(sequences, mask).log_probs, expected, atol=0.05, rtol=0.05)


def test_the_check_finds_leaks_in_bfloat16():
    assert "see each other" in _verified("mamba", torch.bfloat16).reason


def test_one_change_in_a_sequence_leaves_the_others_alone():
    actor = _verified("qwen2")
    sequences, mask = batch()
    before = actor(sequences, mask).log_probs
    sequences[0, 3] += 1
    after = actor(sequences, mask).log_probs
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_only_the_wanted_places_are_computed():
    actor = _verified("qwen2")
    sequences, mask = batch()
    where = torch.zeros(3, 10, dtype=torch.bool)
    where[0, 2:5] = True
    some = actor(sequences, mask, where=where)
    whole = actor(sequences, mask)
    torch.testing.assert_close(some.log_probs, whole.log_probs.where(where, 0.0))


@pytest.mark.parametrize("arch", ["qwen2", "gemma2"])
def test_a_batch_in_which_nothing_is_wanted_has_a_zero_gradient(arch):
    actor = _verified(arch)
    sequences, mask = batch()
    actor(sequences, mask, where=torch.zeros(3, 10, dtype=torch.bool)).log_probs.sum().backward()
    gradients = [parameter.grad for parameter in actor.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradients(arch, use_reentrant):
    plain, saving = Actor(tiny_causal_lm(None, arch)), Actor(tiny_causal_lm(None, arch))
    enable_gradient_checkpointing(saving, use_reentrant)
    sequences, mask = batch()
    for actor in (plain, saving):
        actor.train()
        actor(sequences, mask).log_probs.sum().backward()
    assert saving.packed
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_whole_logits_of_a_batch_never_exist():
    actor = _verified("qwen2")
    sizes = []
    head = actor.model.get_output_embeddings()
    head.register_forward_hook(lambda _, __, output: sizes.append(output.numel()))
    sequences, mask = batch()
    actor(sequences, mask)
    assert sizes == [int(mask.sum()) - 3]


def test_verifying_keeps_the_mode_the_weights_and_the_random_state():
    model = tiny_causal_lm(None, "qwen2").train()
    weights = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    actor = Actor(model)
    actor.verify()
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_generate_works_with_left_padding_and_restores_the_attention():
    actor = _verified("qwen2")
    twin = tiny_causal_lm(None, "qwen2")
    prompts = [[5, 6, 7, 8], [9, 10]]
    expected = [
        twin.generate(torch.tensor([p]), max_new_tokens=4, min_new_tokens=4, do_sample=False)[0, -4:] for p in prompts
    ]
    padded = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    options = {"attention_mask": (padded != 0).long(), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(actor.generate(padded, **options)[:, -4:], torch.stack(expected))
    assert actor.config._attn_implementation == UNPADDED


def test_a_softcapped_attention_does_not_generate_with_sdpa():
    assert _verified("gemma2").padded_attention == "eager"


def test_an_actor_can_be_copied_and_keeps_its_head():
    actor = _verified("qwen2")
    twin = copy.deepcopy(actor)
    sequences, mask = batch()
    with torch.no_grad():
        twin.model.lm_head.weight.mul_(2)
    assert not torch.allclose(twin(sequences, mask).log_probs, actor(sequences, mask).log_probs)


def test_it_is_said_once_that_padding_is_computed(caplog):
    tell_padding.cache_clear()
    for _ in range(2):
        actor = Actor(tiny_causal_lm(None, "bloom"))
        actor.verify()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("openrlhf")]
    assert said == [f"bloom (BloomForCausalLM): padding is computed: {actor.reason}"]
    tell_padding.cache_clear()
    Actor(tiny_causal_lm(None, "llama")).verify()
    assert len(caplog.records) == len(said)
