"""The table of a comparison, and its page."""

import itertools
import math
import shlex
import statistics
from collections.abc import Callable, Sequence

from gradkeel.compare.contest import same_starts
from gradkeel.compare.findings import Findings
from gradkeel.compare.plan import Comparison
from gradkeel.compare.run import Run
from gradkeel.compare.summary import Row, best_runs
from gradkeel.compare.sweep import LOOSE, TIGHT, WORKS, SweepPoint, sweep_points
from gradkeel.compare.words import number
from gradkeel.language import count, join, readable, say
from gradkeel.page.figures import Band, Curves, Point, Series, against, curves
from gradkeel.page.page import Section, Table, page

_KINDS = {TIGHT: "weak", WORKS: "good", LOOSE: "bad"}


def table(rows: Sequence[Row], comparison: Comparison) -> Table:
    """The summary as text, in the order of ``rows``."""
    validated = any(run.validation_loss is not None for run in comparison.runs)
    target = rows[0].target_loss if rows else math.nan
    headers = [
        say("policy"), say("best lr"), say("val. loss" if validated else "final loss"), say("range"), say("diverged"),
        say("clipped"), say("steps to {loss}", loss=number(target)), say("volatility"), say("ms/step"),
    ]  # fmt: skip
    return Table(headers, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    failed = math.isinf(row.loss)
    return [
        row.policy,
        number(row.lr),
        say("diverged") if failed else number(row.loss),
        "–" if math.isnan(row.lowest) else f"{readable(row.lowest)}–{readable(row.highest)}",
        f"{row.diverged}/{row.runs}",
        f"{row.clip_rate:.0%}",
        _steps(row),
        "–" if math.isnan(row.volatility) else f"{row.volatility:.1%}",
        f"{row.seconds_per_step * 1e3:.1f}",
    ]


def _steps(row: Row) -> str:
    if math.isnan(row.target_loss):
        return "–"
    return say("never") if math.isinf(row.steps_to_target) else f"{row.steps_to_target:.0f}"


def compare_page(comparison: Comparison, rows: Sequence[Row], words: Findings) -> str:
    """The page of a comparison, as HTML."""
    plan, runs = comparison.plan, comparison.runs
    colors = {policy: i for i, policy in enumerate(plan.policies)}
    sections = [_ranking(comparison, rows), *_sweeps(comparison), *_rates(comparison, rows, colors)]
    shown = [
        row for row in rows if plan.sweep is None or row is rows[0] or row.policy not in plan.sweep.policies
    ]
    best = {row.policy: best_runs(runs, row.policy) for row in shown}
    several = len(plan.learning_rates) > 1
    at_best = say("Loss, each policy at its best learning rate" if several else "Loss")
    sections += _losses(at_best, best, colors)
    winner = next((row for row in rows if row.policy != "none"), rows[0])
    common = {
        row.policy: [run for run in runs if (run.policy, run.lr) == (row.policy, winner.lr)] for row in shown
    }
    where = "" if winner.lr is None else say(" at lr {lr}", lr=number(winner.lr))
    if any([run.lr for run in best[policy]] != [run.lr for run in common[policy]] for policy in best):
        sections += _losses(say("Loss, every policy{where}", where=where), common, colors)
    text = say(
        "The true gradients{where}, before clipping. A thin line is a seed, the thick one their median.",
        where=where,
    )
    y_title = say("gradient norm")
    sections += _drawn(say("Gradient norm"), text, common, colors, lambda run: run.norms, y_title)
    title = f"gradkeel compare {shlex.join(plan.arguments)}"
    return page(title, _subtitle(comparison), words.lines(), sections)


def _subtitle(comparison: Comparison) -> str:
    plan = comparison.plan
    rates, batches = len(plan.learning_rates), plan.accumulate
    if not plan.is_command:
        starts = say("the same initial weights and batches for every policy")
    elif same_starts(comparison.runs):
        starts = say("every policy of a seed began with the same loss and gradient norm")
    else:
        starts = say("not known to begin from the same weights and batches")
    text = say(
        "{policies}{rates}{seeds}{steps}{batches}; {starts}.",
        policies=count(len(plan.policies), "{n} policy", "{n} policies"),
        rates=count(rates, ", {n} learning rate", ", {n} learning rates") if rates else "",
        seeds=count(len(plan.seeds), ", {n} seed", ", {n} seeds"),
        steps=count(plan.steps, ", {n:,} step", ", {n:,} steps") if plan.steps else "",
        batches=say(", each on {n} accumulated batches", n=batches) if batches > 1 else "",
        starts=starts,
    )
    if not comparison.interrupted:
        return text
    runs = count(len(plan.trials), "{n} run", "{n} runs")
    return join([text, say("Interrupted after {done} of {runs}.", done=len(comparison.runs), runs=runs)])


def _ranking(comparison: Comparison, rows: Sequence[Row]) -> Section:
    validated = any(run.validation_loss is not None for run in comparison.runs)
    text = say(
        "Ranked by {loss} (median over seeds) at each policy's own best learning rate. Diverged counts all its runs: a "
        "loss or a weight was not finite, or the loss ended above where it began. Volatility is the mean change of the "
        "loss from step to step, relative to the loss, over the second half.",
        loss=say("validation loss" if validated else "final loss"),
    )
    return Section(say("Result"), text, table(rows, comparison))


def _rates(comparison: Comparison, rows: Sequence[Row], colors: dict[str, int]) -> list[Section]:
    rates = sorted({run.lr for run in comparison.runs if run.lr is not None})
    if len(rates) < 2 or comparison.plan.sweep is not None:
        return []
    series = []
    for row in rows:
        groups = [(lr, [r for r in comparison.runs if (r.policy, r.lr) == (row.policy, lr)]) for lr in rates]
        points = [_score_point(lr, group) for lr, group in groups if group]
        series.append(Series(row.policy, points, colors[row.policy]))
    x_title, y_title = say("learning rate"), say("loss after training")
    figure = against(series, x_title=x_title, y_title=y_title, failed=say("diverged"))
    text = say("Median over seeds, and range. A cross: most seeds diverged.")
    return [Section(say("Which learning rates work"), text, figure=figure)]


def _score_point(x: float, group: Sequence[Run]) -> Point:
    scores = [run.score for run in group]
    finite = [score for score in scores if math.isfinite(score)]
    note = say("diverged: {n} of {runs}", n=sum(run.diverged for run in group), runs=len(group))
    return Point(
        x, statistics.median(scores), min(finite, default=math.nan), max(finite, default=math.nan), note
    )


def _losses(title: str, groups: dict[str, list[Run]], colors: dict[str, int]) -> list[Section]:
    text = say(
        "A thin line is a seed, the thick one their median; a cross marks a loss that stopped being finite."
    )
    return _drawn(title, text, groups, colors, lambda run: run.losses, say("training loss"))


def _drawn(
    title: str,
    text: str,
    groups: dict[str, list[Run]],
    colors: dict[str, int],
    values: Callable[[Run], Sequence[float]],
    y_title: str,
) -> list[Section]:
    """Curves of the runs, unless nothing in them is finite."""
    drawn = [
        Curves(name, [values(run) for run in runs], colors[name]) for name, runs in groups.items() if runs
    ]
    if not any(any(map(math.isfinite, line)) for group in drawn for line in group.lines):
        return []
    return [Section(title, text, figure=curves(drawn, x_title=say("step"), y_title=y_title))]


def _sweeps(comparison: Comparison) -> list[Section]:
    sweep = comparison.plan.sweep
    points = [] if sweep is None else sweep_points(sweep, comparison.runs)
    if sweep is None or not points:
        return []
    series = []
    for i, lr in enumerate(dict.fromkeys(point.lr for point in points)):
        name = sweep.name if lr is None else say("{policy}, lr {lr}", policy=sweep.name, lr=number(lr))
        series.append(Series(name, [_sweep_point(p) for p in points if p.lr == lr], i))
    bands = _bands(points) if len(series) == 1 else []
    figure = against(
        series, x_title=say("bound"), y_title=say("final loss"), failed=say("not finite"), bands=bands
    )
    text = say(
        "Final training loss against the bound: median over seeds, and range. Works: fewer than half of the seeds "
        "diverged, and the loss came down at least half as far as under the best bound. "
        "There may be more than one such range."
    )
    head = [say("bound"), say("lr"), say("final loss"), say("diverged"), say("region")]
    rows = [
        [number(p.bound), number(p.lr), number(p.final_loss), f"{p.diverged}/{p.runs}", p.region]
        for p in points
    ]
    return [
        Section(say("Which bounds work"), text, figure=figure),
        Section(say("Each bound in numbers"), table=Table(head, rows)),
    ]


def _sweep_point(point: SweepPoint) -> Point:
    note = say("{region}; diverged: {n} of {runs}", region=point.region, n=point.diverged, runs=point.runs)
    return Point(point.bound, point.final_loss, point.lowest, point.highest, note)


def _bands(points: Sequence[SweepPoint]) -> list[Band]:
    """Neighbours of one region as one band, from half way to the bound before to half way to the one after."""
    edges = [math.sqrt(a.bound * b.bound) for a, b in itertools.pairwise(points)]
    start = points[0].bound ** 2 / edges[0] if edges else points[0].bound / 2
    end = points[-1].bound ** 2 / edges[-1] if edges else points[0].bound * 2
    bands: list[Band] = []
    for point, low, high in zip(points, [start, *edges], [*edges, end], strict=True):
        first = bands.pop().first if bands and bands[-1].label == point.region else low
        bands.append(Band(first, high, point.region, _KINDS[point.region]))
    return bands
