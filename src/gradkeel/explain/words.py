"""An explanation in sentences and plain tables: the same for the terminal, the page and a notebook."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gradkeel.explain.explosion import Explosion
from gradkeel.explain.fading import Fading
from gradkeel.explain.findings import AutopsyResult
from gradkeel.explain.threshold import Estimate, ThresholdAdvice
from gradkeel.explain.verdict import Diagnosis, Verdict
from gradkeel.language import aligned, count, heard, join, readable, say, shown

if TYPE_CHECKING:
    from gradkeel.explain.explanation import Explanation

_LISTED = 10  # events beside the worst
_KIND = {
    "explosion": say("The gradients exploded"),
    "spike": say("The gradients spiked"),
    "initialization": say("The gradients exploded from the initialization on"),
    "overflow": say("The loss scale overflowed, which GradScaler provokes by design"),
    "weights": say("A parameter was changed by something other than the optimizer"),
    "updates": say("Updates overwrote the weights"),
    "drift": say("The gradients grew slowly, without a jump"),
}
_VERDICT = {
    Verdict.HEALTHY: say("healthy"),
    Verdict.DIVERGED_FROM_START: say(
        "diverged from the start: the learning rate, or the initialization, is too large"
    ),
    Verdict.DIVERGED_IN_WARMUP: say("diverged during warm-up: the learning rate passed what the loss allows"),
    Verdict.DIVERGED: say("diverged"),
    Verdict.CLIPPING_HIDES_DIVERGENCE: say("diverged, and clipping hides it"),
    Verdict.SPIKE_RECOVERED: say("spiked, and recovered"),
    Verdict.SPIKE_UNRECOVERED: say("spiked, and did not recover"),
    Verdict.DRIFT: say("the gradients grew slowly"),
    Verdict.NON_FINITE: say("not finite"),
    Verdict.LOSS_SCALE_OVERFLOW: say("the loss scale overflowed, which GradScaler provokes by design"),
    Verdict.VANISHING: say("weights hardly learn"),
    Verdict.STALLED: say("stalled: the loss did not fall"),
}
_ORIGIN = {"live": say("live"), "given": say("given")}
_CAUSE = {
    "learning_rate": say("the learning rate"),
    "initialization": say("the initial weights"),
    "sample": say("one sample of a batch"),
    "batch": say("the batch"),
    "numerics": say("an operation that left the range of its numbers"),
    "state": say("the weights, on any batch"),
    "transient": say("something that did not happen again"),
    "loss_scale": say("the loss scale"),
    "weights_changed": say("something that wrote to the weights"),
    "second_moment_lag": say("Adam's second moment, which lagged behind gradients that had grown for good"),
}


def verdict(diagnosis: Diagnosis) -> str:
    """The verdict on a run, in one sentence."""
    return say(
        "{verdict}{onset}{where} (confidence {confidence:.2g}).",
        verdict=_VERDICT[diagnosis.verdict],
        onset="" if diagnosis.onset is None else say(", from step {step} on", step=diagnosis.onset),
        where=say(", first in {names}", names=", ".join(diagnosis.where)) if diagnosis.where else "",
        confidence=diagnosis.confidence,
    )


def grounds(diagnosis: Diagnosis) -> list[str]:
    """What did it, where that is known, the evidence, and what would have helped if recorded; a sentence each."""
    cause = [] if diagnosis.cause is None else [say("The cause: {cause}.", cause=_CAUSE[diagnosis.cause])]
    missing = [say("Not recorded, and would have helped: {what}.", what=what) for what in diagnosis.missing]
    return [*cause, *diagnosis.reasons, *missing]


def experiments(result: AutopsyResult) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of an autopsy's experiments."""
    rows: list[list[str]] = [
        [
            heard(e.change),
            readable(e.norm, 4),
            readable(e.loss, 4),
            say("still there" if e.is_bad else "gone"),
        ]
        for e in result.experiments
    ]
    return [say("changed"), say("gradient norm"), say("loss"), say("the fault was")], rows


