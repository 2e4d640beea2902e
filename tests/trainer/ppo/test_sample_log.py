"""What of a run's answers is kept for people to read."""

import json

import pytest
import torch

from openrlhf.rollout.types import Experience, Prompt, Rollout
from openrlhf.trainer.ppo.assembly import token_columns
from openrlhf.trainer.ppo.sample_log import ANSWERS, STEPS, TOKENS, SampleLog, Scored, is_kept, token_texts
from tests.helpers import tiny_tokenizer
from tests.trainer.ppo.harness import local_loop, tiny_ppo_config, with_algorithm, with_rollout


def answer(uid, ids, spans=None, log_probs=None, prompt=(1, 2)):
    spans = spans or ((len(prompt), len(prompt) + len(ids)),)
    count = sum(end - start for start, end in spans)
    known = tuple(log_probs or [-0.5] * count)
    return Rollout(Prompt(uid, "asked", prompt), (*prompt, *ids), spans, known, "stop", 0, 0)


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("resumed_at", "kept"), [(0, []), (1, [0, 1]), (2, [0, 1, 2])])
def test_the_samples_of_an_interrupted_run_do_not_come_twice(tmp_path, resumed_at, kept):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(3)) + '{"step": 1, "wh')
    SampleLog(path, None).start(resumed_at)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == kept


def test_a_disk_that_refuses_the_samples_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    log = SampleLog(tmp_path / "missing" / "samples.jsonl", None)
    log.start(0)
    for step in (1, 2):
        log.write("train", step, Scored([], []))
    assert log.failures == 3
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [f"{log.path} cannot be written"]


@pytest.mark.parametrize(
    ("prompts", "samples", "groups"), [(100, 1, range(ANSWERS)), (3, 4, range(3)), (100, 8, (0, 50)), (5, 64, (0,))]
)
def test_groups_are_kept_whole_and_not_too_many_of_them(prompts, samples, groups):
    scored = Scored([None] * prompts * samples, [], samples=samples)
    shown = scored.shown
    assert len(shown) == samples * len(groups)
    assert {index // samples for index in shown} == ({prompts * n // len(groups) for n in range(len(groups))})
    assert scored.most_tokens * len(shown) <= TOKENS


@pytest.mark.parametrize("total", [1, STEPS, STEPS + 1, 1000, 12345])
def test_of_a_long_run_some_steps_are_kept_the_first_among_them(total):
    kept = [step for step in range(1, total + 1) if is_kept(step, total)]
    assert kept[0] == 1 and len(kept) <= STEPS + 1
    assert len(kept) >= min(total, STEPS // 2)


def test_the_texts_of_the_tokens_are_together_the_answer(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    text = "to be, or not: naïve 漢字 🙂 end"
    ids = tokenizer(text)["input_ids"]
    for start in (0, 3):
        found = token_texts(tokenizer, ids, start, len(ids))
        assert len(found) == len(ids) - start
        assert "".join(found) == tokenizer.decode(ids[start:])


def test_a_line_has_a_figure_for_every_token_that_is_kept(tmp_path):
    log = SampleLog(tmp_path / "samples.jsonl", tiny_tokenizer(tmp_path))
    told = answer("7", [5, 6, 7, 8], spans=((2, 4), (5, 6)), log_probs=[-1.0, -2.0, -3.0])
    log.write("train", 3, Scored([told], [1.5], None, {"function": [1.25]}), {0: {"advantage": [0.123456, 1, 0, 2]}})
    (line,) = lines_of(log.path)
    assert (line["uid"], line["sample"], line["reward"], line["parts"]) == ("7", 0, 1.5, {"function": 1.25})
    tokens = line["tokens"]
    assert tokens["mask"] == [1, 1, 0, 1]
    assert tokens["engine_log_prob"] == [-1.0, -2.0, 0.0, -3.0]
    assert tokens["advantage"] == [0.1235, 1, 0, 2]
    assert len(tokens["text"]) == line["length"] == 4


def test_a_long_answer_is_whole_as_text_and_cut_as_tokens(tmp_path):
    log = SampleLog(tmp_path / "samples.jsonl", tiny_tokenizer(tmp_path))
    group = [answer("1", [5] * 200) for _ in range(64)]
    log.write("train", 1, Scored(group, [0.0] * 64, samples=64))
    lines = lines_of(log.path)
    assert len(lines) == 64
    assert {line["length"] for line in lines} == {200}
    assert {len(line["tokens"]["text"]) for line in lines} == {len(line["tokens"]["mask"]) for line in lines} == {128}


def test_figures_of_tokens_are_those_of_the_experience():
    grid = torch.arange(10.0).view(2, 5)
    mask = torch.tensor([[False, True, True, False, False], [False, True, True, True, False]])
    attention = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    experience = Experience(
        sequences=torch.zeros(2, 6, dtype=torch.int64), attention_mask=attention, action_mask=mask,
        rollout_log_probs=grid, sample=torch.tensor([4, 9]), log_probs=-grid, ref_log_probs=grid + 1, kl=grid,
        scores=torch.zeros(2), values=grid, advantages=grid, returns=grid,
    )  # fmt: skip
    found = token_columns(experience, {9: 2, 5: 2}, 2, whiten=(1.0, 2.0), reference=True)
    assert found == {9: {"log_prob": [-6, -7], "advantage": [10, 12], "ref_log_prob": [7, 8]}}
    everything = token_columns(experience, {4: 2}, 99, whiten=None, reference=False)
    assert everything == {4: {"log_prob": [-1, -2], "advantage": [1, 2]}}


@pytest.mark.parametrize(("kl", "whitened"), [(0.1, True), (0.0, False)])
def test_a_run_leaves_whole_groups_with_what_was_learned_from_them(tmp_path, kl, whitened):
    config = with_rollout(tiny_ppo_config(tmp_path), rollout_batch_size=4, n_samples_per_prompt=4)
    estimator = "rloo" if whitened else "dr_grpo"
    config = with_algorithm(config, advantage_estimator=estimator, init_kl_coef=kl)
    loop, _ = local_loop(config, prompts=8)
    loop.fit()
    lines = lines_of(tmp_path / "run" / "samples.jsonl")
    assert [line["step"] for line in lines] == [1] * 16 + [2] * 16
    for first in range(0, 32, 4):
        group = lines[first : first + 4]
        assert len({line["uid"] for line in group}) == 1
        assert [line["sample"] for line in group] == [0, 1, 2, 3]
    for line in lines:
        tokens = line["tokens"]
        assert len(tokens["text"]) == line["length"] == len(tokens["log_prob"]) == len(tokens["advantage"])
        assert tokens["log_prob"] == pytest.approx(tokens["engine_log_prob"], abs=2e-4)
        assert ("ref_log_prob" in tokens) == (kl > 0)
    if whitened:
        every = torch.tensor([figure for line in lines[:16] for figure in line["tokens"]["advantage"]])
        assert float(every.mean()) == pytest.approx(0.0, abs=1e-2)
        assert float(every.std(correction=0)) == pytest.approx(1.0, abs=1e-2) or float(every.abs().max()) < 1e-2
