"""Figures: numbers in, plotly figures out. Needs the extra ``report``.

Colours of text and grid come from the page (page.py), so that one figure serves light and dark.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradkeel.errors import import_extra
from gradkeel.language import say, shown
from gradkeel.page.page import escaped

# Told apart by most colour-blind readers, and legible on white and on near-black.
COLORS = ("#d1495b", "#2f8fc4", "#d98c21", "#35a06b", "#9a6fd0", "#7f8c8d", "#b5651d", "#c2539b")
SHADES = {"bad": "#d1495b", "good": "#35a06b", "weak": "#2f8fc4"}


@dataclass(frozen=True)
class Curves:
    """One policy's curves: a line a seed, over the number of updates made."""

    name: str
    lines: Sequence[Sequence[float]]  # non-finite values are left out, and mark the line's end with a cross
    color: int  # index into COLORS


@dataclass(frozen=True)
class Point:
    """A median with its range; a median that is not finite is drawn as a cross above all others."""

    x: float
    median: float
    lowest: float
    highest: float
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points that belong together."""

    name: str
    points: Sequence[Point]
    color: int


@dataclass(frozen=True)
class Band:
    """A shaded range of x with a label; ``kind`` is a key of ``SHADES``."""

    first: float
    last: float
    label: str
    kind: str


def curves(groups: Sequence[Curves], *, x_title: str, y_title: str) -> Any:
    """A plotly figure of every seed as a thin line and each group's median as a thick one; logarithmic y."""
    figure = _plotly().Figure()
    at_step = say("{when}: {norm}", when=say("step {step}", step="%{x}"), norm="%{y:.4g}")
    for group in groups:
        color, name = COLORS[group.color % len(COLORS)], escaped(group.name)
        for i, line in enumerate(group.lines):
            style = {"color": color, "width": 1}
            figure.add_scatter(
                y=_finite(line), mode="lines", line=style, opacity=0.4, legendgroup=name, showlegend=False,
                hovertemplate=hover(say("{name}, seed {seed}", name=name, seed=i), at_step),
            )  # fmt: skip
        ended = [kept for line in group.lines if 0 < len(kept := _until_bad(line)) < len(line)]
        if ended:
            figure.add_scatter(
                x=[len(kept) - 1 for kept in ended], y=[kept[-1] for kept in ended], mode="markers",
                legendgroup=name, showlegend=False,
                marker={"symbol": "x", "size": 8, "color": color},
                hovertemplate=hover(name, say("not finite after step {step}", step="%{x}")),
            )  # fmt: skip
        figure.add_scatter(
            y=_finite(median_line(group.lines)), mode="lines", name=name, legendgroup=name,
            line={"color": color, "width": 2.5},
            hovertemplate=hover(say("{name}, median", name=name), at_step),
        )  # fmt: skip
    _style(figure, x_title, y_title, [value for group in groups for line in group.lines for value in line])
    return figure


