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
    "series-6": ("#a1b2c6", "#8a6500"),
}
MARKERS = "oD^sPv"
_SERIES = [name for name in COLOURS if name.startswith("series-")]


@dataclasses.dataclass(frozen=True)
class Point:
    """A labelled point of a plot: a cost, and one outcome for each repetition."""

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


def lines(
    series: Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    level: Point | None = None,
) -> str:
    """A line a series through the means of its points, with standard deviations as bars.

    Args:
        level: outcomes to compare with, at every x: a dashed line, and a band of one standard
            deviation to either side.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(x_label, y_label)
    said = []
    if level is not None:
        mean, spread = _mean_and_spread(level.ys)
        axes.axhline(mean, color=_colour(0), linewidth=1.4, linestyle=(0, (4, 3)))
        axes.axhspan(mean - spread, mean + spread, color=_colour(0), alpha=0.15, linewidth=0)
        axes.plot([], [], color=_colour(0), linestyle=(0, (4, 3)), label=level.label)
        said.append(f"{level.label}: {mean:.4g}")
    many = max(1, len(series) - 1)
    xs = [point.x for points in series.values() for point in points]
    apart = (max(xs) - min(xs)) / 120 if xs else 0.0  # so that bars do not hide each other
    for i, (label, points) in enumerate(series.items()):
        found = [_mean_and_spread(point.ys) for point in points]
        axes.errorbar(
            [point.x + apart * (i - many / 2) for point in points],
            [mean for mean, _ in found],
            [spread for _, spread in found],
            color=_colour(i + 1 if level else i), marker=MARKERS[i % len(MARKERS)], markersize=6,
            capsize=3, elinewidth=1.2, linewidth=1.6, label=label,
        )  # fmt: skip
        means = (f"{m:.4g} at {p.x:.4g}" for (m, _), p in zip(found, points, strict=True))
        said.append(f"{label}: {', '.join(means)}")
    axes.legend(
        frameon=False, labelcolor=COLOURS["ink"][0], loc="center left", bbox_to_anchor=(1.0, 0.5)
    )
    return _svg(figure, title, f"{y_label} against {x_label}. {'; '.join(said)}.")


def heatmap(
    values: Mapping[str, Mapping[str, float | None]], *, title: str, x_label: str, y_label: str
) -> str:
    """A cell for every row and column, the stronger in colour the further it is from 0: above in
    one colour, below in another; None stays empty.

    Args:
        values: row -> column -> value; all rows have the columns of the first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(x_label, y_label)
    axes.grid(visible=False)
    rows, columns = list(values), list(next(iter(values.values())))
    strongest = max(
        (abs(v) for row in values.values() for v in row.values() if v is not None), default=0.0
    )
    said = []
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            value = values[row][column]
            if value is None:
                continue
            strength = abs(value) / strongest if strongest else 0.0
            colour = COLOURS["series-1" if value > 0 else "series-2"][0]
            box = axes.bar(x, 0.94, 0.96, y - 0.47, color=colour, alpha=0.08 + 0.57 * strength)
            box[0].set_linewidth(0)
            axes.text(
                x, y, f"{value:+.1f}", ha="center", va="center", color=COLOURS["ink"][0],
                fontsize=10.5,
            )  # fmt: skip
            said.append(f"{row}, {column}: {value:+.1f}")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    return _svg(figure, title, f"{y_label} by {x_label}. {'; '.join(said)}.")


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


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
