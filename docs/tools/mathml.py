"""Hooks of MkDocs: formulas become MathML, which browsers draw themselves, and roles of docstrings become code.

So the site needs no network and no script for mathematics.
"""

from __future__ import annotations

import re
from html import unescape

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data):<code>~?(?:[\w.]+\.)?(\w+)</code>")


def on_page_content(html: str, **_: object) -> str:
    """Return the page with its formulas drawn and without the role names of docstrings."""
    return ROLE.sub(r"<code>\1</code>", FORMULA.sub(_drawn, html))


def _drawn(found: re.Match[str]) -> str:
    latex = unescape(found.group(2)).strip()[2:-2]
    drawn = convert(latex, display="inline" if found.group(1) == "span" else "block")
    if "\\" in drawn:
        raise ValueError(f"a command of this formula is not known and would be shown as it is written: {latex}")
    return drawn
