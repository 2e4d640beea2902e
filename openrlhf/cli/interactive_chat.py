"""Talk to a model in the terminal, or through a pipe.

    python -m openrlhf.cli.interactive_chat --pretrain MODEL --apply_chat_template
    echo "What is 12 + 30?" | python -m openrlhf.cli.interactive_chat --pretrain MODEL

Answers, and nothing else, go to standard output, piece by piece. /help lists what a line can say to the program.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from openrlhf.cli.common import libraries_hushed, run
from openrlhf.config.chat import SETTABLE, ChatConfig
from openrlhf.config.flags import flag_table
from openrlhf.config.plan import setting_sections

if TYPE_CHECKING:
    from openrlhf.inference.chat import Talker

HELP = f"""/reset or clear     forget what was said
/set NAME VALUE     change the sampling: {", ".join(SETTABLE)}
/show               show the sampling
/exit or exit       leave; the end of the input does too
A line that is meant for the model and begins with / gets a space before it."""
CONTROLS = dict.fromkeys(code for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t")
"""Characters that may command a terminal: to move the cursor, set its title, read its clipboard."""


def plan(config: ChatConfig, _: int) -> list[str]:
    """Return what would be done."""
    how = "its chat template" if config.apply_chat_template else f"the template {config.input_template!r}"
    return setting_sections(config, [f"talk to {config.pretrain} with {how}", _shown(config)])


def chat(config: ChatConfig) -> None:
    """Answer the lines of standard input until they end. Raises the errors of :mod:`openrlhf.errors`."""
    with libraries_hushed():
        from openrlhf.inference.chat import Talker

        talker = Talker(config)
    _tell(f"talking to {config.pretrain}; /help lists what a line can say to the program")
    try:
        while (line := _next_line()) is not None:
            if line in ("/exit", "exit"):
                break
            config = _obey(line, config, talker)
    except KeyboardInterrupt:
        _tell("")


def _obey(line: str, config: ChatConfig, talker: Talker) -> ChatConfig:
    """Do what a line says; return the settings from now on."""
    if line in ("/reset", "clear"):
        talker.conversation.reset()
        _tell("forgotten")
    elif line == "/show":
        _tell(_shown(config))
    elif line == "/help":
        _tell(HELP)
    elif line.startswith("/set"):
        return _changed(line.split()[1:], config)
    elif line.startswith("/"):
        _tell(f"{line.split()[0]} is nothing that a line can say to the program:\n{HELP}")
    elif line:
        if talker.answer(line, config, _show):
            _show("\n")
        else:
            _tell(f"the conversation leaves no room for an answer within max_len {config.max_len}: /reset forgets it")
    return config


def _changed(words: list[str], config: ChatConfig) -> ChatConfig:
    """Return ``config`` with the flag of ``words`` set; as it is, with a word why, where that cannot be."""
    name, values = "".join(words[:1]).removeprefix("--"), words[1:]
    if name not in SETTABLE:
        _tell(f"/set {name}: can be one of {', '.join(SETTABLE)}, as in /set temperature 0.7")
        return config
    try:
        value = flag_table(ChatConfig)[name].convert(values)
    except ValueError as error:
        _tell(f"/set {name} {error}")
        return config
    config = replace(config, **{name: value})
    _tell(_shown(config))
    return config


def _shown(config: ChatConfig) -> str:
    return "  ".join(f"{name} {getattr(config, name)}" for name in SETTABLE)


def _next_line() -> str | None:
    """Return the next line, without the spaces behind it; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").rstrip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        _tell(f"a line that is no UTF-8 text was left out: {error}")
        return ""


def _show(text: str) -> None:
    """Print a piece of an answer, without what a terminal would take for a command."""
    print(text.translate(CONTROLS), end="", flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(ChatConfig, chat, "interactive_chat", plan)
