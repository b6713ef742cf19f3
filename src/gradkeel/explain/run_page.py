"""The page of a recorded run: the explanation in words on top, and under it the figures that it rests on."""

import math
import shlex
from typing import Any

import torch
from torch import Tensor

from gradkeel.explain import Explanation, explain, run_figures, words
from gradkeel.explain.run_figures import BLUE, FEW, GREEN, GREY, ORANGE, RED, VIOLET, Mark, Trace, width_of
from gradkeel.language import count, heard, join, readable, say
from gradkeel.page.page import Line, Section, Table, page
from gradkeel.record import Reader, bucket, bucket_norms

COLUMNS = 600
_MOST_CELLS = 120_000  # of the heat map: some 3 MB of page


def run_page(reader: Reader, *, script: str | None = None) -> str:
    """The page of an open record, as HTML that needs nothing else but the ``script`` of `gradkeel.page.page.page`."""
    explanation = explain(reader)
    steps = reader.steps()
    marks = _marks(explanation)
    sections = [
        Section(say("Autopsy of step {step}", step=one.step), one.words(), Table(*words.experiments(one)))
        for one in explanation.autopsies
    ]
    sections += [_norm(reader, steps, marks), _heat(reader, steps, marks, explanation), *_spread(explanation)]
    missing = say("No loss was recorded; this line, before optimizer.step(), gives one: guard.log(loss=loss)")
    loss = _scalar(reader, steps, marks, "loss", say("Loss"), ORANGE)
    sections += loss or [Section(say("Loss"), missing)]
    sections += _coefficient(reader, steps, marks)
    sections += _updates(reader, marks)
    sections += _scalar(reader, steps, marks, "lr", say("Learning rate"), GREEN)
    for name in reader.scalar_names:
        if name not in {"loss", "lr"}:
            sections += _scalar(reader, steps, marks, name, name, BLUE)
    sections += _threshold(reader, explanation)
    title = say("Run {name}", name=reader.path.name)
    return page(title, _subtitle(reader, explanation), _lines(explanation), sections, script=script)


def _subtitle(reader: Reader, explanation: Explanation) -> str:
    session = reader.session
    return say(
        "{steps} ({run.first_step} to {run.last_step}) of {parameters}{under}, policy {run.policy}; "
        "{run.clipped:.1%} of the steps clipped, {run.skipped} skipped. Recorded from {started} with "
        "gradkeel {session.gradkeel} and torch {session.torch}.",
        run=explanation,
        steps=count(explanation.steps, "{n:,} step", "{n:,} steps"),
        parameters=count(explanation.parameters, "{n:,} parameter", "{n:,} parameters"),
        session=session,
        under=say(" under {optimizer}", optimizer=session.optimizer) if session.optimizer else "",
        started=reader.sessions[0].started,
    )


def _lines(explanation: Explanation) -> list[Line]:
    """The explanation in words."""
    explosion, diagnosis = explanation.explosion, explanation.diagnosis
    lines = [Line(say("VERDICT"), join([words.verdict(diagnosis), *words.grounds(diagnosis)]))]
    if explosion.found or diagnosis.verdict == "healthy":
        lines.append(Line(say("FOUND"), words.headline(explosion)))
    if explosion.found:
        lines.append(Line(say("WHY"), join(explosion.evidence)))
        if more := words.progress(explosion):
            lines.append(Line(say("HOW"), join(more)))
    others = [words.headline(event) for event in explanation.events if event is not explosion]
    if others:
        lines.append(Line(say("ALSO"), join(words.first(others, 5))))
    if old := words.rolled_back(explanation):
        lines.append(Line(say("BEFORE"), join(old)))
    if faded := words.fading(explanation.fading):
        lines.append(Line(say("FADING"), join(words.first(faded, 6))))
    if explanation.damage:
        lines.append(Line(say("DAMAGE"), say("{damage}.", damage=heard(explanation.damage))))
    if explanation.threshold is not None:
        lines.append(Line(say("NORMS"), join(words.distribution(explanation.threshold))))
        bound = float(f"{explanation.threshold.quantiles[0.9].value:.2g}")
        other = "norm" if explanation.threshold.scope == "tensor" else "global-norm"
        command = f"gradkeel replay {shlex.quote(explanation.path)} --policy {other}:{bound:g} --policy zclip"
        lines.append(Line(say("NEXT"), command, command=True))
    return lines


def _marks(explanation: Explanation) -> list[Mark]:
    onset = explanation.diagnosis.onset
    step = explanation.explosion.step if onset is None else onset
    return [] if step is None else [Mark(step, say("step {step}", step=step))]


def _norm(reader: Reader, steps: Tensor, marks: list[Mark]) -> Section:
    raw = bucket(steps, reader.totals(), COLUMNS)
    lines = [Trace(say("before clipping"), raw, BLUE)]
    verdicts = (
        (say("clipped"), reader.clipped(), ORANGE),
        (say("skipped"), ~reader.stepped(), RED),
        (say("not finite"), reader.nonfinite(), VIOLET),
    )
    strips = [(name, _shares(happened), color) for name, happened, color in verdicts if bool(happened.any())]
    if bool(reader.clipped().any()):
        lines.append(Trace(say("after clipping"), bucket(steps, reader.clipped_totals(), COLUMNS), GREEN))
    bounds = reader.bounds()
    if bool(torch.isfinite(bounds).any()):
        lines.append(Trace(say("bound"), bucket(steps, bounds, COLUMNS), GREY, "dash"))
    kind = say("{p:g}-norm", p=reader.norm_type)
    told = say("The {kind} of the gradients that the main policy looks at, taken together.", kind=kind)
    many = say(
        "Each point stands for {width} steps: the line is their median, the shade their range.",
        width=width_of(raw),
    )
    marked = say("The strips below mark steps.")
    text = join([told, marked if strips else "", many if width_of(raw) > 1 else ""])
    figure = run_figures.traces(lines, y_title=say("gradient norm"), marks=marks, strips=strips)
    return Section(say("Gradient norm"), text, figure=figure)


