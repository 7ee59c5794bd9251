"""Pictures of what was measured: PNG files, and the same as bars on the terminal."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Sequence
from typing import Any, TypedDict

from common import RESULTS, Goal, console, is_met, number
from rich.table import Table

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None  # without it there are no files
WIDTH = 40  # of the longest bar on the terminal
COLOURS = {True: "#2a9d8f", False: "#e76f51", None: "#8d99ae"}


class Series(TypedDict):
    """How a figure changes as something grows; of each point, the values of all its runs."""

    name: str
    points: list[tuple[Any, list[float]]]  # of a number, or of a name


class Chart(TypedDict):
    """What is drawn as one picture, and the name of its file."""

    file: str
    title: str
    x: str
    y: str
    series: list[Series]


def chart(file: str, title: str, x: str, y: str, **series: dict[Any, list[float]]) -> Chart:
    """Return a chart; the names of its series have no underscores when they are shown."""
    lines = [
        Series(name=name.replace("_", " "), points=list(points.items())) for name, points in series.items()
    ]
    return Chart(file=file, title=title, x=x, y=y, series=lines)


def show(drawn: Chart) -> None:
    """Draw a chart on the terminal, and to its file."""
    table = Table(title=f"{drawn['title']}: {drawn['y']}", show_edge=False)
    table.add_column(drawn["x"], justify="right")
    for line in drawn["series"]:
        table.add_column(line["name"], justify="right")
        table.add_column("", min_width=WIDTH // len(drawn["series"]))
    columns = [_bars(line, WIDTH // len(drawn["series"])) for line in drawn["series"]]
    for place, (x, _) in enumerate(drawn["series"][0]["points"]):
        table.add_row(
            x if isinstance(x, str) else f"{x:,}", *(cell for column in columns for cell in column[place])
        )
    console.print(table)
    if HAS_MATPLOTLIB:
        _write(drawn)


def _bars(line: Series, width: int) -> list[tuple[str, str]]:
    """Return a number and a bar for each point."""
    middles = [statistics.median(values) for _, values in line["points"]]
    most = max(middles) or 1
    return [(number(middle), "█" * max(1, round(width * middle / most))) for middle in middles]


def _write(drawn: Chart) -> None:
    figure, axes = _figure(drawn["title"], 4)
    for line in drawn["series"]:
        places = [x for x, _ in line["points"]]
        middles = [statistics.median(values) for _, values in line["points"]]
        axes.plot(places, middles, marker="o", label=line["name"])
        lows, highs = zip(*((min(values), max(values)) for _, values in line["points"]), strict=True)
        axes.fill_between(places, lows, highs, alpha=0.2)
    if not isinstance(places[0], str):
        axes.set_xscale("log")
        axes.set_xticks(places, [f"{x:,}" for x in places])
    values = [value for line in drawn["series"] for _, values in line["points"] for value in values]
    if 0 < 30 * min(values) < max(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(drawn["x"])
    axes.set_ylabel(drawn["y"])
    axes.yaxis.set_major_formatter(lambda value, _: number(value) if value else "0")
    axes.grid(alpha=0.3)
    if len(drawn["series"]) > 1:
        axes.legend()
    _save(figure, drawn["file"])


def show_summary(goals: Sequence[Goal]) -> None:
    """Draw how near each figure is to its goal, to a file: 1 is the goal, more is better."""
    aims = [row for row in goals if is_met(row) is not None]
    if not HAS_MATPLOTLIB or not aims:
        return
    figure, axes = _figure("each figure against its goal: 1 is just met, more is better", 0.35 * len(aims))
    places = range(len(aims), 0, -1)
    shares = [_share(row) for row in aims]
    axes.barh(places, shares, color=[COLOURS[is_met(row)] for row in aims])
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(places, [row["goal"] for row in aims], fontsize=8)
    for place, row, share in zip(places, aims, shares, strict=True):
        sign = ">=" if row["at_most"] is None else "<="
        wanted = row["at_least"] if row["at_most"] is None else row["at_most"]
        said = f"{number(row['figure'])} ({sign} {number(wanted or 0)})"
        behind = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # or the line would cross the words
        axes.text(share + 0.02, place, said, va="center", fontsize=7, bbox=behind)
    axes.set_xlim(0, 1.25 * max(*shares, 1))
    _save(figure, "summary")


def _share(row: Goal) -> float:
    """Return the figure in shares of its goal, at most 3."""
    if row["at_least"]:
        return min(3.0, row["figure"] / row["at_least"])
    return min(3.0, (row["at_most"] or 0) / max(row["figure"], 1e-9))


def _figure(title: str, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import (
        Figure,  # not above: the workers import this file, and their memory is measured
    )

    figure = Figure(figsize=(9, max(2.5, 1 + height)), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _save(figure: Any, name: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=90)
    console.print(f"drawn: {path.relative_to(RESULTS.parent.parent)}")
