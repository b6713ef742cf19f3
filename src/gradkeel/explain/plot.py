"""`plot(run)`: a run's pictures in a notebook."""

import os
from typing import Any

import torch

from gradkeel.errors import check_kind
from gradkeel.explain.run_figures import BLUE, GREEN, ORANGE, Trace, heat_map, traces
from gradkeel.language import count, say, shown
from gradkeel.page.figures import _plotly
from gradkeel.page.page import CONFIG
from gradkeel.record import Reader, bucket, bucket_norms

_COLUMNS = 400


def plot(run: str | os.PathLike[str] | Reader) -> Any:
    """A plotly figure of a recorded run: gradient norm, loss where it was logged, and every parameter's norm.

    Call it again while training goes on, in this process or another: steps are on disk a second after they were made.

    Args:
        run: path of a record, or an open `Reader`.

    Raises:
        RecordError: there is no such record, or it holds no steps yet.
        MissingExtraError: plotly is not installed.

    Example:
        >>> gk.plot("run.keel")                                                        # doctest: +SKIP
    """
    rule = "run must be the path of a record, such as 'run.keel', or an open Reader"
    check_kind(run, str | os.PathLike | Reader, "plot(run=...)", rule)
    if not isinstance(run, Reader):
        with Reader(run) as reader:
            return plot(reader)
    policy = run.policy  # says so where nothing is recorded yet
    _plotly()  # says what to install
    from plotly.subplots import make_subplots

    steps = run.steps()
    norm = [Trace(say("before clipping"), bucket(steps, run.totals(), _COLUMNS), BLUE)]
    if bool(run.clipped().any()):
        norm.append(Trace(say("after clipping"), bucket(steps, run.clipped_totals(), _COLUMNS), GREEN))
    parts = [(say("gradient norm"), traces(norm, y_title=""))]
    if "loss" in run.scalar_names:
        loss = Trace(say("loss"), bucket(steps, run.losses(), _COLUMNS), ORANGE)
        parts.append((say("loss"), traces([loss], y_title="")))
    norms = bucket_norms(run, _COLUMNS)
    parts.append(
        (
            say("every parameter"),
            heat_map(run.names, norms, torch.zeros(len(norms.first), dtype=torch.bool, device="cpu")),
        )
    )
    titles = [shown(title) for title, _ in parts]
    whole = make_subplots(
        rows=len(parts),
        shared_xaxes=True,
        vertical_spacing=0.06,
        subplot_titles=titles,
        figure=_without_logo(),
    )
    for row, (_, part) in enumerate(parts, start=1):
        for trace in part.data:
            whole.add_trace(trace, row=row, col=1)
        axis = part.layout.yaxis.to_plotly_json()
        whole.update_yaxes({k: v for k, v in axis.items() if k not in ("domain", "anchor")}, row=row, col=1)
    domain = whole.layout[f"yaxis{len(parts)}"].domain
    whole.data[-1].colorbar.update(len=domain[1] - domain[0], y=sum(domain) / 2)
    whole.update_xaxes(title=shown(say("step")), row=len(parts), col=1)
    length = count(len(run), "{n:,} step", "{n:,} steps")
    told = say("{name}: {steps}, {policy}", name=run.path.name, steps=length, policy=policy)
    return whole.update_layout(
        height=260 * len(parts), title=shown(told), legend={"orientation": "h", "y": -0.08}
    )


def _without_logo() -> Any:
    """A figure that is shown without plotly's own buttons, which is for whoever shows it to say, not for a figure."""

    class Figure(_plotly().Figure):  # type: ignore[misc]  # plotly ships no types
        def show(self, *arguments: Any, **settings: Any) -> Any:
            return super().show(*arguments, **{"config": CONFIG, **settings})

        def _ipython_display_(self) -> None:
            self.show()

    return Figure()
