"""The held-out figures of the examples equal figures worked out one row at a time."""

import math

import pytest
import torch

from tests.helpers import tiny_folder

PROMPTS = ["Write clips", "Write robot friends", "What is 12 + 30? Say it."]
END = "<rm_score>: 1.00 "


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models with one tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    return tiny_folder(folder / "one"), tiny_folder(folder / "two", seed=1)


def asked(prompt):
    """Return a prompt in the chat template of the tiny models."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def one_by_one(folder, prompt, answer, end=""):
    """Return the token ids of an answer and the log-probs of all tokens at its places, without padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    before, said = (encoded(tokenizer, part) for part in (asked(prompt) + end, f"{answer}<|im_end|>"))
    with torch.no_grad():
        log_probs = model(torch.tensor([before + said])).logits[0].log_softmax(-1)
    return torch.tensor(said), log_probs[len(before) - 1 : -1]


def log_prob(folder, prompt, answer, end=""):
    said, log_probs = one_by_one(folder, prompt, answer, end)
    return log_probs[range(len(said)), said].sum().item()


def test_the_interval_of_independent_rows_is_the_binomial_one(script):
    mean, half = script("measure").share([True] * 9 + [False] * 3, range(12))
    assert mean == 0.75 and half == pytest.approx(1.96 * (0.75 * 0.25 / 12) ** 0.5)


def test_rows_of_a_prompt_that_agree_widen_the_interval(script):
    hits = [True] * 9 + [False] * 3
    alone = script("measure").share(hits, range(12))[1]
    doubled = script("measure").share(hits * 2, [*range(12)] * 2)[1]
    assert doubled == pytest.approx(alone)
    assert script("measure").share(hits * 2, range(24))[1] == pytest.approx(alone / 2**0.5)


def test_pairs_are_told_apart_by_log_ratios_and_by_log_probs(script, folders):
    rows = [{"prompt": p, "chosen": "clips", "rejected": "robot and story"} for p in PROMPTS]
    z = [
        [log_prob(f, r["prompt"], r["chosen"]) - log_prob(f, r["prompt"], r["rejected"]) for r in rows]
        for f in folders
    ]
    margins = [mine - theirs for mine, theirs in zip(*z, strict=True)]
    found = script("measure").pairs(*folders, rows)
    assert found["reward_accuracy"][0] == sum(margin > 0 for margin in margins) / 3
    assert found["reward_margin"] == pytest.approx(sum(margins) / 3, abs=1e-4)
    assert found["log_prob_accuracy"][0] == sum(one > 0 for one in z[0]) / 3
    assert found["log_prob_accuracy_of_reference"][0] == sum(one > 0 for one in z[1]) / 3


def test_answers_are_on_the_right_side_of_the_mean_over_mismatched_rows(script, folders):
    said = ["clips", "robot", "tiny story"]
    rows = [
        {"prompt": p, "completion": a, "label": k} for p, a, k in zip(PROMPTS, said, (True, False, True), strict=True)
    ]
    ratio, drift = (
        [log_prob(folders[0], p, a) - log_prob(folders[1], p, a) for p, a in zip(PROMPTS, texts, strict=True)]
        for texts in (said, said[1:] + said[:1])
    )
    point = max(0.0, sum(drift) / 3)
    found = script("measure").answers(*folders, rows)
    assert found["reference_point"] == pytest.approx(point, abs=1e-4)
    assert found["right_side"][0] == sum((r > point) == row["label"] for r, row in zip(ratio, rows, strict=True)) / 3
    assert found["desirable_above"] == sum(ratio[i] > ratio[1] for i in (0, 2)) / 2
    assert found["log_ratio_undesirable"] == pytest.approx(ratio[1], abs=1e-4)


def test_the_divergence_is_a_mean_over_the_tokens_of_all_answers(script, folders):
    rows = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, ("clips", "robot", "tiny story"), strict=True)]
    total, tokens = 0.0, 0
    for row in rows:
        (said, student), (_, teacher) = (one_by_one(folder, row["prompt"], row["answer"]) for folder in folders)
        total += torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="sum").item()
        tokens += len(said)
    found = script("measure").divergence(*folders, rows)
    assert found["tokens"] == tokens and found["divergence"] == pytest.approx(total / tokens, rel=1e-4)
    assert script("measure").divergence(folders[0], folders[0], rows)["divergence"] == 0


def test_a_step_is_judged_by_the_token_after_its_placeholder(script, folders):
    rows = [
        {"prompt": p, "completions": ["4", "8"], "labels": list(k)}
        for p, k in zip(PROMPTS, ("+-", "--", "+-"), strict=True)
    ]
    hits = []
    for row in rows:
        said, log_probs = one_by_one(folders[0], row["prompt"], "4 *\n8 *")
        from transformers import AutoTokenizer

        mark, plus, minus = AutoTokenizer.from_pretrained(folders[0]).convert_tokens_to_ids(["*", "+", "-"])
        places = [place for place, token in enumerate(said.tolist()) if token == mark]
        # The log-probs at a place are those of its own token, so the judgement is one further.
        judged = ["+" if log_probs[place + 1, plus] > log_probs[place + 1, minus] else "-" for place in places]
        hits += [one == label for one, label in zip(judged, row["labels"], strict=True)]
    found = script("measure").steps(folders[0], rows)
    assert found["steps"] == 6 and found["commoner_label"] == pytest.approx(4 / 6)
    assert found["accuracy"][0] == pytest.approx(sum(hits) / 6)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A model that says "clips" twice and "tiny story" once in three times behind END, and "robot friends" without."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny_folder(tmp_path_factory.mktemp("taught"))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    said = [(END, "clips"), (END, "clips"), (END, "tiny story"), ("", "robot friends")]
    rows = [
        (encoded(tokenizer, f"{asked(p)}{end}"), encoded(tokenizer, f"{a}<|im_end|>"))
        for p in PROMPTS
        for end, a in said
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(40):
        for before, after in rows:
            log_probs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
            (-log_probs[range(len(after)), after].sum() / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def test_exact_answers_are_counted_as_often_as_the_model_gives_them(script, taught, monkeypatch):
    measure = script("measure")
    monkeypatch.setattr(measure, "GENERATED", 2)  # prompts of two lengths share a batch
    monkeypatch.setattr(measure, "SAMPLES", 200)
    labels = ["clips", "clips", "tiny story"]
    rows = [{"prompt": p, "label": label} for p, label in zip(PROMPTS, labels, strict=True)]
    chance = sum(math.exp(log_prob(taught, p, label, END)) for p, label in zip(PROMPTS, labels, strict=True)) / 3
    found = measure.exact(taught, rows, END)
    assert found["greedy"][0] == 2 / 3
    assert found["sampled"][0] == pytest.approx(chance, abs=0.08) and 0.4 < chance < 0.7
    assert measure.exact(taught, rows)["greedy"][0] == 0


def test_an_answer_that_goes_on_behind_the_label_is_not_exact(script, taught):
    rows = [{"prompt": PROMPTS[0], "label": label} for label in ("robot", "robot friends", "robot friends of")]
    assert script("measure").exact(taught, rows)["greedy"][0] == 1 / 3
