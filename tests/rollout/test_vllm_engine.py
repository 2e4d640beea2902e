"""The vLLM engine against Hugging Face forwards of the same weights."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

from openrlhf.rollout.types import Prompt, SamplingParams
from openrlhf.rollout.vllm_engine import VLLMEngine
from tests.helpers import tiny_causal_lm, tiny_folder

SAMPLING = SamplingParams(max_new_tokens=12, temperature=0.7, n=2, seed=3, step=5)
PROMPTS = [Prompt(uid=str(row), text="", token_ids=tuple(range(5 + row, 12 + 2 * row))) for row in range(4)]


def engine_on(folder: str, **options) -> VLLMEngine:
    return VLLMEngine(folder, dtype="float32", max_model_len=320, enforce_eager=True, **options)


def model_of(seed: int, tied: bool):
    return tiny_causal_lm(seed=seed, tied=tied, hidden=64)


@torch.no_grad()
def trainer_log_probs(model, rollout, temperature: float) -> torch.Tensor:
    ids = torch.tensor([rollout.token_ids])
    log_probs = torch.log_softmax(model(ids).logits[0, :-1].float() / temperature, dim=-1)
    start, end = rollout.action_spans[0]
    return log_probs.gather(1, ids[0, 1:, None])[start - 1 : end - 1, 0]


def gap(model, rollouts, temperature: float = SAMPLING.temperature) -> float:
    """Largest difference between the engine's log-probs and the model's."""
    return max(
        (trainer_log_probs(model, rollout, temperature) - torch.tensor(rollout.log_probs)).abs().max().item()
        for rollout in rollouts
    )


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> VLLMEngine:
    folder = tiny_folder(tmp_path_factory.mktemp("tied"), tied=True, hidden=64, seed=0)
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = [0, 7]
    settings.save_pretrained(folder)
    return engine_on(folder, enable_prefix_caching=True)


@pytest.mark.timeout(300)
def test_log_probs_equal_the_trainers_before_and_after_new_weights_with_a_tied_head(tied):
    for version, seed in enumerate((0, 1, 2)):
        model = model_of(seed, tied=True)
        tied.update_weights(model.named_parameters(), version, bucket_bytes=20_000)
        rollouts = tied.generate(PROMPTS, SAMPLING)
        assert [rollout.policy_version for rollout in rollouts] == [version] * 8
        assert gap(model, rollouts) < 5e-6


@pytest.mark.timeout(300)
def test_a_sample_repeats_whatever_is_generated_beside_it(tied):
    both = tied.generate(PROMPTS, SAMPLING)
    alone = tied.generate(PROMPTS[2:3], SAMPLING)
    assert [rollout.token_ids for rollout in alone] == [rollout.token_ids for rollout in both[4:6]]
    assert both[4].token_ids != both[5].token_ids
    other_step = tied.generate(PROMPTS[2:3], SamplingParams(12, temperature=0.7, n=2, seed=3, step=6))
    assert [rollout.seed for rollout in other_step] != [rollout.seed for rollout in alone]


@pytest.mark.timeout(300)
def test_a_sample_repeats_to_the_last_bit_whatever_was_generated_before(tied):
    # The common beginning fills a block of the prefix cache; a second call would find it there.
    common = tuple(3 + 7 * place % 300 for place in range(200))
    prompts = [Prompt(uid=str(row), text="", token_ids=(*common, row + 5)) for row in range(4)]
    tied.update_weights(model_of(0, tied=True).named_parameters(), 1)
    first, again = tied.generate(prompts, SAMPLING), tied.generate(prompts, SAMPLING)
    assert [rollout.log_probs for rollout in again] == [rollout.log_probs for rollout in first]


@pytest.mark.timeout(300)
def test_temperature_zero_takes_the_most_likely_token_with_log_probs_at_temperature_one(tied):
    model = model_of(7, tied=True)
    tied.update_weights(model.named_parameters(), 1)
    rollouts = tied.generate(PROMPTS, SamplingParams(max_new_tokens=6, temperature=0.0))
    assert gap(model, rollouts, temperature=1.0) < 5e-6
    for rollout in rollouts:
        best = model(torch.tensor([rollout.token_ids])).logits[0, :-1].argmax(-1)
        start, end = rollout.action_spans[0]
        assert best[start - 1 : end - 1].tolist() == list(rollout.response_ids)


@pytest.mark.timeout(300)
def test_an_answer_ends_at_each_end_that_the_folder_names_and_at_the_tokenizers_own(tied):
    tied.update_weights(model_of(3, tied=True).named_parameters(), 1)
    rollouts = tied.generate(PROMPTS, SamplingParams(max_new_tokens=40, temperature=2.0, n=64, seed=1))
    ends = {0, 2, 7}
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert {rollout.token_ids[-1] for rollout in stopped} == ends
    for rollout in rollouts:
        body = rollout.response_ids[:-1] if rollout in stopped else rollout.response_ids
        assert not ends.intersection(body)
        assert rollout in stopped or rollout.num_actions == 40


@pytest.mark.timeout(300)
def test_the_number_of_steps_grows_while_the_engine_works(tied):
    before = tied.steps
    tied.generate(PROMPTS, SamplingParams(max_new_tokens=3))
    assert tied.steps >= before + 3


@pytest.mark.timeout(300)
def test_without_repacking_a_tied_head_the_engine_serves_a_mixture_of_two_policies(tied):
    tied.update_weights(model_of(0, tied=True).named_parameters(), 1)
    tied.repack_tied_head = False
    try:
        model = model_of(9, tied=True)
        tied.update_weights(model.named_parameters(), 2)
        assert gap(model, tied.generate(PROMPTS, SAMPLING)) > 0.1
    finally:
        tied.repack_tied_head = True


@pytest.mark.full
@pytest.mark.timeout(300)
def test_an_untied_head_follows_new_weights(tmp_path):
    engine = engine_on(tiny_folder(tmp_path, tied=False, hidden=64, seed=0))
    model = model_of(1, tied=False)
    engine.update_weights(model.named_parameters(), 1, bucket_bytes=1)
    assert gap(model, engine.generate(PROMPTS, SAMPLING)) < 5e-6


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_model_over_two_processes_follows_new_weights(tmp_path):
    folder = tiny_folder(tmp_path, tied=True, hidden=64, num_key_value_heads=2)
    engine = engine_on(folder, tensor_parallel_size=2)
    model = tiny_causal_lm(seed=4, tied=True, hidden=64, num_key_value_heads=2)
    engine.update_weights(model.named_parameters(), 1, bucket_bytes=20_000)
    assert gap(model, engine.generate(PROMPTS, SAMPLING)) < 5e-6
