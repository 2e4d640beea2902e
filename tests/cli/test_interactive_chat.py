"""``interactive_chat`` through a pipe and in a process: what is said, what is answered, what a line can change."""

from __future__ import annotations

import io
import subprocess
import sys
import unicodedata

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf.cli.interactive_chat import _show, chat
from openrlhf.config.arguments import parse
from openrlhf.config.chat import ChatConfig
from openrlhf.errors import DataError, UsageError
from tests.cli.supervised import ROOT, command, environment
from tests.helpers import tiny_folder
from tests.trainer.ppo.harness import tiny_reward_model

LINES = ["What is 12 + 30?", "And 1 more?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return tiny_folder(tmp_path_factory.mktemp("chat") / "policy")


class Screen(io.StringIO):
    """A standard output that remembers the pieces in which it was written."""

    def __init__(self):
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def talk(monkeypatch, folder: str, lines: list[str], **flags) -> tuple[str, str, list[str]]:
    """Say the lines in this process; return standard output, standard error, and the pieces of the first."""
    words = command("interactive_chat", {"pretrain": folder, "max_len": 60, **flags})[3:]
    screen, told = Screen(), Screen()
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", told)
    chat(parse(ChatConfig, [word for word in words if word != "True"], "interactive_chat")[0])
    return screen.getvalue(), told.getvalue(), [piece for piece in screen.pieces if piece]


def greedy(folder: str, text: str, most: int = 60, penalty: float = 1.2) -> str:
    """Return what transformers answers to a text, without special tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        whole = model.generate(ids, max_length=most, do_sample=False, repetition_penalty=penalty)
    return tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)


def shown(answer: str) -> str:
    """Return what a terminal gets of an answer."""
    return "".join(sign for sign in answer if sign in "\n\t" or unicodedata.category(sign) != "Cc")


def test_a_text_grows_by_every_line_and_answer(folder, monkeypatch):
    lines = [LINES[0], "/set max_len 200", LINES[1]]
    said, _, pieces = talk(monkeypatch, folder, lines, greedy_sampling=True)
    first = greedy(folder, text := f"User: {LINES[0]}\nAssistant: ")
    second = greedy(folder, f"{text}{first}\nUser: {LINES[1]}\nAssistant: ", 200)
    assert said == f"{shown(first)}\n{shown(second)}\n"
    assert len(pieces) > 20


def test_messages_grow_under_a_chat_template(folder, monkeypatch):
    said, _, _ = talk(monkeypatch, folder, [LINES[0], "/set max_len 200", LINES[1]], apply_chat_template=True,
                      greedy_sampling=True)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages, expected = [], []
    for line, most in zip(LINES, (60, 200), strict=True):
        messages.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected.append(greedy(folder, text, most))
        messages.append({"role": "assistant", "content": expected[-1]})
    assert said == "".join(f"{shown(answer)}\n" for answer in expected)


def test_forgetting_makes_the_next_line_the_first_one(folder, monkeypatch):
    lines = [LINES[0], "/reset", LINES[0], "clear", LINES[0]]
    said, told, _ = talk(monkeypatch, folder, lines, greedy_sampling=True)
    third = len(said) // 3
    assert said == said[:third] * 3 and said.endswith("\n")
    assert told.count("forgotten") == 2


def test_the_sampling_changes_while_one_talks(folder, monkeypatch):
    lines = ["/set temperature 0", LINES[0], "/reset", "/set repetition_penalty 1", LINES[0], "/show"]
    said, told, _ = talk(monkeypatch, folder, lines, temperature=5)
    text = f"User: {LINES[0]}\nAssistant: "
    assert said == "".join(f"{greedy(folder, text, penalty=penalty)}\n" for penalty in (1.2, 1.0))
    assert told.rstrip().endswith(
        "temperature 0.0  top_p 0.9  repetition_penalty 1.0  greedy_sampling False  max_len 60  seed 42"
    )


def test_the_seed_repeats_a_conversation(folder, monkeypatch):
    first, again, other = (talk(monkeypatch, folder, LINES[:1], temperature=1.5, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set", "/set : can be one of temperature, top_p"),
        ("/set learning_rate 1", "/set learning_rate: can be one of temperature, top_p"),
        ("/set temperature warm", "/set temperature takes a number, got 'warm'"),
        ("/set top_p 2", "/set top_p must be at most 1, got 2"),
        ("/set max_len", "/set max_len takes one value, got none"),
        ("/quit", "/quit is nothing that a line can say to the program:\n/reset or clear"),
        ("/help", "/exit or exit       leave"),
        ("a " * 80, "the conversation leaves no room for an answer within max_len 60: /reset forgets it"),
        ("", "talking to"),
    ],
)
def test_a_line_to_the_program_is_answered_beside_the_conversation(folder, monkeypatch, line, says):
    said, told, _ = talk(monkeypatch, folder, [line, "exit", LINES[0]])
    assert said == "" and says in told


def test_what_begins_a_conversation_and_what_ends_a_prompt(folder, monkeypatch, tmp_path):
    (tmp_path / "begin.txt").write_text("Be short.\n")
    flags = {
        "ta_prompt": tmp_path / "begin.txt",
        "enable_csft": True,
        "csft_prompt": "<s>: 4",
        "greedy_sampling": True,
    }
    said, _, _ = talk(monkeypatch, folder, LINES[:1], **flags)
    assert said == shown(greedy(folder, f"Be short.\nUser: {LINES[0]}\nAssistant: <s>: 4 ")) + "\n"


def test_a_pipe_gets_the_answers_and_nothing_else(folder):
    words = command("interactive_chat", {"pretrain": folder, "max_len": 60}, ("greedy_sampling",))
    done = subprocess.run(
        words,
        input=f"{LINES[0]}\n/exit\nmore\n".encode(),
        capture_output=True,
        env=environment(),
        cwd=ROOT,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == greedy(folder, f"User: {LINES[0]}\nAssistant: ") + "\n"
    assert done.stderr.decode().splitlines() == [
        f"talking to {folder}; /help lists what a line can say to the program"
    ]


def test_no_answer_commands_the_terminal(capsys):
    _show("a\x1b]52;c;cm0=\x07b\x1b[2Jc\x9b31md\re\x7f")
    _show("\tf\ng é 中 👩\u200d🚀")
    assert capsys.readouterr().out == "a]52;c;cm0=b[2Jc31mde\tf\ng é 中 👩\u200d🚀"


def test_a_reward_model_does_not_talk(monkeypatch, tmp_path):
    with pytest.raises(DataError, match="this is a reward model or critic"):
        talk(monkeypatch, tiny_reward_model(tmp_path / "rm"), LINES)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "--pretrain is missing"),
        ("--pretrain m --ta_prompt nowhere.txt", "--ta_prompt nowhere.txt: there is no such file"),
        ("--pretrain m --apply_chat_template --ta_prompt README.md", "--ta_prompt begins a text"),
        ("--pretrain m --top_p 0", "--top_p must be above 0"),
        ("--pretrain m --input_template {}{}", "--input_template '{}{}' needs one {}"),
    ],
)
def test_wrong_flags_are_refused_at_once(words, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=says.replace("{", r"\{")):
        parse(ChatConfig, words.split(), "interactive_chat")
