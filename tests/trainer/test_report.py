"""The report of a run: what it reads, how it groups numbers, and the page it writes."""

import json
import random
from html.parser import HTMLParser

import pytest

from openrlhf.trainer.report import write_report
from openrlhf.trainer.report_series import (
    TIME,
    Series,
    group,
    headlines,
    is_noisy,
    json_lines,
    read_series,
    smoothed,
)


def write_metrics(folder, records):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def a_run(folder, steps=50):
    """Leave what a PPO run leaves: noisy metrics, an evaluation now and then, samples, flags and a torn last line."""
    noise = random.Random(0)
    records = []
    for step in range(1, steps + 1):
        times = {"time/generate": 2.0, "time/train": 1.0 + noise.random(), "time/total": 3.5}
        metrics = {"reward": step / steps + noise.random(), "kl": 0.01 * step, "actor_lr": 1e-6, "critic_loss": None}
        records.append({"step": step, "epoch": 1, "phase": "train", **metrics, **times})
        if step % 10 == 0:
            records.append({"step": step, "epoch": 1, "phase": "eval", "true_score": step / steps})
    write_metrics(folder, records)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 51, "rew')
    samples = [
        {"step": 0, "prompt": "2 + 2?", "response": "before <b>", "reward": 0.1, "label": "4", "when": "before"},
        {"step": 50, "prompt": "2 + 2?", "response": "after & 4", "reward": 0.9, "true_score": 1.0, "when": "after"},
        {"step": 9, "prompt": "in between", "response": "</pre><script>alert(1)</script>", "when": "train"},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    (folder / "config.json").write_text(
        json.dumps({"pretrain": "<tiny>", "adam_betas": [0.9, 0.95], "zero": {"stage": 2}})
    )
    return folder


class Tags(HTMLParser):
    """Collects the tags, attributes and text of a page and checks that every tag is closed."""

    VOID = {"meta", "br", "path", "use", "input"}

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.links, self.text = [], [], [], ""
        self.samples = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href") and value]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["script"]:
            self.text += data
        elif data.startswith("["):
            self.samples = json.loads(data)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = a_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(run_folder):
    return Tags((run_folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_needs_nothing_outside_itself(page):
    assert page.open == []
    assert not {"link", "img", "iframe"} & set(page.seen)
    assert page.seen.count("script") == 2
    assert all(link.startswith("#") for link in page.links)


def test_the_page_has_one_drawing_for_each_group_of_numbers(page):
    assert page.seen.count("svg") == 5


def test_text_of_models_is_shown_and_never_run(page):
    for text in ("before <b>", "after & 4", "<tiny>", "zero.stage", "expected: 4"):
        assert text in page.text
    assert "</pre><script>alert(1)</script>" in [sample["response"] for sample in page.samples]


def test_before_stands_beside_after(page):
    assert page.text.index("before <b>") < page.text.index("after & 4")
    assert [sample["when"] for sample in page.samples] == ["before", "after", "train"]


def test_after_is_the_end_of_a_run_that_was_made_longer(tmp_path):
    answers = [("before", 0, "first"), ("after", 5, "first end"), ("after", 9, "last end")]
    samples = [{"step": step, "when": when, "prompt": "?", "response": text} for when, step, text in answers]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    page = Tags(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "last end" in page.text and "first end" not in page.text


def test_the_page_begins_with_where_numbers_began_and_ended(page):
    assert "eval true_score0.2 \N{RIGHTWARDS ARROW} 1" in page.text


def test_the_drawings_take_the_text_colour_of_the_page(run_folder):
    assert "currentColor" in (run_folder / "report.html").read_text(encoding="utf-8")


def test_the_curves_are_a_picture_too(run_folder):
    assert (run_folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(run_folder.glob("*.tmp"))


def test_an_empty_folder_gives_a_page_that_says_what_is_missing(tmp_path):
    path = write_report(tmp_path)
    text = path.read_text(encoding="utf-8")
    for missing in ("No metrics were recorded", "No samples were recorded", "No configuration"):
        assert missing in text
    assert not (tmp_path / "curves.png").exists()


@pytest.mark.filterwarnings("error")
def test_a_single_step_strange_names_and_broken_files_are_drawn_without_complaint(tmp_path):
    write_metrics(
        tmp_path, [{"step": 1, "cost in $x_$": 1.0, "_hidden": 2, "flag": True, "time/a": 1, "note": "text"}]
    )
    (tmp_path / "config.json").write_text("not json")
    (tmp_path / "samples.jsonl").write_text('[1, 2]\n{"response": "\u2028kept"}\nbroken')
    page = Tags(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.seen.count("svg") == 3
    assert [sample["response"] for sample in page.samples] == ["\u2028kept"]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(OSError):
        write_report(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["loss", "eval_loss", "eval/loss", "eval loss"])
def test_every_spelling_of_an_evaluation_metric_is_one_series(tmp_path, name):
    write_metrics(tmp_path, [{"step": 3, "phase": "eval", name: 1.0}])
    assert read_series(tmp_path / "metrics.jsonl") == [Series("eval loss", [3], [1.0])]


def test_series_are_in_the_order_of_steps_and_a_repeated_step_counts_once(tmp_path):
    write_metrics(
        tmp_path, [{"step": step, "loss": value} for step, value in [(1, 1.0), (3, 9.0), (2, 2.0), (3, 3.0)]]
    )
    assert read_series(tmp_path / "metrics.jsonl") == [Series("loss", [1, 2, 3], [1.0, 2.0, 3.0])]


def test_what_is_not_a_finite_number_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": null, "b": NaN, "c": true, "d": "x", "e": 1}\n')
    assert [series.name for series in read_series(tmp_path / "metrics.jsonl")] == ["e"]


def test_a_torn_line_is_skipped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b": 2')
    assert json_lines(tmp_path / "x.jsonl") == [{"a": 1}]


def test_numbers_of_one_kind_share_a_panel_and_others_get_their_own():
    names = ["reward", "eval reward", "kl", "kl_coef", "response_length", "policy_loss", "critic_loss", "gpt_loss"]
    names += ["eval true_score", "acc", "lr", "sync_gap", "time/train", "time/generate", "surprise"]
    panels = {
        panel.title: [one.name for one in panel.series] for panel in group([Series(n, [1], [1.0]) for n in names])
    }
    assert panels["Reward"] == ["reward", "eval reward"]
    assert panels["True score"] == ["eval true_score"]
    assert panels["KL"] == ["kl"] and panels["KL coefficient"] == ["kl_coef"]
    assert panels["Policy loss"] == ["policy_loss"] and panels["Loss"] == ["gpt_loss"]
    assert panels["surprise"] == ["surprise"]
    assert panels[TIME] == ["train", "generate"] and list(panels)[-1] == TIME
    assert sum(map(len, panels.values())) == len(names)


def test_an_alarm_is_drawn_only_if_it_was_raised(tmp_path):
    silent, raised = "alarm/kl", "alarm/reward_hacking"
    write_metrics(
        tmp_path, [{"step": step, "reward": 1.0, silent: 0.0, raised: float(step > 2)} for step in (1, 2, 3)]
    )
    series = read_series(tmp_path / "metrics.jsonl")
    assert [one.name for one in series] == ["reward", raised]
    assert [[one.name for one in panel.series] for panel in group(series)] == [[raised], ["reward"]]


def test_headlines_compare_the_two_ends_of_a_series():
    series = [Series("reward", list(range(100)), [float(x) for x in range(100)]), Series("kl", [1], [1.0])]
    (only,) = headlines(series)
    assert (only.name, only.first, only.last, only.width) == ("reward", 4.5, 94.5, 10)


def test_smoothing_keeps_a_constant_and_damps_noise():
    assert smoothed([2.0] * 50) == pytest.approx([2.0] * 50)
    wiggle = [float(step % 2) for step in range(200)]
    assert is_noisy(wiggle) and not is_noisy(wiggle[:40]) and not is_noisy([float(step) for step in range(200)])
    assert max(smoothed(wiggle)[50:]) - min(smoothed(wiggle)[50:]) < 0.25
