"""The page of several recorded runs, drawn over each other."""

import itertools
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradkeel.explain import explain, words
from gradkeel.explain.run_figures import Trace, traces
from gradkeel.explain.run_page import COLUMNS
from gradkeel.language import readable, say
from gradkeel.page.figures import COLORS
from gradkeel.page.page import Line, Section, Table, page
from gradkeel.record import Reader, bucket

_ORDER = (1, 2, 3, 4, 0, 6, 7)
_LINES = [(COLORS[i], dash) for dash in ("solid", "dash", "dot") for i in _ORDER]


def runs_page(readers: Sequence[Reader], *, script: str | None = None) -> str:
    """The page of several open records: each run's verdict, figures in a table, and their curves over each other."""
    runs = dict(zip(_names(readers), readers, strict=True))
    explanations = {name: explain(reader) for name, reader in runs.items()}
    lines = [Line(name, words.verdict(one.diagnosis)) for name, one in explanations.items()]
    rows = []
    for name, one in explanations.items():
        losses = runs[name].losses()
        losses = losses[torch.isfinite(losses)]
        rows.append(
            [
                name,
                one.policy,
                f"{one.steps:,}",
                readable(float(losses[-1])) if len(losses) else "–",
                readable(float(runs[name].totals().nanmedian())),
                f"{one.clipped:.1%}",
                f"{one.skipped:,}",
            ]
        )
    head = [
        say("run"), say("policy"), say("steps"), say("last loss"), say("median norm"), say("clipped"), say("skipped"),
    ]  # fmt: skip
    sections = [
        Section(say("In numbers"), table=Table(head, rows)),
        *_drawn(runs, say("Loss"), Reader.losses),
        *_drawn(runs, say("Gradient norm"), Reader.totals, say("Before clipping.")),
        *_drawn(
            runs, say("Coefficient"), Reader.coefficients, say("What clipping multiplied the gradients by.")
        ),
    ]
    scalars = dict.fromkeys(itertools.chain(*(reader.scalar_names for reader in readers)))
    for name in scalars:
        if name != "loss":
            title = say("Learning rate") if name == "lr" else name
            sections += _drawn(runs, title, operator.methodcaller("scalar", name))
    subtitle = say(
        "{n} records; a click on a name in a legend hides the run, a double click shows it alone.",
        n=len(runs),
    )
    return page(say("Runs {names}", names=", ".join(runs)), subtitle, lines, sections, script=script)


def _names(readers: Sequence[Reader]) -> list[str]:
    """As short as tells them apart."""
    stems = [reader.path.stem for reader in readers]
    return stems if len(set(stems)) == len(stems) else [str(reader.path) for reader in readers]


def _drawn(
    runs: dict[str, Reader], title: str, values: Callable[[Reader], Tensor], text: str = ""
) -> list[Section]:
    """One line a run, where the run has the values."""
    lines, above = [], True
    for (name, reader), (color, dash) in zip(runs.items(), itertools.cycle(_LINES), strict=False):
        drawn = values(reader)
        if len(finite := drawn[torch.isfinite(drawn)]):
            here = ~drawn.isnan()
            lines.append(Trace(name, bucket(reader.steps()[here], drawn[here], COLUMNS), color, dash))
            above &= bool((finite > 0).all())
    return [Section(title, text, figure=traces(lines, y_title="", logarithmic=above))] if lines else []
