"""What an explanation rests on, in sentences; each says only what the record shows."""

import math

import torch

from gradkeel.explain.course import Course
from gradkeel.explain.events import Event, Reached
from gradkeel.explain.weights import Jump, Overwrite
from gradkeel.language import count, heard, readable, say

_BACK = 50  # steps before an event in which a change of the learning rate is told


def later(
    course: Course, event: Event, reached: list[Reached], jumps: list[Jump], before: Overwrite | None
) -> tuple[str, ...]:
    """Of an explosion that left a past."""
    assert event.baseline is not None
    step, norm, usual = course.step(event.start), float(course.totals[event.start]), event.baseline.norm
    rise = say(
        "At step {step} the gradient norm was {norm}, {times} times {usual}, the median of the steps before: a "
        "robust z-score of {score:.1f} on the log norm."
        if math.isfinite(norm)
        else "At step {step} the gradient was not finite; its norm had been {usual}, the median of the steps before.",
        step=step,
        norm=readable(norm),
        times=readable(norm / usual),
        usual=readable(usual),
        score=event.baseline.score(norm),
    )
    causes = [*map(jump, jumps), rates(course, event.start), overwrite(before) if before else ""]
    seen = [rise, _order(course, reached, step), _losses(course, event), _skipped(course, event)]
    return tuple(filter(None, (*causes, *seen, _ending(course, event))))


def is_bad_start(course: Course, event: Event) -> bool:
    """Whether an event was nothing but norms that are not finite, and is over: no explosion, whatever came before."""
    return event.ended == "recovered" and not bool(
        torch.isfinite(course.totals[event.start : event.stop]).any()
    )


def initial(course: Course, event: Event, onsets: list[tuple[str, int, float]]) -> tuple[str, ...]:
    """Of an explosion from the first steps on."""
    if is_bad_start(course, event):
        step = course.step(event.start)
        first = say(
            "At step {step} the gradient was not finite; there is no past to compare with.", step=step
        )
        return tuple(filter(None, (first, _skipped(course, event), _ending(course, event))))
    finite = course.totals[torch.isfinite(course.totals)]
    norms = ", ".join(map(readable, finite[:5].tolist())) + (", ..." if len(finite) > 5 else "")
    grew = len(finite) > 1 and bool(finite[1:].max() > finite[0])
    first = say(
        "There is no past to compare with: no gradient norm was finite."
        if not norms
        else "There is no past to compare with: the gradient norm grew from the first steps on ({norms})."
        if grew
        else "There is no past to compare with: the gradient norm was high from the first steps on ({norms}).",
        norms=norms,
    )
    larger = ""
    if onsets:
        name, step, ratio = onsets[0]
        size = say("{ratio} times" if math.isfinite(ratio) else "beyond all measure", ratio=readable(ratio))
        larger = say(
            "The first update larger than the weights it changed was that of {name} at step {step}: {size}.",
            name=name,
            step=step,
            size=size,
        )
    why = say("Gradient norms do not tell why; initial weights and learning rate are what acted until then.")
    return tuple(filter(None, (first, larger, why, _losses(course, event), _ending(course, event))))


def jump(jump: Jump) -> str:
    """Of weights that changed without an update."""
    when = say(
        "at step {step}"
        if jump.is_exact
        else "between steps {after} and {until}, judging by the gradients at step {step}",
        after=jump.after,
        until=jump.until,
        step=jump.step,
    )
    return say(
        "The weights of {parameter} changed {when}. Their norm went from {before} to {after} ({times} times), and no "
        "update explains it: something else wrote to them.",
        parameter=jump.parameter,
        when=when,
        before=readable(jump.before_norm),
        after=readable(jump.after_norm),
        times=readable(jump.ratio),
    )


def overwrite(overwrite: Overwrite) -> str:
    """Of updates as large as the weights."""
    most = ""
    if overwrite.parameters:
        name, ratio = overwrite.parameters[0]
        most = say(", most of all in {name}: {ratio} times", name=name, ratio=readable(ratio))
    return say(
        "The update at step {step} was {ratio} times as large as the weights that it changed (usual before: {before})"
        "{most}.",
        step=overwrite.step,
        ratio=readable(overwrite.ratio),
        before=readable(overwrite.before, 2),
        most=most,
    )


def drift(stretch: int, before: float, after: float, growths: list[tuple[str, float]]) -> tuple[str, ...]:
    """Of a slow rise between two levels of the norm, over ``stretch`` steps each, and of each parameter's own."""
    parameter, growth = growths[0]
    return (
        say(
            "The level of the gradient norm (its median over {stretch} steps) rose from {before} to {after}, {times} "
            "times, without a jump.",
            stretch=stretch,
            before=readable(before),
            after=readable(after),
            times=readable(after / before),
        ),
        say(
            "The level of {parameter} rose most: {times} times.", parameter=parameter, times=readable(growth)
        ),
    )


def _order(course: Course, reached: list[Reached], step: int) -> str:
    if not reached:
        return ""
    at_once = sum(r.step <= step for r in reached)
    return count(
        at_once,
        "{n} of {parameters} was reached at step {step}{later}.",
        "{n} of {parameters} were reached at step {step}{later}.",
        parameters=count(len(course.reader.names), "{n:,} parameter", "{n:,} parameters"),
        step=step,
        later=say(", and {n} within the event", n=len(reached)) if len(reached) > at_once else "",
    )


def rates(course: Course, row: int) -> str:
    """The largest rise of the learning rate shortly before a row, if there was one."""
    first = max(1, row - _BACK)
    before, after = course.rates[first - 1 : row], course.rates[first : row + 1]
    growth = (after / before).nan_to_num(nan=0.0, posinf=0.0)
    if not len(growth) or float(growth.max()) < 1.5:
        return ""
    row = first + int(growth.argmax())
    return say(
        "The learning rate rose from {before} to {after} at step {step}.",
        before=readable(float(course.rates[row - 1])),
        after=readable(float(course.rates[row])),
        step=course.step(row),
    )


def _losses(course: Course, event: Event) -> str:
    part = course.losses[event.start : event.stop]
    finite = part[part.isfinite()]
    before = float(course.losses[max(0, event.start - 1)])
    if not len(finite) or not float(finite.max()) > before:
        return ""
    highest = readable(float(finite.max()))
    return say("The loss rose from {before} to {highest}.", before=readable(before), highest=highest)


def _skipped(course: Course, event: Event) -> str:
    first, last = course.step(event.start), course.step(event.stop - 1)
    reasons = [reason for step, reason in course.skips.items() if first <= step <= last]
    if not reasons:
        return ""
    skipped = count(len(reasons), "{n} step was skipped", "{n} steps were skipped")
    return say("{skipped}; the first: {reason}.", skipped=skipped, reason=heard(reasons[0]))


def _ending(course: Course, event: Event) -> str:
    last = course.step(event.stop - 1)
    if event.ended == "recovered":
        return say("After step {step} the norm was back.", step=last)
    if event.ended == "non-finite":
        return say("It was not finite at step {step}, the last one recorded.", step=last)
    return say("It was still high at step {step}, the last one recorded.", step=last)
