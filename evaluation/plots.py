"""Plots as SVG for a page: drawn in the page's own ink, each case a point that links to it."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOUR = "#2a6fbb"
# of classes, told apart in black and white
MARKERS = "osD^vP<>X*h"
LONGEST = 26


class Interval(NamedTuple):
    """A mean with the ends of its interval, NaN where there is none."""

    name: str
    mean: float
    low: float
    high: float


class Point(NamedTuple):
    """A case of a class before and after, with a link or none."""

    structure: str
    before: float
    after: float
    link: str


def anchor(case: str) -> str:
    """An id for a case, whatever its name.

    Example:
        >>> anchor("benign (1)")
        'case-benign_20__28_1_29_'
    """
    plain = (letter if letter.isalnum() and letter.isascii() else f"_{ord(letter):x}_" for letter in case)
    return f"case-{''.join(plain)}"


class Dot(NamedTuple):
    """Something with a cost and a score, and the ends of the score's interval, NaN where there is none."""

    name: str
    cost: float
    score: float
    low: float
    high: float


def box_plot(title: str, values: Mapping[str, Sequence[tuple[str, float]]], prefix: str) -> str:
    """Box plots of (case, value) of each class, each case a point that links to it; empty where there is no value.

    `prefix` goes before the ids within the SVG.
    """
    if not any(values.values()):
        return ""
    rng = np.random.default_rng(0)

    def draw(axes: Axes) -> None:
        median = {"color": "#000000", "linewidth": 1.8}
        numbers = [[value for _, value in found] for found in values.values()]
        axes.boxplot(numbers, showfliers=False, widths=0.5, medianprops=median)
        for place, found in enumerate(values.values(), 1):
            spread = place + rng.uniform(-0.16, 0.16, len(found))
            points = axes.scatter(spread, [value for _, value in found], s=14, alpha=0.55, color=COLOUR)
            points.set_urls([f"#{anchor(case)}" for case, _ in found])
        # a $ in a name begins no formula
        turn: dict[str, Any] = {"rotation": 30, "ha": "right"} if turned else {}
        axes.set_xticks(range(1, len(values) + 1), names, parse_math=False, **turn)
        axes.set_ylabel(title)

    names = [_short(name) for name in values]
    turned = max(map(len, names)) > 8
    below = 0.35 + 0.045 * max(map(len, names)) * turned
    width, tall = max(3.0, 0.9 + 0.7 * len(values)), 2.3 + below
    return _svg(draw, (width, tall), (0.6 / width, below / tall, (width - 0.7) / width, 2.2 / tall), prefix)


def forest_plot(label: str, lines: Sequence[Interval], prefix: str) -> str:
    """Means with their intervals, one below the other; filled where the interval leaves out 0.

    Example:
        >>> "<svg" in forest_plot("Dice %, second − first", [Interval("liver", 1.0, 0.2, 1.9)], "c1")
        True
    """

    def draw(axes: Axes) -> None:
        axes.axvline(0, color="#000000", linewidth=0.8, linestyle=(0, (4, 3)))
        for place, (_, mean, low, high) in enumerate(lines):
            axes.plot([low, high], [place, place], color=COLOUR, linewidth=1.6, solid_capstyle="butt")
            face = COLOUR if low > 0 or high < 0 else "none"
            axes.plot([mean], [place], marker="o", markersize=6, color=COLOUR, markerfacecolor=face)
        axes.set_yticks(range(len(lines)), [_short(line.name) for line in lines], parse_math=False)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_xlabel(label, parse_math=False)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    width, below, height = 4.3, 0.55, 0.3 + 0.3 * len(lines)
    left = 0.2 + 0.075 * max(len(_short(line.name)) for line in lines)
    tall = height + below + 0.1
    return _svg(draw, (width, tall), (left / width, below / tall, (width - left - 0.15) / width, height / tall), prefix)


