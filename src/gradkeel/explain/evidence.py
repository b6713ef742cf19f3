"""What an explanation rests on, in sentences; each says only what the record shows."""

import math

from gradkeel.explain.course import Course
from gradkeel.explain.drift import Drift
from gradkeel.explain.events import Event
from gradkeel.explain.jumps import Jump
from gradkeel.explain.readable import readable
from gradkeel.explain.spread import Reached
from gradkeel.explain.updates import Overwrite

_BACK = 50  # steps before an event in which a change of the learning rate is told


def later(
    course: Course, event: Event, reached: list[Reached], jumps: list[Jump], before: Overwrite | None
) -> tuple[str, ...]:
    """Of an explosion that left a past."""
    assert event.baseline is not None
    step, norm = course.step(event.start), float(course.totals[event.start])
    usual = f"{readable(event.baseline.norm)}, the median of the steps before"
    if math.isfinite(norm):
        rise = (
            f"At step {step} the gradient norm was {readable(norm)}, {readable(norm / event.baseline.norm)} times "
            f"{usual}: a robust z-score of {event.baseline.score(norm):.1f} on the log norm."
        )
    else:
        rise = f"At step {step} the gradient was not finite; its norm had been {usual}."
    causes = [*map(jump, jumps), rates(course, event.start), *([overwrite(before)] if before else [])]
    sentences = [*causes, rise, _order(course, reached, step), _losses(course, event)]
    return tuple(words for words in (*sentences, _skipped(course, event), _ending(course, event)) if words)


def initial(course: Course, event: Event, onsets: list[tuple[str, int, float]]) -> tuple[str, ...]:
    """Of an explosion from the first steps on."""
    norms = ", ".join(map(readable, course.totals[:5].tolist()))
    sentences = [
        f"There is no past to compare with: the gradient norm grew from the first steps on ({norms}"
        f"{', ...' if len(course.totals) > 5 else ''})."
    ]
    if onsets:
        name, step, ratio = onsets[0]
        size = f"{readable(ratio)} times" if math.isfinite(ratio) else "beyond all measure"
        sentences.append(
            f"The first update larger than the weights it changed was that of {name} at step {step}: {size}."
        )
    sentences.append(
        "Gradient norms do not tell why; initial weights and learning rate are what acted until then."
    )
    return tuple(words for words in (*sentences, _losses(course, event), _ending(course, event)) if words)


def jump(jump: Jump) -> str:
    """Of weights that changed without an update."""
    when = f"at step {jump.step}"
    if not jump.is_exact:
        when = f"between steps {jump.after} and {jump.until}, judging by the gradients {when}"
    return (
        f"The weights of {jump.parameter} changed {when}. Their norm went from {readable(jump.before_norm)} to "
        f"{readable(jump.after_norm)} ({readable(jump.ratio)} times), and no update explains it: "
        "something else wrote to them."
    )


def overwrite(overwrite: Overwrite) -> str:
    """Of updates as large as the weights."""
    sentence = (
        f"The update at step {overwrite.step} was {readable(overwrite.ratio)} times as large as the weights that it "
        f"changed (usual before: {readable(overwrite.before, 2)})"
    )
    if overwrite.parameters:
        name, ratio = overwrite.parameters[0]
        sentence += f", most of all in {name}: {readable(ratio)} times"
    return sentence + "."


def drift(drift: Drift) -> tuple[str, ...]:
    """Of a slow rise."""
    return (
        f"The level of the gradient norm (its median over {drift.stretch} steps) rose from {readable(drift.before)} to "
        f"{readable(drift.after)}, {readable(drift.after / drift.before)} times, without a jump.",
        f"The level of {drift.parameter} rose most: {readable(drift.growths[0][1])} times.",
    )


def _order(course: Course, reached: list[Reached], step: int) -> str:
    if not reached:
        return ""
    at_once = sum(r.step <= step for r in reached)
    together = f"{at_once} of {len(course.reader.names)} parameters were reached at step {step}"
    return f"{together}, and {len(reached)} within the event." if len(reached) > at_once else f"{together}."


def rates(course: Course, row: int) -> str:
    """The largest rise of the learning rate shortly before a row, if there was one."""
    first = max(1, row - _BACK)
    before, after = course.rates[first - 1 : row], course.rates[first : row + 1]
    growth = (after / before).nan_to_num(nan=0.0, posinf=0.0)
    if not len(growth) or float(growth.max()) < 1.5:
        return ""
    row = first + int(growth.argmax())
    return (
        f"The learning rate rose from {readable(float(course.rates[row - 1]))} to {readable(float(course.rates[row]))} "
        f"at step {course.step(row)}."
    )


def _losses(course: Course, event: Event) -> str:
    part = course.losses[event.start : event.stop]
    finite = part[part.isfinite()]
    before = float(course.losses[max(0, event.start - 1)])
    if not len(finite) or not float(finite.max()) > before:
        return ""
    return f"The loss rose from {readable(before)} to {readable(float(finite.max()))}."


def _skipped(course: Course, event: Event) -> str:
    first, last = course.step(event.start), course.step(event.stop - 1)
    reasons = [reason for step, reason in course.skips.items() if first <= step <= last]
    if not reasons:
        return ""
    return f"{len(reasons)} step{'s were' if len(reasons) > 1 else ' was'} skipped; the first: {reasons[0]}."


def _ending(course: Course, event: Event) -> str:
    last = course.step(event.stop - 1)
    if event.ended == "recovered":
        return f"After step {last} the norm was back."
    state = "not finite" if event.ended == "non-finite" else "still high"
    return f"It was {state} at step {last}, the last one recorded."
