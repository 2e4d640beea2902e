"""The browser of rollouts in a report: what a page holds, and what a real browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from openrlhf.trainer.report import write_report
from openrlhf.trainer.report_browser import MOST_SAMPLES, SCRIPT, browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ATTACK = "</pre></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="looks at the page with Chromium, which is not installed")


def answer(step, uid, sample, reward, words, when="train", **more):
    """Return a line of samples.jsonl whose tokens are ``words``."""
    count = len(words)
    tokens = {
        "text": words,
        "mask": [1] * count,
        "engine_log_prob": [-0.1 * (n + 1) for n in range(count)],
    }
    if when == "train":
        tokens["log_prob"] = [-0.1 * (n + 1) for n in range(count - 1)] + [-2.0]
        tokens["advantage"] = [reward - 0.5] * count
        tokens["ref_log_prob"] = [-0.3] * count
    response = "".join(words)
    shared = {"when": when, "step": step, "temperature": 1.0, "uid": uid, "sample": sample, "reward": reward}
    asked = f"<|im_start|>user\nquestion {uid} of {when}<|im_end|>"
    return {**shared, "prompt": asked, "response": response, "length": count, "label": f"label {uid}",
            "finish_reason": "stop", "true_score": None, "parts": {}, "tokens": tokens, **more}  # fmt: skip


def a_run():
    """Two prompts of training at two steps, two answers each, and one of evaluation; one answer attacks the page."""
    lines = [answer(0, "1", 0, 0.0, ["no", " idea"], "before")]
    for step in (1, 2):
        lines += [answer(step, "1", n, float(n), ["good", " day"], parts={"function": 0.25}) for n in (0, 1)]
        lines += [answer(step, "22", n, 0.5, ["needle" if n else "hay", ATTACK]) for n in (0, 1)]
    lines[-1] |= {"finish_reason": "length", "length": 900}
    return [*lines, answer(2, "1", 0, 1.0, ["an", " idea"], "after")]


class Page(HTMLParser):
    """What a page shows: texts of prompts, headings of groups, and answers with the colours of their tokens."""

    def __init__(self, text):
        super().__init__()
        self.prompts, self.steps, self.answers, self.asked, self.facts, self.tokens = [], [], [], [], [], []
        self.title, self._stack = "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        place = (tag, found.get("id"), found.get("class") or "")
        if tag in ("meta", "input", "br", "img", "path", "use"):
            return
        if tag == "pre" and "tokens" in place[2]:
            self.tokens.append([])
        elif tag == "span" and self._inside("pre", "tokens"):
            self.tokens[-1].append([found.get("style") or "", found.get("title") or "", ""])
        elif tag == "button":
            self.prompts.append("")
        self._stack.append(place)

    def handle_endtag(self, tag):
        while self._stack and self._stack.pop()[0] != tag:
            continue

    def handle_data(self, data):
        tag, _, name = self._stack[-1] if self._stack else ("", None, "")
        if tag == "title":
            self.title += data
        elif self._inside("pre", "tokens"):
            self.tokens[-1][-1][2] += data
        elif any(place[0] == "button" for place in self._stack):
            self.prompts[-1] += data + "|"
        elif tag == "h3" and any(place[1] == "groups" for place in self._stack):
            self.steps.append(data)
        elif tag == "pre" and any(place[1] == "groups" for place in self._stack):
            self.asked.append(data)
        elif any("facts" in place[2] for place in self._stack):
            self.facts.append(data)

    def _inside(self, tag, name):
        return any(place[0] == tag and name in place[2] for place in self._stack)

    @property
    def texts(self):
        return ["".join(token[2] for token in tokens) for tokens in self.tokens]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in a_run()))
    return write_report(folder)


@pytest.fixture(scope="module")
def look(report, tmp_path_factory):
    """Return what Chromium makes of the page at an address that ends as given."""
    profile = tmp_path_factory.mktemp("profile")

    def dump(address=""):
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--virtual-time-budget=3000", "--dump-dom", f"{report.as_uri()}{address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return Page(done.stdout)

    return dump


def test_answers_are_data_that_cannot_end_their_element():
    page = browser(a_run())
    data = re.search(r'<script type="application/json" id="samples">(.*?)</script>', page, re.DOTALL).group(1)
    assert json.loads(data) == a_run()
    assert not set("<>&") & set(data)
    assert page.count("<script") == page.count("</script>") == 2


def test_a_page_may_run_its_own_script_and_load_nothing(report):
    page = report.read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page).group(1)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert script == SCRIPT
    assert policy.split("; ")[0] == "default-src 'none'"
    assert f"script-src 'sha256-{digest}'" in policy.split("; ")
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<script")


def test_the_script_never_writes_markup():
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|fetch\(", SCRIPT)


def test_numbers_that_json_has_no_word_for_are_null():
    page = browser([{"step": 1, "reward": math.nan, "tokens": {"advantage": [math.inf, 1.0]}}])
    data = json.loads(re.search(r'id="samples">(.*?)</script>', page, re.DOTALL).group(1))
    assert data == [{"step": 1, "reward": None, "tokens": {"advantage": [None, 1.0]}}]


def test_a_file_of_any_length_gives_a_page_of_bounded_length():
    lines = [{"step": step, "uid": str(n)} for step in range(2000) for n in range(8)]
    data = json.loads(re.search(r'id="samples">(.*?)</script>', browser(lines), re.DOTALL).group(1))
    assert len(data) <= MOST_SAMPLES + 16
    steps = [line["step"] for line in data]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 1999


def test_without_samples_there_is_no_browser():
    assert browser([]) == ""


@needs_chromium
def test_prompts_are_listed_and_the_first_shows_all_its_answers_by_step(look):
    page = look()
    assert [prompt.split("|")[0] for prompt in page.prompts] == [
        "user question 1 of before", "user question 1 of train", "user question 22 of train",
    ]  # fmt: skip
    assert page.prompts[1].split("|")[1] == "prompt 1 \u00b7 4 answers \u00b7 2 steps \u00b7 reward 0 to 1"
    assert page.steps == ["step 0, evaluation at T=1", "step 2, evaluation at T=1"]
    assert page.texts == ["no idea", "an idea"]


@needs_chromium
def test_a_picked_prompt_is_followed_across_steps_with_its_tokens_coloured(look):
    page = look("#prompt=train:1&colour=advantage")
    assert page.steps == ["step 1 at T=1", "step 2 at T=1"]
    assert page.texts == ["good day"] * 4
    worse, better = page.tokens[0][0], page.tokens[1][0]
    assert "204, 75, 92" in worse[0] and "58, 126, 191" in better[0]
    assert worse[1].split("\n")[:2] == ["log-prob -0.1", "advantage -0.5"]
    assert page.facts[:3] == ["reward 0", "function 0.25", "2 tokens"]


@needs_chromium
@pytest.mark.full
@pytest.mark.parametrize(
    ("colour", "coloured"),
    [
        ("none", [False, False]),
        ("log_prob", [True, True]),
        ("mask", [True, True]),
        ("engine", [False, True]),
        ("reference", [True, True]),
    ],
)
def test_every_figure_colours_the_tokens_that_it_says_something_of(look, colour, coloured):
    page = look(f"#prompt=train:1&colour={colour}")
    assert [bool(token[0]) for token in page.tokens[0]] == coloured


@needs_chromium
def test_search_leaves_the_prompts_whose_answers_hold_the_words_and_text_is_never_run(look, report):
    page = look("#search=NEEDLE")
    assert [prompt.split("|")[0] for prompt in page.prompts] == ["user question 22 of train"]
    assert page.texts[1].startswith(f"needle{ATTACK}")
    assert page.title == report.parent.name
    assert page.texts[3].endswith("898 more tokens")
    assert "cut at the limit" in page.facts


@needs_chromium
@pytest.mark.full
def test_nothing_found_and_an_address_of_nonsense_are_no_error(look):
    assert look("#search=nowhere").texts == []
    page = look("#colour=<b>&order=__proto__&show=eval&prompt=%00")
    assert [prompt.split("|")[0] for prompt in page.prompts] == ["user question 1 of before"]
    assert page.texts == ["no idea", "an idea"]