def against(
    series: Sequence[Series], *, x_title: str, y_title: str, failed: str, bands: Sequence[Band] = ()
) -> Any:
    """A plotly figure of medians and ranges against x, both logarithmic.

    ``failed`` says, beside the crosses, what a median that is not finite means; bands are shaded behind the lines.
    """
    figure = _plotly().Figure()
    heights = [
        value for one in series for p in one.points for value in (p.median, p.highest) if 0 < value < math.inf
    ]
    depths = [value for one in series for p in one.points if 0 < (value := p.median) < math.inf]
    top = max(heights, default=1.0)
    # A tenth of the plot above everything that is finite.
    ceiling = top * (top / min(depths, default=top)) ** 0.12 * 1.15
    for one in series:
        color, name = COLORS[one.color % len(COLORS)], escaped(one.name)
        fine = [point for point in one.points if math.isfinite(point.median)]
        figure.add_scatter(
            x=[p.x for p in fine], y=[p.median for p in fine], mode="lines+markers", name=name, legendgroup=name,
            line={"color": color, "width": 2.5}, marker={"size": 8},
            customdata=[escaped(p.note) for p in fine],
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 4,
                "array": [_gap(p.highest, p.median) for p in fine],
                "arrayminus": [_gap(p.median, p.lowest) for p in fine],
            },
            hovertemplate=hover(name, "%{x:.4g}: %{y:.4g}", "%{customdata}"),
        )  # fmt: skip
        lost = [point for point in one.points if not math.isfinite(point.median)]
        if lost:
            figure.add_scatter(
                x=[p.x for p in lost], y=[ceiling] * len(lost), mode="markers", legendgroup=name,
                showlegend=not fine, name=name, customdata=[escaped(p.note) for p in lost],
                marker={"symbol": "x", "size": 10, "color": color},
                hovertemplate=hover(name, f"%{{x:.4g}}: {shown(failed)}", "%{customdata}"),
            )  # fmt: skip
    _style(figure, x_title, y_title, [*heights, *depths, ceiling])
    xs = sorted({point.x for one in series for point in one.points})
    named = xs[:: 1 + (len(xs) - 1) // 8]  # of many values tried every second or third
    figure.update_xaxes(type="log", tickvals=named, ticktext=[f"{x:g}" for x in named])
    if any(not math.isfinite(p.median) for one in series for p in one.points):
        figure.add_hline(y=ceiling, line={"dash": "dot", "width": 1, "color": "#888"})
        figure.add_annotation(
            x=0, xref="paper", y=math.log10(ceiling), text=escaped(failed), showarrow=False,
            xanchor="left", yanchor="bottom", font={"size": 12},
        )  # fmt: skip
    for band in bands:
        figure.add_vrect(
            x0=band.first,
            x1=band.last,
            fillcolor=SHADES[band.kind],
            opacity=0.12,
            line_width=0,
            layer="below",
        )
        label(figure, (math.log10(band.first) + math.log10(band.last)) / 2, band.label)
    return figure


def label(figure: Any, x: float, text: str, **place: Any) -> None:
    """A word at x above the plot, or at another place."""
    above = {"y": 1, "yref": "paper", "yanchor": "bottom", "font": {"size": 12}, "showarrow": False}
    figure.add_annotation(x=x, text=escaped(text), **above | place)


def median_line(lines: Sequence[Sequence[float]]) -> list[float]:
    """Median over seeds at each step, a line that has ended counting as infinitely high."""
    columns = itertools.zip_longest(*lines, fillvalue=math.inf)
    return [statistics.median(at if math.isfinite(at) else math.inf for at in column) for column in columns]


def hover(*lines: str) -> str:
    """What plotly shows beside the pointer, in the reader's language."""
    return "<br>".join(map(shown, lines)) + "<extra></extra>"


def _plotly() -> Any:
    return import_extra("plotly.graph_objects", "report", "a figure")


def _style(figure: Any, x_title: str, y_title: str, ys: Sequence[float] = ()) -> None:
    clear = "rgba(0,0,0,0)"
    figure.update_layout(
        paper_bgcolor=clear, plot_bgcolor=clear, height=380, dragmode=False, hovermode="closest",
        uirevision="kept", meta=str(x_title),
        margin={"l": 58, "r": 14, "t": 26, "b": 46}, font={"family": "system-ui, sans-serif", "size": 13},
        legend={"orientation": "h", "x": 0, "y": -0.22, "yanchor": "top", "bgcolor": clear},
    )  # fmt: skip
    axis = {
        "zeroline": False,
        "showline": False,
        "ticks": "outside",
        "ticklen": 4,
        "gridcolor": "rgba(128,128,128,.25)",
    }
    figure.update_xaxes(title={"text": shown(x_title), "standoff": 8}, **axis)
    figure.update_yaxes(
        title={"text": shown(y_title), "standoff": 4}, type="log", exponentformat="power", dtick=_log_ticks(ys),
        minor={"showgrid": False}, **axis,
    )  # fmt: skip


def _log_ticks(values: Sequence[float]) -> str | int | None:
    """Plotly's code for ticks on a logarithmic axis: its own choice, then 1, 2, 5, then every so many decades."""
    drawn = [value for value in values if 0 < value < math.inf]
    if not drawn:
        return None
    decades = math.log10(max(drawn)) - math.log10(min(drawn))  # their ratio may overflow
    # Around a constant plotly shows a decade on either side.
    return None if 0 < decades < 0.8 else "D2" if decades < 3 else math.ceil(decades / 6)


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _until_bad(line: Sequence[float]) -> Sequence[float]:
    return next((line[:i] for i, value in enumerate(line) if not math.isfinite(value)), line)


def _gap(high: float, low: float) -> float:
    return high - low if math.isfinite(high - low) else 0.0
