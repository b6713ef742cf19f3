"""Local smoothness against gradient norm: for a page (plotly) and as a picture (matplotlib)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradkeel.errors import import_extra
from gradkeel.explain.smoothness.fit import SmoothnessFit
from gradkeel.explain.smoothness.probe import LocalSmoothness
from gradkeel.language import say, shown
from gradkeel.page.figures import COLORS, _plotly, _style, hover

NORM = say("gradient norm")
SMOOTHNESS = say("local smoothness")
# Legible on white and on near-black, the first steps too.
EARLY_TO_LATE = ((0.0, "#7a68d8"), (0.5, "#2fa08a"), (1.0, "#dfae00"))
FITTED, ENVELOPE = say("L0 + L1 · norm"), say("envelope")


def smoothness_figure(measurements: Sequence[LocalSmoothness], fit: SmoothnessFit) -> Any:
    """A plotly figure: a point a measurement, colored by step, and the fitted line with its envelope; both axes log."""
    figure = _plotly().Figure()
    points = [m for m in measurements if m.resolved]
    norms, heights = [m.norm for m in points], [m.smoothness for m in points]
    figure.add_scatter(
        x=norms, y=heights, mode="markers", name=shown(say("measured")),
        marker={
            "color": [m.step for m in points], "colorscale": EARLY_TO_LATE, "size": 7, "showscale": True,
            "colorbar": {"title": {"text": shown(say("step"))}, "thickness": 12, "outlinewidth": 0},
        },
        customdata=[[m.step, m.loss] for m in points],
        hovertemplate=hover(
            say("step {step}, loss {loss}", step="%{customdata[0]}", loss="%{customdata[1]:.4g}"),
            say("norm {norm}, smoothness {smoothness}", norm="%{x:.4g}", smoothness="%{y:.4g}"),
        ),
    )  # fmt: skip
    for name, line, dash in lines_of(fit, norms):
        figure.add_scatter(
            x=[x for x, _ in line], y=[y for _, y in line], mode="lines", name=shown(name),
            line={"color": COLORS[0], "width": 2, "dash": dash}, hoverinfo="skip",
        )  # fmt: skip
    _style(figure, NORM, SMOOTHNESS)
    for update, values in ((figure.update_xaxes, norms), (figure.update_yaxes, heights)):
        ticks = log_ticks(values)
        update(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    figure.update_layout(height=460)
    return figure


def log_ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times the powers of ten around ``values``; over many decades the powers alone."""
    if not values:
        return []
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    digits = (1, 2, 5) if high - low <= 3 else (1,)
    return [digit * 10.0**power for power in range(low - 1, high + 2) for digit in digits]


def lines_of(fit: SmoothnessFit, norms: Sequence[float]) -> list[tuple[str, list[tuple[float, float]], str]]:
    """The fitted line and its envelope as (name, points, dash), where there are any."""
    if not norms or not math.isfinite(fit.L1):
        return []
    low, high = min(norms), max(norms)
    xs = [low * (high / low) ** (i / 40) for i in range(41)]
    return [
        (name, [(x, l0 + l1 * x) for x in xs], dash)
        for name, (l0, l1), dash in ((FITTED, (fit.L0, fit.L1), "solid"), (ENVELOPE, fit.envelope, "dot"))
    ]


def save_smoothness(
    path: Path, measurements: Sequence[LocalSmoothness], fit: SmoothnessFit, *, title: str = ""
) -> None:
    """Write the same figure as a picture; PNG or SVG by the path's ending."""
    figure = picture(6.4, 4.6)
    axes = figure.add_subplot()
    points = [m for m in measurements if m.resolved]
    norms, steps = [m.norm for m in points], [m.step or 0 for m in points]
    drawn = axes.scatter(norms, [m.smoothness for m in points], c=steps, cmap="viridis", s=16)
    lines = lines_of(fit, norms)
    for name, line, dash in lines:
        style = "-" if dash == "solid" else ":"
        axes.plot(*zip(*line, strict=True), color=COLORS[0], linestyle=style, label=name)
    axes.set(xlabel=NORM, ylabel=SMOOTHNESS, title=title)
    if points:
        axes.set(xscale="log", yscale="log")
        plain_ticks(axes)
        figure.colorbar(drawn, ax=axes, label="step")
    if lines:
        axes.legend(frameon=False)
    save(figure, path)


def plain_ticks(axes: Any) -> None:
    """Name 1, 2 and 5 times the powers of ten on logarithmic axes, and write them out."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 1e3 * low else (1.0,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def picture(width: float, height: float) -> Any:
    """An empty matplotlib figure of so many inches, outside pyplot's global state.

    Raises:
        MissingExtraError: without matplotlib.
    """
    drawing = import_extra("matplotlib.figure", "report", "a picture")
    return drawing.Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a matplotlib figure as PNG or SVG, by the path's ending, the same bytes for the same numbers."""
    import matplotlib

    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, dpi=110, metadata=metadata)
