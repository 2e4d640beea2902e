import pytest
import torch

from openrlhf.models.actor import Actor
from openrlhf.models.attention import UNPADDED
from openrlhf.models.tokenizer import load_tokenizer
from openrlhf.rollout.engine import WEIGHTS
from openrlhf.rollout.hf_engine import HFEngine, RepetitionPenalty, RowSampler, nucleus
from openrlhf.rollout.types import Prompt, SamplingParams, SequenceBatch
from tests.helpers import tiny_causal_lm, tiny_tokenizer

PROMPTS = [
    Prompt(uid="0", text="", token_ids=(5, 6, 7, 8, 9)),
    Prompt(uid="1", text="", token_ids=(10, 11)),
    Prompt(uid="2", text="", token_ids=(12, 13, 14)),
]
SAMPLING = SamplingParams(max_new_tokens=6, temperature=0.8, n=2, seed=3, step=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(path)
    (path / "config.json").write_text('{"model_type": "qwen2"}')
    return load_tokenizer(str(path))


@pytest.fixture(scope="module")
def actor():
    return Actor(tiny_causal_lm(None, "qwen2"))


@pytest.fixture(scope="module")
def engine(actor, tokenizer):
    return HFEngine(actor, tokenizer, micro_batch_size=4)


def test_rollouts_come_in_the_order_of_the_prompts(engine):
    rollouts = engine.generate(PROMPTS, SAMPLING)
    assert [rollout.prompt.uid for rollout in rollouts] == ["0", "0", "1", "1", "2", "2"]
    for rollout in rollouts:
        start, end = rollout.action_spans[0]
        assert rollout.token_ids[:start] == rollout.prompt.token_ids
        assert end == len(rollout.token_ids)
        assert len(rollout.log_probs) == rollout.num_actions > 0
    assert len({rollout.seed for rollout in rollouts}) == 6
    assert rollouts[0].token_ids != rollouts[1].token_ids


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_the_same_seed_gives_the_same_tokens_whatever_the_batching(engine, actor, tokenizer, micro_batch_size):
    expected = engine.generate(PROMPTS, SAMPLING)
    other = HFEngine(actor, tokenizer, micro_batch_size).generate(PROMPTS[::-1], SAMPLING)
    by_seed = {rollout.seed: rollout for rollout in other}
    for rollout in expected:
        assert by_seed[rollout.seed].token_ids == rollout.token_ids
        assert by_seed[rollout.seed].log_probs == pytest.approx(rollout.log_probs, abs=1e-5)


def test_another_step_or_seed_gives_other_tokens(engine):
    first = engine.generate(PROMPTS, SAMPLING)
    later = engine.generate(PROMPTS, SamplingParams(max_new_tokens=6, temperature=0.8, n=2, seed=3, step=2))
    assert [r.token_ids for r in first] != [r.token_ids for r in later]


def test_log_probs_equal_the_policys_own_at_the_sampling_temperature(engine, actor):
    rollouts = engine.generate(PROMPTS, SAMPLING)
    batch = SequenceBatch.from_rollouts(rollouts, pad_id=0)
    with torch.no_grad():
        ours = actor(batch.sequences, batch.attention_mask, temperature=0.8).log_probs
    mask = batch.action_mask
    torch.testing.assert_close(batch.rollout_log_probs[mask], ours[mask], atol=1e-5, rtol=1e-5)
    assert actor.config._attn_implementation == UNPADDED


def test_temperature_0_is_greedy_and_its_log_probs_are_at_temperature_1(engine, actor):
    rollout = engine.generate(PROMPTS[:1], SamplingParams(max_new_tokens=5, temperature=0.0))[0]
    tokens = torch.tensor([rollout.token_ids])
    with actor.generation() as model:
        log_probs = model(tokens).logits.log_softmax(-1)[0, len(PROMPTS[0].token_ids) - 1 : -1]
    best = log_probs.max(dim=-1)
    assert best.indices.tolist() == list(rollout.response_ids)
    assert rollout.log_probs == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_end_of_sequence_is_the_last_action_and_nothing_follows_it(tokenizer):
    model = tiny_causal_lm(None, "llama", tied=False)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    engine = HFEngine(Actor(model), tokenizer, micro_batch_size=64)
    rollouts = engine.generate(PROMPTS, SamplingParams(max_new_tokens=200, n=20))
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert 10 < len(stopped) < 60
    for rollout in rollouts:
        assert (rollout.token_ids[-1] == tokenizer.eos_token_id) == (rollout.finish_reason == "stop")
        assert tokenizer.eos_token_id not in rollout.response_ids[:-1]
        assert rollout.finish_reason == "stop" or rollout.num_actions == 200


def test_sampled_tokens_follow_the_softmax():
    rows, vocabulary = 20_000, 6
    logits = torch.linspace(-1.5, 1.5, vocabulary)
    sampler = RowSampler(range(rows), 0.7, 1.0, torch.device("cpu"))
    tokens = sampler(torch.zeros(rows, 1), logits.expand(rows, -1)).argmax(dim=-1)
    frequencies = torch.bincount(tokens, minlength=vocabulary) / rows
    expected = torch.softmax(logits / 0.7, dim=-1)
    assert (frequencies - expected).abs().max() < 4 * (expected * (1 - expected) / rows).sqrt().max()
    torch.testing.assert_close(sampler.log_probs[0], expected.log()[tokens])


def test_top_p_keeps_the_smallest_set_of_that_mass():
    probabilities = torch.tensor([[0.1, 0.5, 0.25, 0.15], [0.97, 0.01, 0.01, 0.01]])
    kept = nucleus(probabilities.log(), 0.7) > -1e30
    assert kept.tolist() == [[False, True, True, False], [True, False, False, False]]
    assert torch.equal(nucleus(probabilities.log(), 1.0), probabilities.log())


def test_tokens_outside_the_nucleus_are_never_sampled():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(5_000, -1)
    sampler = RowSampler(range(5_000), 1.0, 0.75, torch.device("cpu"))
    tokens = sampler(torch.zeros(5_000, 1), logits).argmax(dim=-1)
    assert set(tokens.tolist()) == {0, 1}
    torch.testing.assert_close(sampler.log_probs[0], logits[0][tokens])


def test_the_mode_of_the_policy_is_kept(engine, actor):
    actor.train()
    engine.generate(PROMPTS[:1], SAMPLING)
    assert actor.training
    assert actor.model.training
    actor.eval()


def test_the_generation_config_of_the_folder_does_not_leak_in(tmp_path, tokenizer):
    model = tiny_causal_lm(None, "qwen2", tied=False)
    model.generation_config.repetition_penalty = 1.5
    model.generation_config.suppress_tokens = list(range(3, 100))
    model.generation_config.max_length = 7
    model.save_pretrained(tmp_path)
    actor = Actor(str(tmp_path), bf16=False)
    assert actor.model.generation_config.repetition_penalty == 1.5
    rollouts = HFEngine(actor, tokenizer).generate(PROMPTS, SAMPLING)
    batch = SequenceBatch.from_rollouts(rollouts, pad_id=0)
    with torch.no_grad():
        ours = actor(batch.sequences, batch.attention_mask, temperature=0.8).log_probs
    mask = batch.action_mask
    torch.testing.assert_close(batch.rollout_log_probs[mask], ours[mask], atol=1e-5, rtol=1e-5)
    assert actor.model.generation_config.repetition_penalty == 1.5


def test_an_answer_ends_at_each_end_that_the_folder_names_and_at_the_tokenizers_own(tmp_path, tokenizer):
    model = tiny_causal_lm(None, "qwen2")
    model.generation_config.eos_token_id = [0, 7]  # the first of them pads too
    model.save_pretrained(tmp_path)
    engine = HFEngine(Actor(str(tmp_path), bf16=False), tokenizer, micro_batch_size=64)
    rollouts = engine.generate(PROMPTS, SamplingParams(max_new_tokens=40, temperature=2.0, n=64, seed=1))
    ends = {0, 7, tokenizer.eos_token_id}
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert {rollout.token_ids[-1] for rollout in stopped} == ends
    for rollout in rollouts:
        body = rollout.response_ids[:-1] if rollout in stopped else rollout.response_ids
        assert not ends.intersection(body) and len(rollout.log_probs) == rollout.num_actions
        assert rollout in stopped or rollout.num_actions == 40


def test_prompt_and_answer_together_stay_within_max_len(actor, engine, tokenizer):
    free = engine.generate(PROMPTS, SAMPLING)
    capped = HFEngine(actor, tokenizer, micro_batch_size=6, max_len=7).generate(PROMPTS, SAMPLING)
    for whole, cut in zip(free, capped, strict=True):
        room = min(6, 7 - len(cut.prompt.token_ids))
        assert cut.response_ids == whole.response_ids[:room]
        assert len(cut.log_probs) == cut.num_actions
        assert cut.finish_reason == ("stop" if cut.response_ids[-1] == tokenizer.eos_token_id else "length")
    assert max(len(rollout.token_ids) for rollout in capped) == 7


def test_the_policy_may_be_given_as_a_function(actor, tokenizer):
    engine = HFEngine(lambda: actor, tokenizer, policy_version=7)
    engine.sleep()
    engine.wake_up(WEIGHTS)
    assert engine.generate(PROMPTS[:1], SAMPLING)[0].policy_version == 7


def test_a_repetition_penalty_is_that_of_transformers_and_padding_was_never_said(actor, tokenizer):
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, repetition_penalty=1.4)
    together = HFEngine(actor, tokenizer, micro_batch_size=4).generate(PROMPTS, sampling)
    plain = HFEngine(actor, tokenizer).generate(PROMPTS, SamplingParams(max_new_tokens=12, temperature=0.0))
    for prompt, rollout in zip(PROMPTS, together, strict=True):
        ids = torch.tensor([prompt.token_ids])
        with actor.generation() as model:
            expected = model.generate(ids, max_new_tokens=12, do_sample=False, repetition_penalty=1.4)
        assert list(rollout.token_ids) == expected[0].tolist()
    assert [rollout.token_ids for rollout in together] != [rollout.token_ids for rollout in plain]
    scores = torch.tensor([[2.0, -1.0, 3.0, 4.0]])
    penalty = RepetitionPenalty(2.0, torch.tensor([[0, 1, 1]]))
    assert penalty(torch.tensor([[0, 1, 2]]), scores).tolist() == [[2.0, -2.0, 1.5, 4.0]]


def test_a_streamed_answer_is_shown_token_by_token_and_is_the_same(engine):
    shown = []
    rollout = engine.stream(PROMPTS[0], SAMPLING, shown.append)
    assert rollout == engine.generate(PROMPTS[:1], SAMPLING)[0]
    assert shown == list(rollout.response_ids)
