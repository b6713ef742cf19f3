"""The page of a recorded run: the explanation in words on top, and under it the figures that it rests on."""

import math
import shlex

import torch
from torch import Tensor

from gradkeel.explain import Explanation, explain, words
from gradkeel.explain.readable import readable
from gradkeel.explain.run_figures import (
    BLUE,
    FEW,
    GREEN,
    GREY,
    ORANGE,
    RED,
    VIOLET,
    Mark,
    Trace,
    distribution,
    heat_map,
    traces,
)
from gradkeel.page.page import Line, Section, Table, page
from gradkeel.record import Buckets, Reader, bucket, bucket_norms

COLUMNS = 600
_MOST_CELLS = 120_000  # of the heat map: some 3 MB of page


def run_page(reader: Reader, *, script: str | None = None) -> str:
    """The page of a record, as HTML that needs nothing else.

    Args:
        reader: an open record with at least one step.
        script: as in `gradkeel.page.page.page`.

    Raises:
        RecordError: it holds no steps yet.
        MissingExtraError: plotly is not installed.
    """
    explanation = explain(reader)
    steps = reader.steps()
    marks = _marks(explanation)
    sections = [
        Section(f"Autopsy of step {one.step}", str(one), Table(*words.experiments(one)))
        for one in explanation.autopsies
    ]
    sections += [_norm(reader, steps, marks), _heat(reader, steps, marks, explanation), *_spread(explanation)]
    sections += _loss(reader, steps, marks)
    sections += _coefficient(reader, steps, marks)
    sections += _updates(reader, marks)
    sections += _scalar(reader, steps, marks, "lr", "Learning rate", GREEN)
    for name in reader.scalar_names:
        if name not in {"loss", "lr"}:
            sections += _scalar(reader, steps, marks, name, name, BLUE)
    sections += _threshold(reader, explanation)
    subtitle, lines = _subtitle(reader, explanation), _lines(explanation)
    return page(f"Run {reader.path.name}", subtitle, lines, sections, script=script)


def _subtitle(reader: Reader, explanation: Explanation) -> str:
    session = reader.session
    under = f" under {session.optimizer}" if session.optimizer else ""
    return (
        f"{explanation.steps:,} steps ({explanation.first_step} to {explanation.last_step}) of "
        f"{explanation.parameters} parameters{under}, policy {explanation.policy}; "
        f"{explanation.clipped:.1%} of the steps clipped, {explanation.skipped} skipped. "
        f"Recorded from {reader.sessions[0].started} with gradkeel {session.gradkeel} and torch {session.torch}."
    )


def _lines(explanation: Explanation) -> list[Line]:
    """The explanation in words."""
    explosion, diagnosis = explanation.explosion, explanation.diagnosis
    told = [words.verdict(diagnosis), *diagnosis.reasons, *words.missing(diagnosis)]
    lines = [Line("VERDICT", " ".join(told))]
    if explosion.found or diagnosis.verdict == "healthy":
        lines.append(Line("FOUND", words.headline(explosion)))
    if explosion.found:
        lines.append(Line("WHY", " ".join(explosion.evidence)))
        if more := words.progress(explosion):
            lines.append(Line("HOW", " ".join(more)))
    others = [words.headline(event) for event in explanation.events if event is not explosion]
    if others:
        rest = f" And {len(others) - 5} more." if len(others) > 5 else ""
        lines.append(Line("ALSO", " ".join(others[:5]) + rest))
    if old := words.rolled_back(explanation):
        lines.append(Line("BEFORE", " ".join(old)))
    if faded := words.fading(explanation.fading):
        lines.append(
            Line("FADING", " ".join(faded[:6]) + (f" And {len(faded) - 6} more." if len(faded) > 6 else ""))
        )
    if explanation.damage:
        lines.append(Line("DAMAGE", f"{explanation.damage}."))
    if explanation.threshold is not None:
        lines.append(Line("NORMS", " ".join(words.distribution(explanation.threshold))))
        bound = float(f"{explanation.threshold.quantiles[0.9].value:.2g}")
        other = "norm" if explanation.threshold.scope == "tensor" else "global-norm"
        command = f"gradkeel replay {shlex.quote(explanation.path)} --policy {other}:{bound:g} --policy zclip"
        lines.append(Line("NEXT", command, command=True))
    return lines


