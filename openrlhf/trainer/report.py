"""The report of a run: curves, samples before and after training, and the configuration, on one page.

Reads what a run leaves in its folder (``metrics.jsonl``, ``samples.jsonl``, ``config.json``, each of them optional)
and writes ``report.html`` and ``curves.png`` beside it. The door to matplotlib.
"""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

from openrlhf.trainer.report_page import render
from openrlhf.trainer.report_series import (
    SMOOTH_ABOVE,
    TIME,
    Panel,
    Series,
    group,
    headlines,
    is_noisy,
    json_lines,
    json_object,
    read_series,
    smoothed,
)

INK = "#343a46"
COLOURS = ("#3a7ebf", "#dd7733", "#36966a", "#a75fa8", "#c39b1f", "#cc4b5c", "#5fa8b8", "#7d8590")
STEPS_AS_BARS = 60
COLUMNS = 3

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.fonttype": "path",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def report_line(run_path: str | os.PathLike[str]) -> str:
    """Write the report and return where it is, in words, or why there is none; a run does not fail for it."""
    try:
        return f"report in {write_report(run_path)}"
    except OSError as error:
        return f"no report: {error}"


def write_report(run_path: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``curves.png`` into the run folder and return the path of the page.

    Numbers of any name are drawn; broken lines, as a crash leaves them, are skipped.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    folder = Path(run_path)
    series = read_series(folder / "metrics.jsonl")
    panels = group(series)
    page = render(
        title=folder.name,
        headlines=headlines(series),
        curves=[_as_svg(panel) for panel in panels],
        samples=json_lines(folder / "samples.jsonl"),
        config=json_object(folder / "config.json"),
    )
    if panels:
        _replace(folder / "curves.png", _as_png(panels))
    _replace(folder / "report.html", page.encode("utf-8"))
    return folder / "report.html"


def draw(panel: Panel, axes) -> None:
    """Draw one panel into matplotlib ``axes``."""
    from matplotlib.ticker import MaxNLocator

    if panel.title == TIME:
        _draw_times(panel.series, axes)
    else:
        for one, colour in zip(panel.series, COLOURS * len(panel.series)):
            _draw_line(one, colour, axes)
    axes.set_title(_plain(panel.title))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    if len(panel.series) > 1:
        _draw_legend(axes, len(panel.series))
    elif panel.series[0].name != panel.title:
        axes.set_title(_plain(panel.series[0].name), loc="right", fontsize=8, fontweight="normal")


def _draw_legend(axes, entries: int) -> None:
    """A legend in rows of three, in room of its own above the curves."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (0.05 + 0.1 * math.ceil(entries / 3)) * (high - low))
    axes.legend(loc="upper left", ncols=3, borderaxespad=0, columnspacing=1.2, handlelength=1.2)


def _draw_line(one: Series, colour: str, axes) -> None:
    """A line with points when there are few, a faint line under its average when it is long and noisy."""
    label, values = _plain(one.name), one.values
    if is_noisy(values):
        axes.plot(one.steps, values, color=colour, alpha=0.25, linewidth=0.8)
        values = smoothed(values)
    points = {"marker": "o", "markersize": 3} if len(values) <= SMOOTH_ABOVE else {}
    axes.plot(one.steps, values, color=colour, linewidth=1.7, label=label, **points)


def _plain(text: str) -> str:
    """Return a text that matplotlib neither reads as mathematics nor hides from the legend."""
    return text.replace("$", r"\$").lstrip("_")


def _draw_times(series: list[Series], axes) -> None:
    """Phases stacked over each other at each step; a total is a line."""
    import numpy

    phases = [one for one in series if one.name != "total"]
    steps = sorted({step for one in series for step in one.steps})
    floor = numpy.zeros(len(steps))
    for one, colour in zip(phases, COLOURS * len(phases)):
        at = dict(zip(one.steps, one.values, strict=True))
        height = numpy.array([at.get(step, 0.0) for step in steps])
        if len(steps) <= STEPS_AS_BARS:
            axes.bar(steps, height, 0.8 * _gap(steps), floor, color=colour, label=_plain(one.name))
        else:
            axes.fill_between(
                steps, floor, floor + height, step="mid", color=colour, linewidth=0, label=_plain(one.name)
            )
        floor = floor + height
    for one in series:
        if one.name == "total":
            axes.plot(one.steps, one.values, color=INK, linewidth=1, label=_plain(one.name))
    axes.set_ylim(bottom=0)


def _gap(steps: list[float]) -> float:
    """Return the smallest distance between two steps."""
    return min((after - before for before, after in zip(steps, steps[1:])), default=1.0)


def _as_svg(panel: Panel) -> str:
    """Return the panel as an SVG element whose ink is the text colour of the page around it."""
    import matplotlib
    from matplotlib.figure import Figure

    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": panel.title}):
        figure = Figure(figsize=(5.2, 3.1))
        draw(panel, figure.subplots())
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")


def _as_png(panels: list[Panel]) -> bytes:
    """Return all panels in one picture."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    file = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * columns, 3.1 * rows), facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        cells = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(cells, panels):
            draw(panel, axes)
        for axes in cells[len(panels) :]:
            axes.axis("off")
        figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)
