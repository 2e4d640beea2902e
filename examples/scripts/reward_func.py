"""A reward as a Python file, to start from: it shows what comes in, and gives every answer a random reward.

    --remote_rm_url examples/scripts/reward_func.py [--label_key COLUMN]

The function is called with the samples of a batch and gives one number, or a dictionary with "rewards", for each of
them. reward_math.py and reward_format.py judge answers.
"""

import random


def reward_func(queries, prompts, labels=None):
    """Return one reward for each of ``queries``, a prompt with its answer; ``labels`` are those of ``--label_key``."""
    for query, prompt in zip(queries, prompts, strict=True):
        print(f"prompt {prompt!r}: answer {query.removeprefix(prompt)!r}")
    return [random.random() for _ in queries]
