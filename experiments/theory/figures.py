"""Pictures of the experiments on theory, and of the pages that explain it; matplotlib, from plain series of numbers."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradkeel.explain.smoothness.figures import picture, plain_ticks, save
from gradkeel.page.figures import COLORS

Series = Mapping[str, Sequence[float]]
UNCLIPPED, CLIPPED, THIRD = COLORS[0], COLORS[1], COLORS[3]


def draw_pictures(series: Mapping[str, Series], folder: Path) -> list[Path]:
    """Draw every picture whose experiments are all in ``series``, by number; what was written.

    Raises:
        MissingExtraError: without matplotlib.
    """
    written = []
    for name, (needed, size, draw) in PICTURES.items():
        if all(id_ in series for id_ in needed):
            figure = picture(*size)
            draw(figure, *(series[id_] for id_ in needed))
            path = folder / f"{name}.png"
            save(figure, path)
            written.append(path)
    return written


def _iterations(figure: Any, cosh: Series, quartic: Series) -> None:
    for axes, series, title in zip(
        figure.subplots(1, 2), (cosh, quartic), ("2 cosh x", "quartic of 3 variables"), strict=True
    ):
        axes.loglog(series["M"], series["GD"], "o-", color=UNCLIPPED, label="best fixed step")
        axes.loglog(series["M"], series["clipped"], "o-", color=CLIPPED, label="clipped")
        axes.set(xlabel="largest gradient norm M", ylabel="iterations", title=title)
        axes.legend(frameon=False)


def _relations(figure: Any, clipped: Series, small: Series, digits: Series) -> None:
    last = max(step for series in (clipped, small, digits) for step in series["step"])
    titles = ("LSTM, lr 16, clipped at 0.25", "LSTM, lr 2, not clipped", "tanh network on digits")
    for axes, series, title in zip(figure.subplots(1, 3), (clipped, small, digits), titles, strict=True):
        shown = axes.scatter(
            series["norm"], series["smoothness"], c=series["step"], cmap="viridis", vmin=1, vmax=last, s=10
        )
        axes.set(xscale="log", yscale="log", xlabel="gradient norm", ylabel="local smoothness", title=title)
        plain_ticks(axes)
    figure.colorbar(shown, ax=axes, label="step")


def _rates(figure: Any, rates: Series, products: Series) -> None:
    left, right = figure.subplots(1, 2)
    finite = [y for name in ("unclipped", "clipped") for y in rates[name] if math.isfinite(y)]
    top = max(finite) * 1.1
    for name, color in (("unclipped", UNCLIPPED), ("clipped", CLIPPED)):
        left.plot(
            rates["lr"],
            [min(y, math.inf) if math.isfinite(y) else math.nan for y in rates[name]],
            "o-",
            color=color,
            label=name,
        )
        lost = [x for x, y in zip(rates["lr"], rates[name], strict=True) if not math.isfinite(y)]
        left.plot(lost, [top] * len(lost), "x", color=color, label=f"{name}: diverged" if lost else None)
    left.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="final loss, median of seeds",
        title="LSTM after 200 steps",
    )
    left.set_xticks(rates["lr"], [f"{x:g}" for x in rates["lr"]], minor=False)
    for (name, values), color in zip(list(products.items())[1:], (UNCLIPPED, CLIPPED, THIRD), strict=True):
        right.plot(products["lr * bound"], values, "o-", color=color, label=name)
    right.set(
        xscale="log",
        xlabel="lr × bound",
        ylabel="final loss, median of seeds",
        title="the product is what one tunes",
    )
    right.set_xticks(products["lr * bound"], [f"{x:g}" for x in products["lr * bound"]], minor=False)
    for axes in (left, right):
        axes.minorticks_off()
        axes.legend(frameon=False)


def _fixed_steps(figure: Any, quadratic: Series, quartic: Series) -> None:
    left, right = figure.subplots(1, 2)
    left.plot(quadratic["lr * L"], quadratic["guarantee"], color=CLIPPED)
    left.axhline(0, color="gray", linewidth=0.8)
    left.set(xlabel="lr × L", ylabel="least decrease / ‖g‖²", title="quadratic of curvature L")
    right.loglog(quartic["R"], quartic["L"], "o-", color=UNCLIPPED, label="smallest L on [-R, R]")
    right.axhline(16, color=CLIPPED, label="L0 (with L1 = 1), everywhere")
    right.set(xlabel="R", ylabel="smoothness", title="x⁴")
    right.legend(frameon=False)


def _depth(figure: Any, series: Series) -> None:
    for axes, chain in zip(figure.subplots(1, 2, sharey=True), ("linear", "tanh"), strict=True):
        for gain, color in (("1.5", UNCLIPPED), ("1", THIRD), ("0.5", CLIPPED)):
            axes.semilogy(series["depth"], series[f"{chain} {gain}"], "o-", color=color, label=f"gain {gain}")
        axes.set(xlabel="layers", title=f"{chain} chain", xticks=series["depth"])
        axes.legend(frameon=False)
    figure.axes[0].set_ylabel("norm of the first layer's gradient")


def _cliff(figure: Any, series: Series) -> None:
    *views, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    for axes, name, title in zip(views, ("near", "far"), ("at the cliff", "from further away"), strict=True):
        w, b = series[f"{name} w"], series[f"{name} b"]
        rows = [series[f"{name} loss"][i * len(w) : (i + 1) * len(w)] for i in range(len(b))]
        axes.contourf(
            w,
            b,
            rows,
            levels=[10 ** (-3 + i / 4) for i in range(25)],
            norm="log",
            cmap="Greys",
            extend="both",
        )
        for path, color in (("free", UNCLIPPED), ("clipped", CLIPPED)):
            axes.plot(series[f"{path} w"], series[f"{path} b"], ".-", color=color, linewidth=1, markersize=3)
        axes.plot(series["free w"][0], series["free b"][0], "o", color="black", markersize=5)
        axes.set(
            xlabel="weight w", ylabel="bias b", xlim=(min(w), max(w)), ylim=(min(b), max(b)), title=title
        )
    for path, color, label in (("free", UNCLIPPED, "not clipped"), ("clipped", CLIPPED, "clipped")):
        right.semilogy(series[f"{path} loss"], color=color, linewidth=1, label=label)
    right.set(xlabel="step", ylabel="loss", title="the same learning rate", ylim=(1e-4, None))
    right.legend(frameon=False)


def draw_three_clips(path: Path, vector: Sequence[float], clipped: Mapping[str, Sequence[float]]) -> None:
    """A two-entry gradient and what each clip makes of it, drawn at two scales: the gradient is far outside.

    Args:
        path: of the PNG.
        vector: the gradient.
        clipped: by the clip's name.
    """
    figure = picture(7.2, 3.4)
    for axes, scale in zip(figure.subplots(1, 2), (1.15 * max(vector), 1.15), strict=True):
        for (name, entries), color in zip(
            {"gradient": vector, **clipped}.items(), ("black", *COLORS), strict=False
        ):
            width = 0.006 if name == "gradient" else 0.012
            axes.quiver(
                0, 0, *entries, angles="xy", scale_units="xy", scale=1, width=width, color=color,
                label=f"{name} ({entries[0]:.3g}, {entries[1]:.3g})",
            )  # fmt: skip
        axes.set(
            xlim=(-0.1 * scale, scale),
            ylim=(-0.1 * scale, scale),
            xlabel="first entry",
            ylabel="second entry",
        )
        axes.grid(alpha=0.3)
    figure.axes[0].set_title("the gradient as it is")
    figure.axes[1].set_title("the same, near the origin")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="center right")
    save(figure, path)


def draw_forms(path: Path, norms: Sequence[float], after: Mapping[str, Sequence[float]]) -> None:
    """The norm after clipping against the norm before, for each form; the bound is 1."""
    figure = picture(4.6, 3.4)
    axes = figure.add_subplot()
    axes.plot(norms, norms, color="gray", linewidth=0.8, linestyle=":", label="not clipped")
    for (name, values), color in zip(after.items(), COLORS, strict=False):
        axes.plot(norms, values, color=color, label=name)
    axes.set(xlabel="gradient norm / bound", ylabel="norm after / bound", ylim=(0, 1.5))
    axes.legend(frameon=False)
    save(figure, path)


Draw = Callable[..., None]
PICTURES: dict[str, tuple[tuple[str, ...], tuple[float, float], Draw]] = {
    "theory-iterations": (("R2", "R3"), (7.6, 3.3), _iterations),
    "theory-relation": (("R5", "R6", "R8"), (9.6, 3.2), _relations),
    "theory-rates": (("R9", "R10"), (7.6, 3.4), _rates),
    "theory-fixed-steps": (("R18", "R19"), (7.6, 3.2), _fixed_steps),
    "theory-depth": (("R20",), (7.6, 3.2), _depth),
    "theory-cliff": (("R21",), (10.2, 3.4), _cliff),
}
"""Name, the experiments that a picture shows, its size in inches, and how it is drawn."""
