"""The quickstart's task: put letters in order, taught by annotators who mostly stop after the fourth one.

    python examples/scripts/quickstart_task.py OUT_DIR [--seed 0]

writes what the three training stages read:

    model/              a 0.47M-parameter Qwen2 with random weights, and its tokenizer (ChatML template)
    sft_train.jsonl     prompt, answer      demonstrations: 10 % with a slip, 65 % cut after four letters
    sft_eval.jsonl      prompt, answer
    pairs_train.jsonl   prompt, chosen, rejected
    pairs_eval.jsonl    prompt, chosen, rejected
    prompts_train.jsonl prompt, label       label: the sorted letters
    prompts_eval.jsonl  prompt, label       no held-out prompt stands in any training file

Supervised training imitates the lazy annotators; a reward model trained on preference pairs knows better; PPO against
that reward model makes the policy finish its lists.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path

LETTERS = string.ascii_lowercase
KEPT_BY_LAZY_ANNOTATORS = 4
RAMBLING_LENGTH = 12
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def prompt_of(letters: list[str]) -> str:
    """Return the user's message for ``letters``."""
    return "Sort these letters: " + " ".join(letters)


def answer_of(letters: list[str]) -> str:
    """Return ``letters`` as an assistant writes them."""
    return " ".join(letters)


