"""A reward for the form of an answer: 1.0 for <think>...</think><answer>...</answer> and nothing else, else 0.0.

--remote_rm_url examples/scripts/reward_math.py,examples/scripts/reward_format.py --reward_weights 1,0.2
"""

import re

FORM = re.compile(r"\s*<think>(.+?)</think>\s*<answer>(.+?)</answer>\s*", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
END = re.compile(r"(?:<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|<\|end_of_text\|>|</s>|\s)+$")


def reward_func(queries, prompts):
    """Return one reward a query; end tokens behind the answer do not count."""
    answers = [END.sub("", query.removeprefix(prompt)) for query, prompt in zip(queries, prompts, strict=True)]
    return [float(bool(FORM.fullmatch(answer)) and len(TAG.findall(answer)) == 4) for answer in answers]
