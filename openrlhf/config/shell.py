"""The words of a shell script and where they stand, as far as rewriting the flags of its commands needs it.

Quotes, escapes, comments, continued lines, substitutions and here-documents are known; nothing is expanded or run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

BLANK = re.compile(r"(?:[ \t]|\\\n)+")
PLAIN = re.compile(r"[^\s'\"\\$`#;&|()<>]+|#|\$")
DOUBLE = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
SINGLE = re.compile(r"'[^']*'")
ESCAPED = re.compile(r"\$'(?:[^'\\]|\\.)*'", re.DOTALL)
BACKTICKS = re.compile(r"`[^`]*`")
HERE_DOCUMENT = re.compile(r"<<(-?)[ \t]*(['\"]?)(\w+)\2")


@dataclass(frozen=True)
class Word:
    """One word of a command.

    Attributes:
        start: of its first character in the script.
        end: behind its last one.
        text: as it is written, with its quotes.
    """

    start: int
    end: int
    text: str

    @property
    def inside(self) -> Word:
        """What stands between the quotes of a word that is one string; a word without them is itself."""
        if len(self.text) >= 2 and self.text[0] == self.text[-1] and self.text[0] in "'\"":
            return Word(self.start + 1, self.end - 1, self.text[1:-1])
        return self


def commands(text: str, start: int = 0, end: int | None = None) -> Iterator[list[Word]]:
    """Yield the words of every command of ``text``, in order; those of a here-document follow its command.

    A redirection ends a command; what stands behind it is another.
    """
    words: list[Word] = []
    documents: list[tuple[str, bool]] = []
    place, end = start, len(text) if end is None else end
    while place < end:
        if blank := BLANK.match(text, place, end):
            place = blank.end()
        elif text[place] == "#":
            place = _line_end(text, place, end)
        elif document := HERE_DOCUMENT.match(text, place, end):
            documents.append((document[3], bool(document[1])))
            place = document.end()
        elif text[place] in "\n;&|()<>":
            if words:
                yield words
            words, ended = [], text[place] == "\n"
            place += 1
            while ended and documents:
                body = place
                body_end, place = _document_end(text, place, end, *documents.pop(0))
                yield from commands(text, body, body_end)
        else:
            stop = _word_end(text, place, end)
            if not (text[place:stop].isdigit() and text[stop : stop + 1] in ("<", ">")):
                words.append(Word(place, stop, text[place:stop]))
            place = stop
    if words:
        yield words


def _line_end(text: str, place: int, end: int) -> int:
    found = text.find("\n", place, end)
    return end if found < 0 else found


def _document_end(text: str, place: int, end: int, mark: str, indented: bool) -> tuple[int, int]:
    """Return where a here-document ends, and where its closing line does."""
    closing = re.compile(rf"^{chr(9) + '*' if indented else ''}{re.escape(mark)}$", re.MULTILINE)
    found = closing.search(text, place, end)
    return (found.start(), found.end()) if found else (end, end)


def _word_end(text: str, place: int, end: int) -> int:
    """Return where the word that begins at ``place`` ends."""
    start = place
    while place < end:
        if text[place] == "\\":
            if text[place + 1 : place + 2] == "\n":
                break
            place = min(place + 2, end)
        elif text.startswith(("$(", "${"), place):
            place = _closed(text, place + 1, end)
        elif quoted := _quoted(text, place, end):
            place = quoted.end()
        elif plain := PLAIN.match(text, place, end):
            place = plain.end()
        elif text[place] in "'\"`":  # that nothing closes
            place += 1
        else:
            break
    return place if place > start else start + 1


def _quoted(text: str, place: int, end: int) -> re.Match | None:
    patterns = (DOUBLE, SINGLE, ESCAPED, BACKTICKS)
    return next((found for pattern in patterns if (found := pattern.match(text, place, end))), None)


def _closed(text: str, place: int, end: int) -> int:
    """Return behind the bracket that closes the one at ``place``."""
    opening, depth = text[place], 0
    closing = {"(": ")", "{": "}"}[opening]
    while place < end:
        if quoted := _quoted(text, place, end):
            place = quoted.end()
            continue
        depth += (text[place] == opening) - (text[place] == closing)
        place += 1
        if depth == 0:
            break
    return place
