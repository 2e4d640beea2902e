"""The rollout browser of a report: prompts to pick from, all kept answers to one, tokens coloured by a figure.

Its script and its style are rollout_browser.js and .css. The answers are data in the page, and the script writes them
as text only. The page forbids itself everything else: to run any other script, and to load anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

MOST_SAMPLES = 6000
"""Answers in a page. Runs keep fewer; files of other origin may hold any number."""


def _beside(name: str) -> str:
    """Return a text file of this package."""
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


BROWSER_CSS = _beside("rollout_browser.css")
SCRIPT = _beside("rollout_browser.js")

CONTROLS = """
<div class="card bar">
<input id="search" type="search" placeholder="search in prompts, answers and labels" aria-label="search">
<label>show <select id="show"><option value="all">everything</option><option value="train">training</option>
<option value="eval">evaluation</option></select></label>
<label>order <select id="order"><option value="number">by number</option><option value="low">lowest reward</option>
<option value="high">highest reward</option><option value="spread">largest spread of rewards</option></select></label>
<label>colour <select id="colour"><option value="none">none</option><option value="log_prob">log-prob</option>
<option value="advantage">advantage</option><option value="engine">ratio to the engine</option>
<option value="reference">ratio to the reference</option><option value="mask">mask</option></select></label>
<span id="legend"></span>
</div>
<noscript><p class="soft">The browser of rollouts needs JavaScript; all answers are in samples.jsonl.</p></noscript>
<div class="split"><div class="card" id="prompts"></div><div id="groups"></div></div>
"""


def browser(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the browser of the lines of ``samples.jsonl``; nothing where there are none."""
    if not samples:
        return ""
    data = f'<script type="application/json" id="samples">{_as_json(_thinned(samples))}</script>'
    return f"{CONTROLS}{data}<script>{SCRIPT}</script>"


def content_policy() -> str:
    """Return the element of a page's head that lets it run the browser's script and nothing else, and load nothing."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    rules = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
    return f'<meta http-equiv="Content-Security-Policy" content="{rules}">'


def _as_json(value: Any) -> str:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(_finite(value), separators=(",", ":"), default=str)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    """Return the value with null for numbers that JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _thinned(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the samples of steps spread evenly over the run, so that there are not too many."""
    every = math.ceil(len(samples) / MOST_SAMPLES)
    steps = sorted({str(sample.get("step")) for sample in samples}, key=lambda step: (len(step), step))
    kept = set(steps[::every]) | set(steps[-1:])
    return [sample for sample in samples if str(sample.get("step")) in kept]