def _marks(explanation: Explanation) -> list[Mark]:
    onset = explanation.diagnosis.onset
    step = explanation.explosion.step if onset is None else onset
    return [] if step is None else [Mark(step, f"step {step}")]


def _norm(reader: Reader, steps: Tensor, marks: list[Mark]) -> Section:
    raw = bucket(steps, reader.totals(), COLUMNS)
    lines = [Trace("before clipping", raw, BLUE)]
    strips = []
    verdicts = (
        ("clipped", reader.clipped(), ORANGE),
        ("skipped", ~reader.stepped(), RED),
        ("not finite", reader.nonfinite(), VIOLET),
    )
    for name, happened, color in verdicts:
        if bool(happened.any()):
            strips.append((name, _shares(happened), color))
    if bool(reader.clipped().any()):
        lines.append(Trace("after clipping", bucket(steps, reader.clipped_totals(), COLUMNS), GREEN))
    bounds = reader.bounds()
    if bool(torch.isfinite(bounds).any()):
        lines.append(Trace("bound", bucket(steps, bounds, COLUMNS), GREY, "dash"))
    kind = "inf-norm" if math.isinf(reader.norm_type) else f"{reader.norm_type:g}-norm"
    text = (
        f"The {kind} of the gradients that the main policy looks at, taken together."
        + (" The strips below mark steps." if strips else "")
        + _bucketed(raw)
    )
    return Section(
        "Gradient norm", text, figure=traces(lines, y_title="gradient norm", marks=marks, strips=strips)
    )


def _bucketed(buckets: Buckets) -> str:
    if bool((buckets.first == buckets.last).all()):
        return ""
    width = int(buckets.last[0] - buckets.first[0]) + 1
    return f" Each point stands for {width} steps: the line is their median, the shade their range."


def _shares(happened: Tensor) -> Tensor:
    """[c] share of the steps of each bucket, with the buckets of ``bucket``."""
    width = max(1, math.ceil(len(happened) / COLUMNS))
    return torch.stack([part.double().mean() for part in happened.split(width)])