def _experiments(result: AutopsyResult) -> list[str]:
    columns = ("change", "norm", "loss", "outcome")
    return [
        say(
            "{change}: gradient norm {norm}, loss {loss}, the fault was {outcome}",
            **dict(zip(columns, row, strict=True)),
        )
        for row in experiments(result)[1]
    ]


def headline(explosion: Explosion) -> str:
    """What happened, in one sentence."""
    if not explosion.found or explosion.kind is None:
        return say("No explosion was found.")
    if explosion.kind == "rhythm":
        return say(
            "Every {period} steps the gradient norm is high for a step, up to {peak} at step {peak_step}, and the "
            "loss, where it was logged, is no worse for it: perhaps the last batch of each epoch is small, which "
            "drop_last=True leaves out.",
            period=explosion.period,
            peak=readable(explosion.peak_norm or 0.0),
            peak_step=explosion.peak_step,
        )
    kind, step, parameter = _KIND[explosion.kind], explosion.step, explosion.parameter
    if explosion.kind == "initialization":
        where = say("in {parameter} ", parameter=parameter) if parameter else ""
        return say("{kind}: first {where}at step {step}.", kind=kind, where=where, step=step)
    where = say(", first in {names}", names=parameter) if parameter else ""
    if explosion.kind == "drift":
        return say("{kind} from about step {step}{where}.", kind=kind, step=step, where=where)
    after = say("; they came back afterwards") if explosion.kind == "spike" else ""
    return say("{kind} at step {step}{where}{after}.", kind=kind, step=step, where=where, after=after)


def progress(explosion: Explosion) -> list[str]:
    """Growth and order, in sentences."""
    sentences = []
    if explosion.growth_per_step is not None and explosion.peak_norm is not None:
        sentences.append(
            say(
                "The norm grew by a factor of {factor} a step, to {peak} at step {step}.",
                factor=readable(explosion.growth_per_step),
                peak=readable(explosion.peak_norm),
                step=explosion.peak_step,
            )
        )
    if len(explosion.spread) > 1:
        order = [f"{reached.parameter} ({reached.step})" for reached in explosion.spread[:8]]
        more = say(", and {n} more", n=len(explosion.spread) - 8) if len(explosion.spread) > 8 else ""
        sentences.append(say("Order (step): {order}{more}.", order=", ".join(order), more=more))
    return sentences


def fading(fading: Fading) -> list[str]:
    """What hardly learns, a sentence each."""
    vanishing = set(fading.vanishing)
    faded = [
        say(
            "The gradient of {one.parameter} is vanishing: {one.share:.1g} of the median parameter's since about step "
            "{one.since}."
            if one in vanishing
            else "The gradient of {one.parameter} is dead: exactly zero since about step {one.since}.",
            one=one,
        )
        for one in (*fading.vanishing, *fading.dead)
    ]
    since = {one.parameter: one.since for one in fading.stopped}
    words = [
        say("{name} is frozen: it has got no gradient since step {step}.", name=name, step=since[name])
        if name in since
        else say("{name} is frozen: it got no gradient, or no update moved it.", name=name)
        for name in fading.frozen
    ]
    return faded + words


def rolled_back(explanation: "Explanation") -> list[str]:
    """What was recorded again later, a sentence each."""
    sentences = []
    for old in explanation.rolled_back:
        again = say(
            "Step {old.step} was recorded again (session {old.session}), and does not count above."
            if old.step == old.last_step
            else "Steps {old.step} to {old.last_step} were recorded again from step {old.step} on (session "
            "{old.session}), and do not count above.",
            old=old,
        )
        found = [headline(event) for event in old.events] or [say("No explosion was found in them.")]
        sentences.append(join([again, *found]))
    return sentences


def estimate(value: Estimate, form: Callable[[float], str] = readable) -> str:
    """A number and its interval."""
    return f"{form(value.value)} [{form(value.low)}, {form(value.high)}]"


