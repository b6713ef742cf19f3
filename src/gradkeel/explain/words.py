"""An explanation in sentences and plain tables: the same for the terminal, the page and a notebook."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from gradkeel.explain.explosion import Explosion
from gradkeel.explain.fading import Fading
from gradkeel.explain.findings import AutopsyResult
from gradkeel.explain.readable import readable
from gradkeel.explain.threshold import Estimate, ThresholdAdvice
from gradkeel.explain.verdict import Diagnosis, Verdict

if TYPE_CHECKING:
    from gradkeel.explain.explanation import Explanation

_KIND = {
    "explosion": "The gradients exploded",
    "spike": "The gradients spiked",
    "initialization": "The gradients exploded from the initialization on",
    "overflow": "The loss scale overflowed, which GradScaler provokes by design",
    "weights": "A parameter was changed by something other than the optimizer",
    "updates": "Updates overwrote the weights",
    "drift": "The gradients grew slowly, without a jump",
}


_VERDICT = {
    Verdict.HEALTHY: "healthy",
    Verdict.DIVERGED_FROM_START: "diverged from the start: the learning rate, or the initialization, is too large",
    Verdict.DIVERGED_IN_WARMUP: "diverged during warm-up: the learning rate passed what the loss allows",
    Verdict.DIVERGED: "diverged",
    Verdict.CLIPPING_HIDES_DIVERGENCE: "diverged, and clipping hides it",
    Verdict.SPIKE_RECOVERED: "spiked, and recovered",
    Verdict.SPIKE_UNRECOVERED: "spiked, and did not recover",
    Verdict.DRIFT: "the gradients grew slowly",
    Verdict.NON_FINITE: "not finite",
    Verdict.LOSS_SCALE_OVERFLOW: "the loss scale overflowed, which GradScaler provokes by design",
    Verdict.VANISHING: "weights hardly learn",
    Verdict.STALLED: "stalled: the loss did not fall",
}


_CAUSE = {
    "learning_rate": "the learning rate",
    "initialization": "the initial weights",
    "sample": "one sample of a batch",
    "batch": "the batch",
    "numerics": "an operation that left the range of its numbers",
    "state": "the weights, on any batch",
    "transient": "something that did not happen again",
    "loss_scale": "the loss scale",
    "second_moment_lag": "a second moment that lags behind the gradients",
    "weights_changed": "something that wrote to the weights",
}


def cause(diagnosis: Diagnosis) -> list[str]:
    """What did it, where that is known, in one sentence."""
    return [] if diagnosis.cause is None else [f"The cause: {_CAUSE[diagnosis.cause]}."]


def verdict(diagnosis: Diagnosis) -> str:
    """The verdict on a run, in one sentence."""
    onset = "" if diagnosis.onset is None else f", from step {diagnosis.onset} on"
    where = f", first in {', '.join(diagnosis.where)}" if diagnosis.where else ""
    return f"{_VERDICT[diagnosis.verdict]}{onset}{where} (confidence {diagnosis.confidence:.2g})."


def missing(diagnosis: Diagnosis) -> list[str]:
    """What was not recorded and would have helped, a sentence each."""
    return [f"Not recorded, and would have helped: {what}." for what in diagnosis.missing]


def experiments(result: AutopsyResult) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of an autopsy's experiments."""
    rows = [
        [e.change, readable(e.norm, 4), readable(e.loss, 4), "still there" if e.is_bad else "gone"]
        for e in result.experiments
    ]
    return ["changed", "gradient norm", "loss", "the fault was"], rows


def _experiments(result: AutopsyResult) -> list[str]:
    return [
        f"{change}: gradient norm {norm}, loss {loss}, the fault was {outcome}"
        for change, norm, loss, outcome in experiments(result)[1]
    ]


def headline(explosion: Explosion) -> str:
    """What happened, in one sentence."""
    if not explosion.found or explosion.kind is None:
        return "No explosion was found."
    if explosion.kind == "initialization":
        where = f"in {explosion.parameter} " if explosion.parameter else ""
        return f"{_KIND[explosion.kind]}: first {where}at step {explosion.step}."
    where = f", first in {explosion.parameter}" if explosion.parameter else ""
    about = "from about" if explosion.kind == "drift" else "at"
    after = "; they came back afterwards" if explosion.kind == "spike" else ""
    return f"{_KIND[explosion.kind]} {about} step {explosion.step}{where}{after}."


def progress(explosion: Explosion) -> list[str]:
    """Growth and order, in sentences."""
    sentences = []
    if explosion.growth_per_step is not None and explosion.peak_norm is not None:
        sentences.append(
            f"The norm grew by a factor of {readable(explosion.growth_per_step)} a step, to "
            f"{readable(explosion.peak_norm)} at step {explosion.peak_step}."
        )
    if len(explosion.spread) > 1:
        order = [f"{reached.parameter} ({reached.step})" for reached in explosion.spread[:8]]
        more = f", and {len(explosion.spread) - 8} more" if len(explosion.spread) > 8 else ""
        sentences.append(f"Order (step): {', '.join(order)}{more}.")
    return sentences


