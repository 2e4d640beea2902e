"""The true score of the quickstart's task, in the format of a python reward file: 1.0 for the exact answer, else 0.0.

The quickstart only measures with it (``--eval_reward_func``); PPO learns from the reward model. To learn from it
directly, pass it as ``--remote_rm_url examples/scripts/quickstart_reward.py --label_key label``.
"""

END_OF_TURN = "<|im_end|>"


def reward_func(queries, prompts, labels):
    """Return one score a query; a query is the prompt with the sampled answer behind it, special tokens included."""
    scores = []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        answer, _, rest = query.removeprefix(prompt).partition(END_OF_TURN)
        scores.append(float(answer == label and not rest))
    return scores