def threshold_table(advice: ThresholdAdvice) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of candidate bounds."""
    head = [
        say("bound"), say("which"), say("clipped"), say("mean coefficient"), say("coefficients 5%-95%"),
    ]  # fmt: skip
    has_lr = any(candidate.effective_lr is not None for candidate in advice.candidates)
    rows = []
    for candidate in advice.candidates:
        low, high = candidate.coefficient_spread
        row: list[str] = [
            readable(candidate.bound, 4),
            _ORIGIN.get(candidate.origin, candidate.origin),
            estimate(candidate.clip_rate, "{:.1%}".format),
            estimate(candidate.mean_coefficient),
            say("{low} to {high}", low=readable(low), high=readable(high)),
        ]
        if has_lr:
            row.append("" if candidate.effective_lr is None else estimate(candidate.effective_lr))
        rows.append(row)
    return [*head, say("effective lr")] if has_lr else head, rows


def distribution(advice: ThresholdAdvice) -> list[str]:
    """The distribution of the norms, in sentences."""
    what = "" if advice.scope == "global" else say(" (of single parameters' gradients)")
    median, high, highest = (readable(advice.quantiles[at].value) for at in (0.5, 0.9, 0.99))
    level = say(
        "Over {steps} the median norm{what} was {median}; 90% below {high} and 99% below {highest}, before "
        "clipping.",
        steps=count(advice.steps, "{n:,} step", "{n:,} steps"),
        what=what,
        median=median,
        high=high,
        highest=highest,
    )
    if advice.drift is None:
        return [level]
    drift = say(
        "Its level in the last quarter is {times} times that in the first (95% interval).",
        times=estimate(advice.drift),
    )
    return [level, drift]


def first(sentences: list[str], most: int) -> list[str]:
    """The first of them, and how many more there are."""
    rest = len(sentences) - most
    return sentences if rest <= 0 else [*sentences[:most], say("And {n} more.", n=rest)]


def paragraphs(explanation: "Explanation") -> Iterator[tuple[str, list[str]]]:
    """All of it but the table of bounds: what each paragraph begins with, and its sentences."""
    explosion, diagnosis = explanation.explosion, explanation.diagnosis
    yield _run(explanation), []
    yield say("Verdict: {verdict}", verdict=verdict(diagnosis)), grounds(diagnosis)
    if explosion.found or diagnosis.verdict is Verdict.HEALTHY:
        yield headline(explosion), [*explosion.evidence, *progress(explosion)]
    lists = [
        *((say("Autopsy: {what}", what=one.words()), _experiments(one)) for one in explanation.autopsies),
        (say("Also:"), first([headline(one) for one in explanation.events if one is not explosion], _LISTED)),
        (say("Rolled back:"), rolled_back(explanation)),
        (say("Hardly learning:"), fading(explanation.fading)),
    ]
    if explanation.threshold is not None:
        lists.append(
            (say("Threshold:"), [*distribution(explanation.threshold), *explanation.threshold.remarks])
        )
    yield from ((title, sentences) for title, sentences in lists if sentences)
    if explanation.damage:
        yield say("Not all could be read: {damage}.", damage=heard(explanation.damage)), []


def as_text(explanation: "Explanation") -> str:
    """All of it, in plain text, in the reader's language."""
    parts = ["\n  - ".join(map(shown, [title, *sentences])) for title, sentences in paragraphs(explanation)]
    if explanation.threshold is not None:
        head, rows = threshold_table(explanation.threshold)
        parts.append("\n".join(aligned([head, *rows], words=len(head))))
    return "\n\n".join(parts)


def _run(explanation: "Explanation") -> str:
    return say(
        "{run.path}: {steps} ({run.first_step} to {run.last_step}), {parameters}, {optimizer}policy {run.policy}; "
        "{run.clipped:.1%} of the steps clipped, {run.skipped} skipped.",
        run=explanation,
        steps=count(explanation.steps, "{n:,} step", "{n:,} steps"),
        parameters=count(explanation.parameters, "{n:,} parameter", "{n:,} parameters"),
        optimizer=say("{optimizer}, ", optimizer=explanation.optimizer) if explanation.optimizer else "",
    )
