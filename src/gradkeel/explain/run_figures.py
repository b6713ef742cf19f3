"""Figures of one recorded run: tensors in, plotly figures out. Needs the extra ``report``."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradkeel.language import say, shown
from gradkeel.page.figures import COLORS, _plotly, _style, hover, label
from gradkeel.page.page import escaped
from gradkeel.record import Buckets

RED, BLUE, ORANGE, GREEN, VIOLET, GREY = COLORS[:6]
HOTTEST = "Inferno"
FEW = 60
"""So few steps are drawn as points too."""
_LONGEST_NAME = 26


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A number a step, as buckets of steps: its median as a line, and its range as a shade where they hold several."""

    name: str
    buckets: Buckets  # [c] each
    color: str
    dash: str = "solid"  # as plotly calls it
    sampled: bool = False  # only some steps were measured, which are drawn as points


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at a step, or at a norm, with a word on it."""

    at: float
    text: str
    color: str = RED


def traces(
    lines: Sequence[Trace],
    *,
    y_title: str,
    y_range: tuple[float, float] | None = None,
    logarithmic: bool = True,
    marks: Sequence[Mark] = (),
    strips: Sequence[tuple[str, Tensor, str]] = (),
) -> Any:
    """A plotly figure of traces over the steps, drawn in order.

    The y axis is linear, too, where ``y_range`` is given or a value is below zero. What is marked in strips under the
    traces is a name, the share of the steps in each bucket [c] of the first trace, and a color.
    """
    _plotly()  # says what to install
    from plotly.subplots import make_subplots

    shares = [0.05 * len(strips), 1 - 0.05 * len(strips)] if strips else [1.0]
    figure = make_subplots(
        rows=len(shares), shared_xaxes=True, vertical_spacing=0.015, row_heights=shares[::-1]
    )
    for line in lines:
        _shade(figure, line)
        _line(figure, line)
    values = torch.cat([values for line in lines for values in (line.buckets.low, line.buckets.high)])
    values = values[torch.isfinite(values)]
    _style(figure, say("step"), y_title, values.tolist())
    if y_range is not None or not logarithmic or bool((values < 0).any()):
        figure.update_yaxes(type="linear", dtick=None, range=y_range, row=1)
    if strips:
        _strips(figure, lines[0].buckets, strips)
    for mark in marks:
        figure.add_vline(x=mark.at, line={"dash": "dot", "width": 1.5, "color": mark.color}, row=1, col=1)
        label(figure, mark.at, mark.text, yref="y domain")
    _whole_steps(figure, *(line.buckets for line in lines))
    figure.update_layout(height=380 + 16 * len(strips), hovermode="closest")
    return figure


def _line(figure: Any, line: Trace) -> None:
    buckets, name = line.buckets, escaped(line.name)
    few = "lines+markers" if len(buckets.first) <= FEW else "lines"
    figure.add_scatter(
        x=buckets.first.tolist(), y=_numbers(buckets.median), name=name, legendgroup=name,
        mode="markers" if line.sampled else few, marker={"color": line.color, "size": 5 if line.sampled else 6},
        line={"color": line.color, "width": 1.6, "dash": line.dash}, customdata=_exact(buckets),
        hovertemplate=hover(name, "%{customdata}"), row=1, col=1,
    )  # fmt: skip


def _shade(figure: Any, line: Trace) -> None:
    buckets = line.buckets
    if width_of(buckets) == 1:
        return
    for values, fill in ((buckets.high, None), (buckets.low, "tonexty")):
        figure.add_scatter(
            x=buckets.first.tolist(), y=_numbers(values), mode="lines", line={"width": 0, "color": line.color},
            fill=fill, opacity=0.5, hoverinfo="skip", showlegend=False, legendgroup=escaped(line.name),
            row=1, col=1,
        )  # fmt: skip


def _strips(figure: Any, buckets: Buckets, strips: Sequence[tuple[str, Tensor, str]]) -> None:
    """Rows of colored cells under the traces: how many of a bucket's steps something happened at."""
    clear = "rgba(0,0,0,0)"
    spans = _spans(buckets)
    # By number: plotly fails on a one-row heat map at the second category of an axis.
    for i, (name, share, color) in enumerate(strips):
        figure.add_heatmap(
            x=buckets.first.tolist(), y=[i], z=[_numbers(share)], zmin=0, zmax=1, showscale=False,
            colorscale=[[0, clear], [0.001, _faint(color)], [1, color]], customdata=[spans], ygap=2,
            hovertemplate=hover(say("{name}: {share} of the steps", name=name, share="%{z:.0%}"), "%{customdata}"),
            row=2, col=1,
        )  # fmt: skip
    figure.update_yaxes(
        type="linear", row=2, col=1, title=None, showgrid=False, ticks="", tickfont={"size": 11}, dtick=None,
        tickvals=list(range(len(strips))), ticktext=[escaped(name) for name, _, _ in strips],
        range=[len(strips) - 0.5, -0.5],
    )  # fmt: skip
    figure.update_xaxes(title=None, row=1, col=1, ticks="")
    figure.update_xaxes(row=2, col=1, showgrid=False)


