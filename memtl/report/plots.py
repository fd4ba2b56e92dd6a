"""Plots as SVG text to put into a page: they take their colours from the page's style sheet."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

# What matplotlib draws in the first colour, the page shows in its variable of that name; the
# second colour is for a reader without that style sheet.
COLOURS = {
    "ink": ("#a1b2d0", "#1f2430"),
    "muted": ("#a1b2d1", "#c9ced8"),
    "surface": ("#a1b2d2", "#ffffff"),
    "series-0": ("#a1b2c0", "#6b7280"),
    "series-1": ("#a1b2c1", "#2563eb"),
    "series-2": ("#a1b2c2", "#c2570c"),
    "series-3": ("#a1b2c3", "#0d8a6a"),
    "series-4": ("#a1b2c4", "#9333b8"),
    "series-5": ("#a1b2c5", "#b4233a"),
}
MARKERS = "oD^sPv"
_SERIES = [name for name in COLOURS if name.startswith("series-")]


@dataclasses.dataclass(frozen=True)
class Point:
    """A labelled point of :func:`tradeoff`: a cost, and one outcome for each repetition."""

    label: str
    x: float
    ys: tuple[float, ...]


def tradeoff(
    points: Sequence[Point], *, title: str, x_label: str, y_label: str, log_y: bool = False
) -> str:
    """Means of outcomes against a cost on a logarithmic axis, with standard deviations as bars;
    with ``log_y`` the outcomes' axis is logarithmic too.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(x_label, y_label)
    axes.set_xscale("log")
    _plain_log_ticks(axes.xaxis)
    if log_y:
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)
    axes.margins(x=0.12, y=0.25)
    means = []
    for i, point in enumerate(points):
        mean = statistics.fmean(point.ys)
        spread = statistics.stdev(point.ys) if len(point.ys) > 1 else None
        means.append((point.x, mean))
        axes.errorbar(
            point.x, mean, spread, color=_colour(i), marker=MARKERS[i % len(MARKERS)],
            markersize=9, capsize=4, elinewidth=1.4,
        )  # fmt: skip
    _label(figure, axes, means, [point.label for point in points])
    outcomes = "; ".join(f"{p.label}: {statistics.fmean(p.ys):.4g} at {p.x:.4g}" for p in points)
    return _svg(figure, title, f"{y_label} against {x_label}. {outcomes}.")


def curves(
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    weight: float = 0.9,
) -> str:
    """One curve a series over steps 1, 2, ..., on a logarithmic axis, smoothed with ``weight``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(x_label, y_label)
    axes.set_yscale("log")
    _plain_log_ticks(axes.yaxis)
    axes.xaxis.get_major_locator().set_params(integer=True)
    for i, (label, values) in enumerate(series.items()):
        axes.plot(
            range(1, len(values) + 1), smooth(values, weight), label=label, color=_colour(i),
            linewidth=1.8, linestyle=("-", "-", (0, (2, 2)))[i % 3],
        )  # fmt: skip
    legend = axes.legend(frameon=False, labelcolor=COLOURS["ink"][0])
    legend.set_zorder(5)
    ends = "; ".join(f"{label}: {smooth(v, weight)[-1]:.3g}" for label, v in series.items())
    return _svg(figure, title, f"{y_label} over {x_label}. At the end: {ends}.")


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving averages, corrected for their start: the first is the first value."""
    result, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(total / mass)
    return result


def _colour(i: int) -> str:
    return COLOURS[_SERIES[i % len(_SERIES)]][0]


def _figure(x_label: str, y_label: str) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install memtl[demo]") from error
    ink, muted = COLOURS["ink"][0], COLOURS["muted"][0]
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # measures text, for the labels
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, color=ink)
    axes.set_ylabel(y_label, color=ink)
    axes.tick_params(which="both", colors=ink, length=0, labelsize=9.5)
    axes.grid(color=muted, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    for patch in (figure.patch, axes.patch):
        patch.set_visible(False)
    return figure, axes


def _plain_log_ticks(axis: Any) -> None:
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.4g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _label(figure: Any, axes: Any, places: list[tuple[float, float]], labels: list[str]) -> None:
    """Write each label beside its point, where it covers neither a point nor another label."""
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent()
    dots = axes.transData.transform(places)
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in dots]
    sides = [
        (dx, dy, "center" if not dx else "left" if dx > 0 else "right")
        for dy in (0, 16, -16, 32, -32, 48, -48)
        for dx in (12, -12, 0)
        if dx or dy
    ]
    for place, label, i in zip(places, labels, range(len(labels)), strict=True):
        text = axes.annotate(
            label, place, xytext=(0, 0), textcoords="offset points", va="center",
            color=_colour(i), fontsize=10, fontweight="bold",
        )  # fmt: skip
        for dx, dy, side in sides:
            text.set(position=(dx, dy), horizontalalignment=side)
            box = text.get_window_extent(renderer).padded(2)
            inside = frame.containsx(box.x0) and frame.containsx(box.x1)
            if inside and not any(box.overlaps(other) for other in taken):
                break
        else:
            text.set(position=(12, 0), horizontalalignment="left")
        taken.append(text.get_window_extent(renderer).padded(2))


def _svg(figure: Any, title: str, description: str) -> str:
    """The figure as an ``<svg>`` element for use inside HTML, several to a page."""
    from matplotlib import rc_context

    name = "plot-" + hashlib.sha256(title.encode()).hexdigest()[:8]
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "memtl"}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns:xlink="[^"]*"', "", svg).replace("xlink:href", "href")
    # Identifiers are unique in a figure; make them so in a page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for variable, (drawn, default) in COLOURS.items():
        svg = svg.replace(drawn, f"var(--{variable}, {default})")
    opening = re.compile(r"<svg[^>]*>")
    size = re.search(r'viewBox="([^"]*)"', svg)
    assert size is not None
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size[1]}" role="img" '
        f'aria-labelledby="{name}-title {name}-description" font-family="system-ui, sans-serif">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-description">{escape(description)}</desc>'
    )
    return opening.sub(lambda _: head, svg, count=1).strip()