class Annotator:
    """Writes demonstrations and preference pairs; every draw comes from one seeded generator."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def letters(self) -> list[str]:
        """Return 3 to 8 distinct letters in random order."""
        return self.random.sample(LETTERS, self.random.randint(3, 8))

    def demonstration(self, letters: list[str]) -> list[str]:
        """Return the sorted letters as a careless, lazy annotator writes them."""
        answer = sorted(letters)
        if self.random.random() < 0.10:
            slips = [self.swap_neighbours, self.forget_one, self.add_one, self.replace_one]
            answer = self.random.choices(slips, weights=[40, 25, 20, 15])[0](answer)
        if self.random.random() < 0.65:
            answer = answer[:KEPT_BY_LAZY_ANNOTATORS]
        return answer

    def rejected(self, letters: list[str]) -> list[str]:
        """Return a wrong answer that is hard to tell from the right one."""
        right = sorted(letters)
        if len(right) > KEPT_BY_LAZY_ANNOTATORS and self.random.random() < 0.48:
            return self.prefix(right)
        weights: dict[Callable[[list[str]], list[str]], int] = {
            self.swap_neighbours: 22,
            self.swap_any: 5,
            self.forget_some: 15,
            self.add_some: 15,
            self.replace_some_and_sort: 21,
            self.unrelated: 6,
            self.duplicate_one: 8,
            self.ramble: 8,
        }
        while True:
            wrong = self.random.choices(list(weights), weights=list(weights.values()))[0](right)
            if wrong != right:
                return wrong

    def others(self, letters: list[str], count: int) -> list[str]:
        """Return ``count`` letters that are not in ``letters``."""
        return self.random.sample([letter for letter in LETTERS if letter not in letters], count)

    def prefix(self, right: list[str]) -> list[str]:
        """Stop early: mostly after the fourth letter."""
        length = KEPT_BY_LAZY_ANNOTATORS if self.random.random() < 0.7 else self.random.randint(2, len(right) - 1)
        return right[:length]

    def swap_neighbours(self, right: list[str]) -> list[str]:
        """Exchange two letters that stand side by side."""
        index = self.random.randrange(len(right) - 1)
        return right[:index] + [right[index + 1], right[index]] + right[index + 2 :]

    def swap_any(self, right: list[str]) -> list[str]:
        """Exchange any two letters."""
        first, second = self.random.sample(range(len(right)), 2)
        wrong = list(right)
        wrong[first], wrong[second] = wrong[second], wrong[first]
        return wrong

    def forget_one(self, right: list[str]) -> list[str]:
        """Leave one letter out."""
        index = self.random.randrange(len(right))
        return right[:index] + right[index + 1 :]

    def forget_some(self, right: list[str]) -> list[str]:
        """Leave one or two letters out."""
        kept = self.random.sample(range(len(right)), len(right) - self.random.randint(1, 2))
        return [right[index] for index in sorted(kept)]

    def add_one(self, right: list[str]) -> list[str]:
        """Add a letter that was not asked for, anywhere."""
        index = self.random.randint(0, len(right))
        return right[:index] + self.others(right, 1) + right[index:]

    def add_some(self, right: list[str]) -> list[str]:
        """Add one or two letters, mostly where they belong in the order."""
        wrong = list(right)
        for letter in self.others(right, self.random.randint(1, 2)):
            wrong.insert(self.random.randint(0, len(wrong)), letter)
        return sorted(wrong) if self.random.random() < 0.7 else wrong

    def replace_one(self, right: list[str]) -> list[str]:
        """Write one wrong letter."""
        wrong = list(right)
        wrong[self.random.randrange(len(wrong))] = self.others(right, 1)[0]
        return wrong

    def replace_some_and_sort(self, right: list[str]) -> list[str]:
        """Write one to three wrong letters, and sort the result."""
        count = self.random.randint(1, 3)
        kept = self.random.sample(right, len(right) - count)
        return sorted(kept + self.others(right, count))

    def unrelated(self, right: list[str]) -> list[str]:
        """Sort letters that nobody gave."""
        return sorted(self.others(right, len(right)))

    def duplicate_one(self, right: list[str]) -> list[str]:
        """Write one letter twice."""
        index = self.random.randrange(len(right))
        return right[: index + 1] + right[index:]

    def ramble(self, right: list[str]) -> list[str]:
        """Never stop."""
        return right + self.random.choices(LETTERS, k=RAMBLING_LENGTH - len(right))


def fresh_letters(annotator: Annotator, held_out: set[str]) -> Iterator[list[str]]:
    """Yield letters whose prompt is not held out."""
    while True:
        letters = annotator.letters()
        if prompt_of(letters) not in held_out:
            yield letters


def write_rows(path: Path, rows: Iterator[dict], count: int) -> None:
    """Write ``count`` rows as JSON Lines."""
    with path.open("w") as file:
        for _ in range(count):
            file.write(json.dumps(next(rows)) + "\n")


def write_data(out: Path, seed: int, *, demonstrations: int, pairs: int, prompts: int, held_out: int) -> None:
    """Write the six data files; the held-out prompts are drawn first and kept out of the rest."""
    annotator = Annotator(seed)
    evaluation: dict[str, list[str]] = {}
    while len(evaluation) < held_out:
        letters = annotator.letters()
        evaluation[prompt_of(letters)] = letters
    fresh = fresh_letters(annotator, set(evaluation))

    def demonstration(letters: list[str]) -> dict:
        return {"prompt": prompt_of(letters), "answer": answer_of(annotator.demonstration(letters))}

    def pair(letters: list[str]) -> dict:
        wrong = annotator.rejected(letters)
        return {"prompt": prompt_of(letters), "chosen": answer_of(sorted(letters)), "rejected": answer_of(wrong)}

    def labelled(letters: list[str]) -> dict:
        return {"prompt": prompt_of(letters), "label": answer_of(sorted(letters))}

    for name, row, train_rows in (
        ("sft", demonstration, demonstrations), ("pairs", pair, pairs), ("prompts", labelled, prompts),
    ):  # fmt: skip
        write_rows(out / f"{name}_train.jsonl", (row(letters) for letters in fresh), train_rows)
        write_rows(out / f"{name}_eval.jsonl", (row(letters) for letters in evaluation.values()), held_out)


def write_model(out: Path, seed: int, *, hidden: int = 128, layers: int = 2) -> None:
    """Write a small Qwen2 with random weights and a tokenizer that knows every letter as one token."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    annotator = Annotator(seed)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    dialogues = (
        f"user\n{prompt_of(letters)}\nassistant\n{answer_of(sorted(letters))}\n"
        for letters in (annotator.letters() for _ in range(2000))
    )
    bpe.train_from_iterator(dialogues, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=320, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32,
        max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(out)


def main() -> None:
    """Write data and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--demonstrations", type=int, default=20480)
    parser.add_argument("--pairs", type=int, default=6400)
    parser.add_argument("--prompts", type=int, default=10240)
    parser.add_argument("--held_out", type=int, default=1024)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    write_data(
        args.out, args.seed, demonstrations=args.demonstrations, pairs=args.pairs, prompts=args.prompts,
        held_out=args.held_out,
    )  # fmt: skip
    write_model(args.out / "model", args.seed)


if __name__ == "__main__":
    main()
