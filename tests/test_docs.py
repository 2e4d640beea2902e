"""The documentation: it builds without a warning, its links and commands are right, and no algorithm is missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module
from importlib.util import find_spec

import pytest

from openrlhf.cli.train_ppo_ray import placement_problems
from openrlhf.config.algorithms import ESTIMATORS, PAIR_LOSSES, POLICY_LOSSES
from openrlhf.config.arguments import parse
from openrlhf.config.flags import flag_table
from openrlhf.trainer.alarms import PPO_ALARMS, loss_alarms
from tests import test_documented_commands as documented

DOCS = documented.ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CONFIGS = {**documented.CONFIGS, "lora_combiner": "CombinerConfig", "interactive_chat": "ChatConfig"}
MODULES = {**documented.MODULES, "lora_combiner": "combiner", "interactive_chat": "chat"}
TOOLS = ("mkdocs", "material", "mkdocstrings", "mkdocstrings_handlers", "latex2mathml")
OF_OTHER_PROGRAMS = {"dry_run", "config", "help", "module", "master_port", "init", "generate", "runtime"}
OF_OTHER_VERSIONS = {
    *("async_train", "partial_rollout", "agent_func_path", "image_key", "ds_tensor_parallel_size", "deepcompile"),
    *("attn_implementation", "param_dtype", "max_new_tokens", "dataset_split"),
}
"""Flags of other versions of OpenRLHF, which the pages on migration name."""
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
COMMANDS = [
    (page.relative_to(DOCS).as_posix(), *command)
    for page in PAGES
    for command in documented.commands_of("\n".join(documented.shell_blocks(page.read_text())))
]


def prose(page):
    """Return the text of a page without its blocks of code."""
    return FENCE.sub("", page.read_text())


def anchors(page):
    """Return the names that headings of a page can be linked by."""
    titles = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def config_of(name):
    return getattr(import_module(f"openrlhf.config.{MODULES.get(name, 'supervised')}"), CONFIGS[name])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [command[1:] for command in COMMANDS],
    ids=[f"{page}-{name}" for page, name, _ in COMMANDS],
)
def test_every_command_of_the_documentation_parses(name, arguments, monkeypatch):
    monkeypatch.chdir(documented.ROOT)
    also = placement_problems if name == "train_ppo_ray" else None
    _, dry_run = parse(config_of(name), [*arguments, "--dry_run"], name, also)
    assert dry_run


def test_every_command_has_a_page_that_shows_it():
    assert {name for _, name, _ in COMMANDS} == set(CONFIGS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_commands_stand_in_blocks_of_bash_and_scripts_exist(page):
    for language, block in FENCE.findall(page.read_text()):
        assert language == "bash" or not re.search(r"openrlhf\.cli\.\w+ ", block)
        for script in re.findall(r"^bash (\S+)", block if language == "bash" else "", flags=re.MULTILINE):
            assert (documented.ROOT / script).is_file()
    for path in re.findall(r"`(?:bash )?((?:examples|tests|benchmarks)/[\w./]+)", prose(page)):
        assert (documented.ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_a_flag_that_a_page_names_is_one_of_a_command(page):
    known = {name for command in CONFIGS for name in flag_table(config_of(command))} | OF_OTHER_PROGRAMS
    if page.parent.name == "migration":
        known |= OF_OTHER_VERSIONS
    named = set(re.findall(r"--([a-z]\w*)(?![\w.])", re.sub(r"\]\([^)]*\)", "", prose(page))))
    assert named - known == set()


def test_every_algorithm_has_a_page_that_shows_how_to_choose_it():
    text = "".join(page.read_text() for page in (DOCS / "algorithms").glob("*.md") if page.name != "index.md")
    wanted = [f"--advantage_estimator {name}" for name in ESTIMATORS]
    wanted += [f"--policy_loss_type {name}" for name in POLICY_LOSSES]
    wanted += [f"--loss {name}" for name in PAIR_LOSSES]
    assert [words for words in wanted if not re.search(rf"{words}\b", text)] == []


@pytest.mark.parametrize("page", sorted((DOCS / "algorithms").glob("*.md")), ids=lambda page: page.stem)
def test_a_page_of_an_algorithm_has_what_a_reader_comes_for(page):
    if page.name == "index.md":
        return
    text = page.read_text()
    assert "$" in prose(page) and "**When.**" in text
    assert documented.commands_of(text)


def test_the_parity_page_names_every_deviation_of_a_default():
    from tests.test_flags import DEVIATIONS

    text = (DOCS / "migration/parity.md").read_text()
    assert [name for name, *_ in DEVIATIONS if f"`--{name}`" not in text] == []


def test_every_alarm_is_explained():
    text = (DOCS / "guides/troubleshooting.md").read_text()
    alarms = [*PPO_ALARMS, *loss_alarms("loss")]
    assert [alarm.name for alarm in alarms if f"| `{alarm.name}` |" not in text] == []


class Resources(HTMLParser):
    """Collects what a page loads by itself."""

    def __init__(self, text):
        super().__init__()
        self.loaded = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in ("script", "img", "iframe"):
            self.loaded.append(found.get("src") or "")
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.loaded.append(found.get("href") or "")


@pytest.mark.skipif(
    not all(map(find_spec, TOOLS)), reason="builds with mkdocs: pip install 'openrlhf[docs]' has what it needs"
)
def test_the_site_builds_without_a_warning_and_loads_nothing_from_the_network(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=documented.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert 'class="arithmatex"' not in text
        assert [name for name in Resources(text).loaded if "//" in name] == []
    assert "<math" in (tmp_path / "site/algorithms/ppo.html").read_text()
    assert "approx_kl" in (tmp_path / "site/api.html").read_text()