def heat_map(
    names: Sequence[str],
    buckets: Buckets,
    nonfinite: Tensor,
    *,
    marks: Sequence[Mark] = (),
    norm_type: float = 2.0,
    onset: str | None = None,
) -> Any:
    """A plotly figure of every parameter's norm over the steps: parameters in their order, color the log of the norm.

    Of the [c, n] norms the highest of each bucket is shown, for one step is enough to blow a run up; ``nonfinite`` [c]
    are buckets with a gradient that was not finite. The page's script puts norms of whole modules together, by
    ``norm_type``, and shows the parameter ``onset`` by itself.
    """
    figure = _plotly().Figure()
    high = buckets.high.T
    controls = (
        say("filter: mlp or *.bias"), say("every parameter"), say("modules, {depth} deep", depth="#"),
        say("each row by its own median"),
    )  # fmt: skip
    if bool(nonfinite.any()):
        not_finite = shown(say("not finite"))
        names = [not_finite, *names]
        high = torch.cat([high.new_full((1, high.shape[1]), math.nan), high])
    rows = [html.escape(name) for name in names]
    logs = torch.where(high > 0, high, math.nan).log10()
    low, top = _range(logs)
    width = width_of(buckets)
    when = say(
        "step {step}" if width == 1 else "highest of {width} steps from {step} on", width=width, step="%{x}"
    )
    figure.add_heatmap(
        x=buckets.first.tolist(), y=rows, z=[_numbers(row, 4) for row in logs], zmin=low, zmax=top,
        colorscale=HOTTEST, colorbar=_colorbar(low, top), hoverongaps=False,
        meta={
            "power": norm_type if math.isfinite(norm_type) else None, "onset": onset,
            "marked": bool(nonfinite.any()), "words": list(map(shown, controls)),
        },
        customdata=[_numbers(row, 5) for row in high],
        hovertemplate=hover("<b>%{y}</b>", say("{when}: {norm}", when=when, norm="%{customdata}")),
    )  # fmt: skip
    if bool(nonfinite.any()):
        x = buckets.first[nonfinite].tolist()
        figure.add_scatter(
            x=x, y=[not_finite] * len(x), mode="markers", showlegend=False,
            marker={"symbol": "square", "size": 7, "color": RED},
            hovertemplate=hover(say("step {step}: a gradient was not finite", step="%{x}")),
        )  # fmt: skip
    _style(figure, say("step"), "")
    step = math.ceil(len(names) / 48)
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=rows, autorange="reversed", tickvals=rows[::step],
        ticktext=[html.escape(_short(name)) for name in names[::step]], showgrid=False, dtick=None, ticks="",
        tickfont={"size": 11},
    )  # fmt: skip
    figure.update_xaxes(showgrid=False)
    _whole_steps(figure, buckets)
    for mark in marks:  # no line: it would hide the column that it is about
        text = f"{escaped(mark.text)}<br>▼"
        figure.add_annotation(x=mark.at, y=1, yref="paper", yanchor="bottom", text=text, showarrow=False)
    figure.update_layout(height=min(1000, max(260, 140 + 20 * len(names))), margin={"t": 44})
    return figure


