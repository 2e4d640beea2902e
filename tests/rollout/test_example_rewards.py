"""The reward files among the examples, in the process that a run starts them in."""

from __future__ import annotations

from pathlib import Path

import pytest

from openrlhf.rollout.reward_process import RewardProcess

SCRIPTS = Path(__file__).resolve().parents[2] / "examples/scripts"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def math():
    """Return the process of the math reward."""
    pytest.importorskip("math_verify")
    process = RewardProcess(SCRIPTS / "reward_math.py", 60.0)
    yield process
    process.close()


def asked(process, answers, labels):
    prompts = [f"Question {number} \\boxed{{7}}?" for number in range(len(answers))]
    queries = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return process.score(queries, prompts, labels)


RIGHT = [
    (r"It is \boxed{72}." + END, "72"),
    (r"First \boxed{3}, no: \boxed{72}", "72"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{1/2}", r"so \boxed{\frac{1}{2}}"),
    (r"\boxed{1000}", "5 * 200 = 1000\n#### 1,000"),
    (r"\boxed{(x+1)^2}", "x^2+2x+1"),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"1/\sqrt{2}"),
]
WRONG = [
    ("72", "72"),
    (r"\boxed{72", "72"),
    (r"\boxed{}", "72"),
    (r"\boxed{71}", "72"),
    (r"\boxed{72} or \boxed{71}", "72"),
    (r"\boxed{seventy-two}", "72"),
]


def test_the_same_mathematics_is_right(math):
    result = asked(math, *(list(column) for column in zip(*RIGHT, strict=True)))
    assert result.rewards == [1.0] * len(RIGHT)
    assert result.extra == {"scores": [1.0] * len(RIGHT), "boxed_rate": [1.0] * len(RIGHT)}


def test_other_mathematics_and_no_box_are_wrong(math):
    result = asked(math, *(list(column) for column in zip(*WRONG, strict=True)))
    assert result.rewards == [0.0] * len(WRONG)
    assert result.extra["boxed_rate"] == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0]


def test_what_a_model_writes_is_never_run_and_never_waited_for(math, tmp_path):
    canary = tmp_path / "canary"
    payloads = [
        f"__import__('os').system('touch {canary}')",
        f"open('{canary}','w')",
        f"exec(\"open('{canary}','w')\")",
        r"\input{/etc/passwd}",
        r"\write18{touch " + str(canary) + "}",
        "().__class__.__bases__[0].__subclasses__()",
        "9**9**9**9",
        "9^{9^{9^9}}",
        "9^9^9^9",
        "9^{999999999}",
        "10^{-99999999}",
        "1000000!",
        "9" * 150,
        r"\prod_{k=1}^{100000000} k",
        r"\sum_{k=1}^{\infty} \frac{1}{k^2}",
        r"\int_0^1 x^{x^x} dx",
        "{" * 90 + "}" * 90,
        "(" * 150,
        r"\sqrt{" * 25 + "2" + "}" * 25,
        "a" * 100_000,
        "lambda: 72",
    ]
    assert asked(math, [rf"\boxed{{{text}}}" for text in payloads], ["72"] * len(payloads)).rewards == [0.0] * 21
    assert not canary.exists()


def test_the_form_of_an_answer_counts():
    process = RewardProcess(SCRIPTS / "reward_format.py", 60.0)
    answers = {
        "<think>so</think><answer>72</answer>": 1.0,
        f"<think>so\nand so</think>\n<answer>72</answer>{END}\n": 1.0,
        "<think>so</think>": 0.0,
        "72": 0.0,
        "<think></think><answer>72</answer>": 0.0,
        "<think>so</think><answer>72</answer> and more": 0.0,
        "<think>so</think><think>so</think><answer>72</answer>": 0.0,
        "<answer>72</answer><think>so</think>": 0.0,
        "<think>so</think><answer>72": 0.0,
    }
    assert asked(process, list(answers), [""] * len(answers)).rewards == list(answers.values())
    process.close()
