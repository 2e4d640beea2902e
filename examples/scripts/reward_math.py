r"""A reward for mathematics: 1.0 where the last \boxed{...} of the answer equals the label, else 0.0.

    --remote_rm_url examples/scripts/reward_math.py --label_key answer

Needs `pip install math-verify`, which compares 1/2 with 0.5, sets, intervals and expressions. A label may be the bare
answer, a solution that ends in \boxed{...}, or one that ends in "#### answer" as in GSM8K. What a model writes is read
as LaTeX and never run; what would take long to compute, like a tower of powers, is wrong without a look.
"""

import re

LONGEST = 200
TOO_HARD = re.compile(r"\^\s*\{?[^{}\s]*\^|\^\s*\{?\s*-?\d{4}|\d{40}|!|\\(sum|prod|int|lim|binom)")
TIMEOUT_S = 5


def last_boxed(text):
    r"""Return what stands in the last \boxed{...} of ``text``, None without one that is closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len("\\boxed")
    for place in range(first, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[first + 1 : place].strip()
    return None


def expected(label):
    """Return the bare answer of a label."""
    boxed = last_boxed(label)
    return boxed if boxed is not None else label.rpartition("####")[2].strip()


def is_right(answer, label):
    """Return whether two bare answers are the same mathematics."""
    from math_verify import LatexExtractionConfig, parse, verify

    if answer == label:
        return True
    if not answer or len(answer) > LONGEST or TOO_HARD.search(answer):
        return False
    as_latex = [LatexExtractionConfig()]
    gold, found = (parse(f"${text}$", as_latex, parsing_timeout=TIMEOUT_S) for text in (label, answer))
    return bool(gold and found) and verify(gold, found, timeout_seconds=TIMEOUT_S)


def reward_func(queries, prompts, labels):
    """Return the rewards, and how many answers hold a box at all."""
    boxed = [last_boxed(query.removeprefix(prompt)) for query, prompt in zip(queries, prompts, strict=True)]
    rewards = [
        float(answer is not None and is_right(answer, expected(label)))
        for answer, label in zip(boxed, labels, strict=True)
    ]
    return {
        "rewards": rewards,
        "scores": rewards,
        "extra_logs": {"boxed_rate": [float(answer is not None) for answer in boxed]},
    }