def fading(fading: Fading) -> list[str]:
    """What hardly learns, a sentence each."""
    sentences = [
        f"The gradient of {faded.parameter} is vanishing: {faded.share:.1g} of the median parameter's since about step "
        f"{faded.since}."
        for faded in fading.vanishing
    ]
    sentences += [
        f"The gradient of {faded.parameter} is dead: exactly zero since about step {faded.since}."
        for faded in fading.dead
    ]
    return sentences + [
        f"{name} is frozen: it got no gradient, or no update moved it." for name in fading.frozen
    ]


def rolled_back(explanation: "Explanation") -> list[str]:
    """What was recorded again later, a sentence each."""
    sentences = []
    for old in explanation.rolled_back:
        what = " ".join(headline(event) for event in old.events) or "No explosion was found in them."
        sentences.append(
            f"Steps {old.step} to {old.last_step} were recorded again from step {old.step} on (session {old.session}), "
            f"and do not count above. {what}"
        )
    return sentences


def estimate(value: Estimate, form: Callable[[float], str] = readable) -> str:
    """A number and its interval."""
    return f"{form(value.value)} [{form(value.low)}, {form(value.high)}]"


def threshold_table(advice: ThresholdAdvice) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of candidate bounds."""
    head = ["bound", "which", "clipped", "mean coefficient", "coefficients 5%-95%"]
    has_lr = any(candidate.effective_lr is not None for candidate in advice.candidates)
    rows = []
    for candidate in advice.candidates:
        low, high = candidate.coefficient_spread
        row = [
            readable(candidate.bound, 4),
            candidate.origin,
            estimate(candidate.clip_rate, "{:.1%}".format),
            estimate(candidate.mean_coefficient),
            f"{readable(low)} to {readable(high)}",
        ]
        if has_lr:
            row.append("" if candidate.effective_lr is None else estimate(candidate.effective_lr))
        rows.append(row)
    return [*head, "effective lr"] if has_lr else head, rows


def distribution(advice: ThresholdAdvice) -> list[str]:
    """The distribution of the norms, in sentences."""
    what = "" if advice.scope == "global" else " (of single parameters' gradients)"
    middle, *others = ((level, readable(advice.quantiles[level].value)) for level in (0.5, 0.9, 0.99))
    rest = " and ".join(f"{level:.0%} below {value}" for level, value in others)
    sentences = [
        f"Over {advice.steps:,} steps the median norm{what} was {middle[1]}; {rest}, before clipping."
    ]
    if advice.drift is not None:
        sentences.append(
            f"Its level in the last quarter is {estimate(advice.drift)} times that in the first (95% interval)."
        )
    return sentences


def paragraphs(explanation: "Explanation") -> Iterator[tuple[str, list[str]]]:
    """All of it but the table of bounds: what each paragraph begins with, and its sentences."""
    explosion, diagnosis = explanation.explosion, explanation.diagnosis
    yield _run(explanation), []
    yield f"Verdict: {verdict(diagnosis)}", [*cause(diagnosis), *diagnosis.reasons, *missing(diagnosis)]
    if explosion.found or diagnosis.verdict is Verdict.HEALTHY:
        yield headline(explosion), [*explosion.evidence, *progress(explosion)]
    lists = [
        *((f"Autopsy: {one}", _experiments(one)) for one in explanation.autopsies),
        ("Also:", [headline(event) for event in explanation.events if event is not explosion]),
        ("Rolled back:", rolled_back(explanation)),
        ("Hardly learning:", fading(explanation.fading)),
    ]
    if explanation.threshold is not None:
        lists.append(("Threshold:", [*distribution(explanation.threshold), *explanation.threshold.remarks]))
    yield from ((title, sentences) for title, sentences in lists if sentences)
    if explanation.damage:
        yield f"Not all could be read: {explanation.damage}.", []


def as_text(explanation: "Explanation") -> str:
    """All of it, in plain text."""
    parts = ["\n  - ".join([title, *sentences]) for title, sentences in paragraphs(explanation)]
    if explanation.threshold is not None:
        parts.append("\n".join(table(*threshold_table(explanation.threshold))))
    return "\n\n".join(parts)


def _run(explanation: "Explanation") -> str:
    optimizer = f"{explanation.optimizer}, " if explanation.optimizer else ""
    return (
        f"{explanation.path}: {explanation.steps:,} steps ({explanation.first_step} to {explanation.last_step}), "
        f"{explanation.parameters:,} parameters, {optimizer}policy {explanation.policy}; "
        f"{explanation.clipped:.1%} of the steps clipped, {explanation.skipped} skipped."
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