def scatter_plot(title: str, points: Sequence[Point], prefix: str) -> str:
    """Each case by its value in the first and in the second; a marker for each class."""

    def draw(axes: Axes) -> None:
        names = list(dict.fromkeys(point.structure for point in points))
        for index, name in enumerate(names):
            own = [point for point in points if point.structure == name]
            places = [point.before for point in own], [point.after for point in own]
            marker = MARKERS[index % len(MARKERS)]
            drawn = axes.scatter(*places, s=18, alpha=0.6, color=COLOUR, marker=marker, label=_short(name))
            drawn.set_urls([point.link or None for point in own])
        values = [value for point in points for value in (point.before, point.after)]
        margin = 0.05 * (max(values) - min(values)) or 1.0
        ends = min(values) - margin, max(values) + margin
        axes.plot(ends, ends, color="#000000", linewidth=0.8, linestyle=(0, (4, 3)))
        axes.set_xlim(*ends)
        axes.set_ylim(*ends)
        axes.set_xlabel(f"{title}, first")
        axes.set_ylabel(f"{title}, second")
        if len(names) > 1:
            legend = axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.17), ncols=2, frameon=False, fontsize=8)
            for text in legend.get_texts():
                text.set_parse_math(False)

    classes = len({point.structure for point in points})
    below = 0.5 + (0.2 + 0.17 * ((classes + 1) // 2) if classes > 1 else 0.0)
    tall = below + 3.1
    return _svg(draw, (3.7, tall), (0.6 / 3.7, below / tall, 3.0 / 3.7, 3.0 / tall), prefix)


def cost_plot(cost: str, score: str, dots: Sequence[Dot], prefix: str) -> str:
    """Scores over costs, each with its interval and its name, which should be short; costs on a logarithmic scale.

    Example:
        >>> "<svg" in cost_plot("GMAC", "IoU %", [Dot("1", 1.0, 70.0, 68.0, 72.0)], "c")
        True
    """

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        left, right = min(dot.cost for dot in dots) / 1.6, max(dot.cost for dot in dots) * 1.6
        axes.set_xlim(left, right)
        axes.margins(y=0.08)
        axes.set_xlabel(cost, parse_math=False)
        axes.set_ylabel(score, parse_math=False)
        decades = range(math.floor(math.log10(left)), math.ceil(math.log10(right)))
        ticks = [step * 10.0**power for power in decades for step in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if left <= tick <= right])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
        for dot in dots:
            if not math.isnan(dot.low):
                axes.plot([dot.cost, dot.cost], [dot.low, dot.high], color=COLOUR, linewidth=1.6, alpha=0.6)
            axes.plot([dot.cost], [dot.score], marker="o", markersize=6, color=COLOUR)
            axes.annotate(_short(dot.name), (dot.cost, dot.score), (6, 4), textcoords="offset points", parse_math=False)

    width, tall = 4.8, 3.5
    return _svg(draw, (width, tall), (0.7 / width, 0.55 / tall, 3.9 / width, 2.8 / tall), prefix)


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _svg(
    draw: Callable[[Axes], None], size: tuple[float, float], place: tuple[float, float, float, float], prefix: str
) -> str:
    """What is drawn in axes at a place of a figure of a size in inches."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix, "font.family": "sans-serif"}):
        figure = Figure(figsize=size)
        axes = figure.add_axes(place)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # what browsers know without it
    svg = re.sub(r'\s(xmlns:xlink|xmlns|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    # links lead to the same page, not to a copy of it in another window
    svg = svg.replace(' target="_blank"', "")
    # the page's own ink, in dark mode too
    svg = (
        svg.replace("#000000", "currentColor")
        .replace(COLOUR, "var(--dot)")
        .replace("<text ", '<text fill="currentColor" ')
    )
    # ids are of the whole page; those of cases stand outside
    return re.sub(r'(id="|href="#|url\(#)(?!case-|c\d+-case-)', rf"\g<1>{prefix}-", svg)