def distribution(norms: Tensor, marks: Sequence[Mark], *, x_title: str) -> Any:
    """A plotly figure of how often which norm occurred, on a logarithmic axis, with bounds as vertical lines."""
    figure = _plotly().Figure()
    logs = norms[torch.isfinite(norms) & (norms > 0)].log10()
    drawn = [mark for mark in marks if 0 < mark.at < math.inf]
    reach = [math.log10(mark.at) for mark in drawn]
    if len(logs):
        low, high = float(logs.min()), float(logs.max())
        reach += [low, high]
        low, high = (low - 0.05, high + 0.05) if high - low < 0.1 else (low, high)
        counts = torch.histc(logs, bins=60, min=low, max=high)
        edges = torch.linspace(low, high, 61, dtype=torch.float64, device="cpu")
        spans = [
            shown(say("{low} to {high}", low=f"{10**a:.3g}", high=f"{10**b:.3g}"))
            for a, b in pairwise(edges.tolist())
        ]
        figure.add_bar(
            x=((edges[:-1] + edges[1:]) / 2).tolist(), y=(counts / counts.sum()).tolist(),
            width=[(high - low) / 60] * 60, marker={"color": BLUE, "line": {"width": 0}}, customdata=spans,
            hovertemplate=hover(say("{name}: {share} of the steps", name="%{customdata}", share="%{y:.2%}")),
            showlegend=False,
        )  # fmt: skip
    _style(figure, x_title, say("share of the steps"))
    figure.update_yaxes(type="linear", tickformat=".0%", dtick=None)
    for i, mark in enumerate(sorted(drawn, key=lambda mark: mark.at)):
        figure.add_vline(x=math.log10(mark.at), line={"dash": "dot", "width": 1.5, "color": mark.color})
        label(figure, math.log10(mark.at), mark.text, yshift=14 * (i % 2))
    ticks = _decades(min(reach, default=0.0), max(reach, default=1.0))
    figure.update_xaxes(tickvals=[math.log10(t) for t in ticks], ticktext=[f"{t:g}" for t in ticks])
    figure.update_layout(bargap=0, margin={"t": 44})
    return figure


def width_of(buckets: Buckets) -> int:
    """How many steps a bucket stands for."""
    return int(buckets.last[0] - buckets.first[0]) + 1 if len(buckets.first) else 1


def _whole_steps(figure: Any, *drawn: Buckets) -> None:
    """No tick between two steps."""
    steps = [
        int(at) for buckets in drawn if len(buckets.first) for at in (buckets.first[0], buckets.last[-1])
    ]
    if steps and max(steps) - min(steps) < 10:
        figure.update_xaxes(dtick=1)


def _decades(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis from 10^low to 10^high."""
    digits = (1, 2, 5) if high - low <= 3 else (1,)
    stride = max(1, math.ceil((high - low) / 8))
    powers = range(math.floor(low), math.ceil(high) + 1, stride)
    return [d * 10.0**p for p in powers for d in digits if low - 0.1 <= math.log10(d * 10.0**p) <= high + 0.1]


def _range(logs: Tensor) -> tuple[float, float]:
    """Color range: from the 2% quantile up to the highest, but at most 12 decades above the median."""
    finite = logs[torch.isfinite(logs)]
    if not len(finite):
        return 0.0, 1.0
    finite = finite[:: max(1, len(finite) // 100_000)]
    low, top = float(finite.quantile(0.02)), min(float(finite.max()), float(finite.median()) + 12)
    return (low, top) if top - low > 0.1 else (low - 0.5, top + 0.5)


def _colorbar(low: float, top: float) -> dict[str, Any]:
    stride = max(1, math.ceil((top - low) / 5))  # a map of few rows has no room for more
    ticks: list[float] = list(range(math.ceil(low), math.floor(top) + 1, stride))
    named = [f"10<sup>{t}</sup>" for t in ticks]
    if len(ticks) < 2:
        ticks = [low, top]
        named = [f"{10**t:.2g}" for t in ticks]
    return {"tickvals": ticks, "ticktext": named, "thickness": 12, "outlinewidth": 0}


def _short(name: str) -> str:
    """The end of a name, which tells layers apart, where it is long."""
    return name if len(name) <= _LONGEST_NAME else "…" + name[-_LONGEST_NAME + 1 :]


def _numbers(values: Tensor, digits: int = 6) -> list[float | None]:
    """The values with so many significant digits, which keeps the page small; None where not finite."""
    return [float(f"{value:.{digits}g}") if math.isfinite(value) else None for value in values.tolist()]


def _number(value: float) -> str:
    return f"{value:.5g}" if math.isfinite(value) else say("not finite")


def _spans(buckets: Buckets) -> list[str]:
    """Which steps each bucket holds, in the reader's words."""
    return [
        shown(say("step {step}", step=a) if a == b else say("steps {first} to {last}", first=a, last=b))
        for a, b in zip(buckets.first.tolist(), buckets.last.tolist(), strict=True)
    ]


def _exact(buckets: Buckets) -> list[str]:
    """Steps and values of each bucket, in the reader's words."""
    rows = zip(
        _spans(buckets), buckets.low.tolist(), buckets.median.tolist(), buckets.high.tolist(), strict=True
    )
    return [
        shown(
            say("{when}: {norm}", when=span, norm=_number(middle)) if low == high or not math.isfinite(low) else
            say("{when}: {low} to {high}, median {median}", when=span, low=_number(low), high=_number(high),
                median=_number(middle))
        )
        for span, low, middle, high in rows
    ]  # fmt: skip


def _faint(color: str) -> str:
    """The color at a third of its strength."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.33)"