def _heat(reader: Reader, steps: Tensor, marks: list[Mark], explanation: Explanation) -> Section:
    columns = max(40, min(COLUMNS, _MOST_CELLS // max(1, len(reader.names))))
    buckets = bucket_norms(reader, columns)
    bad = steps[reader.nonfinite()]
    touched = torch.zeros(len(buckets.first), dtype=torch.bool)
    touched[torch.searchsorted(buckets.last, bad).clamp(max=len(touched) - 1)] = True
    text = (
        "Each row is a parameter, in the model's order; brighter is larger, on a logarithmic scale. "
        "An explosion shows as a column that lights up, and the row where it begins is where to look."
    )
    if bool(touched.any()):
        text += " The red marks on top show gradients that were not finite."
    if int(buckets.last[0]) > int(buckets.first[0]):
        text += f" Each cell is the highest norm of {int(buckets.last[0] - buckets.first[0]) + 1} steps."
    if len(reader.names) > 1:
        text += " A row marked ▸ is a whole module; click on it to see what is in it."
    where = explanation.explosion.spread
    figure = heat_map(
        reader.names, buckets, touched, marks=marks, norm_type=reader.norm_type,
        onset=where[0].parameter if where else None,
    )  # fmt: skip
    return Section("Every parameter", text, figure=figure)


def _spread(explanation: Explanation) -> list[Section]:
    spread = explanation.explosion.spread
    if len(spread) < 2:
        return []
    rows = [
        [reached.parameter, str(reached.step), "" if reached.growth is None else readable(reached.growth)]
        for reached in spread[:20]
    ]
    more = f" The first 20 of {len(spread)}." if len(spread) > 20 else ""
    text = f"In which order parameters were reached, and their norm there over what it was before.{more}"
    before = "first" if explanation.explosion.kind == "initialization" else "usual"
    return [Section("How it spread", text, Table(["parameter", "step", f"times its {before} norm"], rows))]


def _loss(reader: Reader, steps: Tensor, marks: list[Mark]) -> list[Section]:
    missing = "No loss was recorded; this line, before optimizer.step(), gives one: guard.log(loss=loss)"
    return _scalar(reader, steps, marks, "loss", "Loss", ORANGE) or [Section("Loss", missing)]


def _scalar(
    reader: Reader, steps: Tensor, marks: list[Mark], name: str, title: str, color: str
) -> list[Section]:
    values = reader.scalar(name)
    known = values[torch.isfinite(values)]
    if not len(known) or (name == "lr" and bool((known == known[0]).all())):
        return []
    line, above = Trace(name, bucket(steps, values, COLUMNS), color), bool((known > 0).all())
    figure = traces([line], y_title=title.lower(), logarithmic=above, marks=marks)
    return [Section(title, figure=figure)]


def _coefficient(reader: Reader, steps: Tensor, marks: list[Mark]) -> list[Section]:
    if not bool(reader.clipped().any()):
        return []
    buckets = bucket(steps, reader.coefficients(), COLUMNS)
    y_range = (0.0, 1.05) if float(buckets.median.nanmedian()) > 0.1 else None  # logarithmic
    text = "What clipping multiplied the gradients by; the smallest one where parameters have their own."
    lines = [Trace("coefficient", buckets, VIOLET)]
    return [
        Section(
            "Coefficient", text, figure=traces(lines, y_title="coefficient", y_range=y_range, marks=marks)
        )
    ]


def _updates(reader: Reader, marks: list[Mark]) -> list[Section]:
    """The largest update relative to the weights it changed, where that was measured."""
    steps, weights, updates = reader.weight_samples()
    ratios = updates / weights
    ratios = torch.where(torch.isfinite(ratios) & (ratios > 0), ratios, math.nan)
    known = ~ratios.isnan().all(dim=1)
    if int(known.sum()) < 2:
        return []
    largest = ratios[known].nan_to_num(nan=0.0).amax(dim=1)
    middle = ratios[known].nanmedian(dim=1).values
    lines = [
        Trace("largest", bucket(steps[known], largest, COLUMNS), RED, sampled=True),
        Trace("median parameter", bucket(steps[known], middle, COLUMNS), BLUE, sampled=True),
    ]
    text = (
        f"Norm of the update over the norm of the weights it changed, at the {int(known.sum()):,} steps where it was "
        "measured. Above 1 an update overwrites what was there."
    )
    figure = traces(lines, y_title="update / weights", marks=marks)
    if len(reader) > FEW:  # as in the other figures, whose lines need no room at their ends
        figure.update_xaxes(range=[int(reader.steps()[0]), reader.last_step])
    figure.add_hline(y=1, line={"dash": "dot", "width": 1, "color": GREY}, row=1, col=1)
    return [Section("Updates", text, figure=figure)]


def _threshold(reader: Reader, explanation: Explanation) -> list[Section]:
    advice = explanation.threshold
    if advice is None:
        return []
    colors = {"live": RED, "given": VIOLET}
    marks = [
        Mark(candidate.bound, readable(candidate.bound), colors.get(candidate.origin, GREY))
        for candidate in advice.candidates
    ]
    head, rows = words.threshold_table(advice)
    totals = reader.totals()
    text = (
        "How often which norm occurred, over the whole record, and candidate bounds. In brackets: 95% intervals. "
        + " ".join(advice.remarks)
    )
    title = "gradient norm, before clipping"
    if advice.scope == "tensor":
        title = "global norm (the table's bounds are on single parameters' norms)"
        marks = []
    figure = distribution(totals, marks, x_title=title)
    return [Section("Distribution and bounds", text, Table(head, rows), figure)]
