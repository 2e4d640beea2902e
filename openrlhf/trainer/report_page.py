"""The page of a report: one HTML file in the reader's light or dark colours, without other files or network."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from openrlhf.trainer.report_browser import BROWSER_CSS, browser, content_policy
from openrlhf.trainer.report_series import Headline

MOST_PAIRS = 24

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #23272f; --soft: #68707e; --line: #e1e4ea;
  --mark: #3a7ebf }
@media (prefers-color-scheme: dark) { :root { --page: #15171c; --card: #1e2128; --ink: #dfe3ea; --soft: #99a1af;
  --line: #31353f; --mark: #6aa9e4 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1500px; padding: 32px 24px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif }
h1 { font-size: 26px; margin: 0 0 4px }
h2 { font-size: 18px; margin: 40px 0 14px }
.soft { color: var(--soft); font-size: 13px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); margin-top: 20px }
.tiles b { display: block; font-size: 20px; font-variant-numeric: tabular-nums }
.tiles i { color: var(--soft); font-style: normal; font-weight: 400 }
.curves { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)) }
.curves svg { display: block; width: 100%; height: auto }
.sample { margin-bottom: 14px }
.pair { display: flex; gap: 14px; margin-top: 10px }
.pair > div { flex: 1; border-left: 3px solid var(--line); padding-left: 12px; min-width: 0 }
.pair h3 { margin: 0 0 6px; font-size: 12px; letter-spacing: .06em; text-transform: uppercase; color: var(--mark) }
pre { margin: 0; max-height: 320px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace }
p.soft { margin: 6px 0 0 }
.settings { columns: 420px; column-gap: 32px }
.settings div { display: flex; justify-content: space-between; gap: 16px; border-bottom: 1px solid var(--line);
  break-inside: avoid; padding: 3px 0; font-size: 13px }
.settings code { overflow-wrap: anywhere; text-align: right; white-space: pre-wrap }
.settings span { color: var(--soft) }
summary { cursor: pointer; color: var(--mark); margin: 12px 0 }
@media (max-width: 860px) { .pair { flex-direction: column } .curves { grid-template-columns: 1fr } }
"""


def render(
    title: str,
    headlines: Sequence[Headline],
    curves: Sequence[str],
    samples: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> str:
    """Return the page. ``curves`` are SVG elements; everything else is text and gets escaped."""
    charts = "".join(f'<div class="card">{svg}</div>' for svg in curves)
    settings = "".join(
        f"<div><span>{escape(name)}</span><code>{escape(value)}</code></div>" for name, value in _flat(config)
    )
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="tiles">{"".join(map(_tile, headlines))}</div>' if headlines else "",
        _section("Curves", f'<div class="curves">{charts}</div>' if charts else "", "No metrics were recorded."),
        _section("Before and after", pairs, "") if (pairs := _pairs(samples)) else "",
        _section("Rollouts", browser(samples), "No samples were recorded."),
        _section(
            "Configuration", f'<div class="card settings">{settings}</div>' if settings else "", "No configuration."
        ),
    ]
    head = f'<meta charset="utf-8">{content_policy()}<meta name="viewport" content="width=device-width">'
    head = f"<head>{head}<title>{escape(title)}</title><style>{CSS}{BROWSER_CSS}</style></head>"
    return f'<!doctype html>\n<html lang="en">{head}<body>{"".join(body)}</body></html>\n'


def _section(title: str, content: str, otherwise: str) -> str:
    nothing = f'<p class="soft">{otherwise}</p>'
    return f"<h2>{title}</h2>{content or nothing}"


def _tile(headline: Headline) -> str:
    note = f"mean of the first and last {headline.width}" if headline.width > 1 else "first and last"
    values = f"<i>{headline.first:.4g} &rarr;</i> {headline.last:.4g}"
    name = f'<span class="soft">{escape(headline.name)}</span>'
    return f'<div class="card">{name}<b>{values}</b><span class="soft">{note}</span></div>'


def _pairs(samples: Sequence[Mapping[str, Any]]) -> str:
    """Return prompts with their answers before and after training."""
    by_prompt: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    # A run that was made longer has ended more than once.
    end = next((sample.get("step") for sample in reversed(samples) if sample.get("when") == "after"), None)
    for sample in samples:
        when = sample.get("when")
        if when == "before" or (when == "after" and sample.get("step") == end):
            by_prompt[str(sample.get("prompt", ""))].setdefault(str(sample["when"]), sample)
    cards = "".join(_card(prompt, answers) for prompt, answers in list(by_prompt.items())[:MOST_PAIRS])
    return f"<details><summary>Answers before and after training</summary>{cards}</details>" if cards else ""


def _card(prompt: str, answers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one prompt with its answers side by side; a missing half of a pair is said to be missing."""
    columns = "".join(f"<div><h3>{title}</h3>{_answer(answers.get(title))}</div>" for title in ("before", "after"))
    label = next((str(sample["label"]) for sample in answers.values() if sample.get("label") not in (None, "")), "")
    expected = f'<p class="soft">expected: {escape(label)}</p>' if label else ""
    return f'<div class="card sample"><pre>{escape(prompt)}</pre>{expected}<div class="pair">{columns}</div></div>'


def _answer(sample: Mapping[str, Any] | None) -> str:
    if sample is None:
        return '<p class="soft">not recorded</p>'
    facts = [f"{name.replace('_', ' ')} {_short(sample[name])}" for name in ("reward", "true_score") if name in sample]
    return f'<pre>{escape(str(sample.get("response", "")))}</pre><p class="soft">{escape(" · ".join(facts))}</p>'


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield the settings as text, those of a nested group under a dotted name."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value, default=str)