def _shares(happened: Tensor) -> Tensor:
    """[c] share of the steps of each bucket, with the buckets of ``bucket``."""
    width = max(1, math.ceil(len(happened) / COLUMNS))
    return torch.stack([part.double().mean() for part in happened.split(width)])


def _heat(reader: Reader, steps: Tensor, marks: list[Mark], explanation: Explanation) -> Section:
    columns = max(40, min(COLUMNS, _MOST_CELLS // max(1, len(reader.names))))
    buckets = bucket_norms(reader, columns)
    bad = steps[reader.nonfinite()]
    touched = torch.zeros(len(buckets.first), dtype=torch.bool, device="cpu")
    touched[torch.searchsorted(buckets.last, bad).clamp(max=len(touched) - 1)] = True
    width = width_of(buckets)
    told = [
        say(
            "Each row is a parameter, in the model's order; brighter is larger, on a logarithmic scale. An explosion "
            "shows as a column that lights up, and the row where it begins is where to look."
        ),
        say("The red marks on top show gradients that were not finite.") if bool(touched.any()) else "",
        say("Each cell is the highest norm of {width} steps.", width=width) if width > 1 else "",
        say("A row marked ▸ is a whole module; click on it to see what is in it.")
        if len(reader.names) > 1
        else "",
    ]
    where = explanation.explosion.spread
    figure = run_figures.heat_map(
        reader.names, buckets, touched, marks=marks, norm_type=reader.norm_type,
        onset=where[0].parameter if where else None,
    )  # fmt: skip
    return Section(say("Every parameter"), join(told), figure=figure)


def _spread(explanation: Explanation) -> list[Section]:
    spread = explanation.explosion.spread
    if len(spread) < 2:
        return []
    rows = [
        [reached.parameter, str(reached.step), "" if reached.growth is None else readable(reached.growth)]
        for reached in spread[:20]
    ]
    more = say("The first 20 of {n}.", n=len(spread)) if len(spread) > 20 else ""
    text = say("In which order parameters were reached, and their norm there over what it was before.")
    initial = explanation.explosion.kind == "initialization"
    times = say("times its first norm" if initial else "times its usual norm")
    return [
        Section(say("How it spread"), join([text, more]), Table([say("parameter"), say("step"), times], rows))
    ]


def _scalar(
    reader: Reader, steps: Tensor, marks: list[Mark], name: str, title: str, color: str
) -> list[Section]:
    values = reader.scalar(name)
    known = values[torch.isfinite(values)]
    if not len(known) or (name == "lr" and bool((known == known[0]).all())):
        return []
    measured = ~values.isnan()
    rare = 2 * int(measured.sum()) < len(values)  # what is measured now and then
    if rare:
        steps, values = steps[measured], values[measured]
    line = Trace(name, bucket(steps, values, COLUMNS), color, sampled=rare)
    above = bool((known > 0).all())
    y_title = {"loss": say("loss"), "lr": say("learning rate")}.get(name, title.lower())
    figure = run_figures.traces([line], y_title=y_title, logarithmic=above, marks=marks)
    if rare:
        _as_wide_as_lines(figure, reader)
    return [Section(title, figure=figure)]


def _as_wide_as_lines(figure: Any, reader: Reader) -> None:
    """Points in the other figures' range of steps, whose lines need no room at their ends."""
    if len(reader) > FEW:
        figure.update_xaxes(range=[int(reader.steps()[0]), reader.last_step])


def _coefficient(reader: Reader, steps: Tensor, marks: list[Mark]) -> list[Section]:
    if not bool(reader.clipped().any()):
        return []
    buckets = bucket(steps, reader.coefficients(), COLUMNS)
    y_range = (0.0, 1.05) if float(buckets.median.nanmedian()) > 0.1 else None  # logarithmic
    text = say("What clipping multiplied the gradients by; the smallest one where parameters have their own.")
    lines = [Trace(say("coefficient"), buckets, VIOLET)]
    figure = run_figures.traces(lines, y_title=say("coefficient"), y_range=y_range, marks=marks)
    return [Section(say("Coefficient"), text, figure=figure)]


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
        Trace(say("largest"), bucket(steps[known], largest, COLUMNS), RED, sampled=True),
        Trace(say("median parameter"), bucket(steps[known], middle, COLUMNS), BLUE, sampled=True),
    ]
    text = say(
        "Norm of the update over the norm of the weights it changed, at the {n:,} steps where it was measured. "
        "Above 1 an update overwrites what was there.",
        n=int(known.sum()),
    )
    figure = run_figures.traces(lines, y_title=say("update / weights"), marks=marks)
    _as_wide_as_lines(figure, reader)
    figure.add_hline(y=1, line={"dash": "dot", "width": 1, "color": GREY}, row=1, col=1)
    return [Section(say("Updates"), text, figure=figure)]


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
    told = say(
        "How often which norm occurred, over the whole record, and candidate bounds. In brackets: 95% intervals."
    )
    text = join([told, *advice.remarks])
    title = say("gradient norm, before clipping")
    if advice.scope == "tensor":
        title = say("global norm (the table's bounds are on single parameters' norms)")
        marks = []
    figure = run_figures.distribution(totals, marks, x_title=title)
    return [Section(say("Distribution and bounds"), text, Table(head, rows), figure)]
