"""The whole explanation of a run, and its JSON form."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gradkeel.errors import check_kind
from gradkeel.explain import words
from gradkeel.explain.course import Course
from gradkeel.explain.explosion import Explosion, find_explosions, worst
from gradkeel.explain.fading import Fading, find_fading
from gradkeel.explain.findings import NOTE, AutopsyResult, of_note
from gradkeel.explain.signals import diagnose
from gradkeel.explain.threshold import ThresholdAdvice, advise
from gradkeel.explain.verdict import Diagnosis, Verdict
from gradkeel.record import Reader, Rollback
from gradkeel.record.notes import plain

VERSION = 1
"""Of the JSON form; it grows, but keys keep their names and meaning."""
_MOST_ROLLBACKS = 8  # of which the superseded steps are explained, the last ones


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Steps that were recorded again later, and what had happened in them."""

    session: int  # number of the session that recorded them again
    step: int  # the first of them
    last_step: int  # the last of them
    steps: int  # how many they are
    events: tuple[Explosion, ...]  # the explosions that were in them


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a record says about its run.

    Attributes:
        path: of the record.
        steps: how many it holds, from ``first_step`` to ``last_step``.
        parameters: how many.
        policy: spec of the live policy.
        optimizer: name of its class, or "".
        clipped: share of the steps at which it clipped.
        skipped: how many steps were skipped.
        diagnosis: the verdict on the whole run; its fields are the explanation's own in JSON.
        explosion: the one to look at first; ``explosion.found`` is False where there is none.
        events: all of them, in order.
        fading: parameters that hardly learn.
        threshold: the norms' distribution and what bounds would have done; None for a record too short for it.
        rolled_back: what was recorded again later, of the last eight times.
        autopsies: what experiments on bad steps showed, see `gradkeel.Autopsy`, in order.
        damage: what of the record could not be read, in words, or None.
    """

    path: str
    steps: int
    first_step: int
    last_step: int
    parameters: int
    policy: str
    optimizer: str
    clipped: float
    skipped: int
    diagnosis: Diagnosis
    explosion: Explosion
    events: tuple[Explosion, ...]
    fading: Fading
    threshold: ThresholdAdvice | None
    rolled_back: tuple[RolledBack, ...] = ()
    autopsies: tuple[AutopsyResult, ...] = ()
    damage: str | None = None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the whole run."""
        return self.diagnosis.verdict

    def __str__(self) -> str:
        return words.as_text(self)

    def to_json(self) -> dict[str, Any]:
        """The documented JSON form (docs/explain.md); numbers that are not finite are null."""
        fields: dict[str, Any] = plain(dataclasses.asdict(self))
        return {"version": VERSION, **fields.pop("diagnosis"), **fields}


def explain(run: str | os.PathLike[str] | Reader, *, bounds: Sequence[float] = ()) -> Explanation:
    """Explain a recorded run: whether and where it exploded, what hardly learns, and what a bound would do.

    Args:
        run: path of a record, or an open `Reader`.
        bounds: more candidates for the threshold advice.

    Raises:
        RecordError: there is no such record, or it holds no steps yet.
    """
    rule = "run must be the path of a record, such as 'run.keel', or an open Reader"
    check_kind(run, str | os.PathLike | Reader, "explain(run=...)", rule)
    if not isinstance(run, Reader):
        with Reader(run) as reader:
            return explain(reader, bounds=bounds)
    policy = run.policy  # says so where nothing is recorded yet
    course = Course(run)
    events, autopsies = find_explosions(course), _autopsies(run)
    explosion, fading = worst(events), find_fading(course)
    return Explanation(
        path=str(run.path),
        steps=len(run),
        first_step=run.first_step,
        last_step=run.last_step,
        parameters=len(run.names),
        policy=policy,
        optimizer=run.session.optimizer,
        clipped=float(run.clipped().double().mean()),
        skipped=int((~run.stepped()).sum()),
        diagnosis=diagnose(course, events, fading, autopsies),
        explosion=explosion,
        events=tuple(events),
        fading=fading,
        threshold=advise(run, bounds=bounds, explosion=explosion),
        autopsies=autopsies,
        rolled_back=tuple(_rolled_back(run, rollback) for rollback in run.rollbacks[-_MOST_ROLLBACKS:]),
        damage=run.damage,  # the last: what reading has come upon
    )


def _autopsies(run: Reader) -> tuple[AutopsyResult, ...]:
    found = []
    for key, text in run.store.meta.items():
        if isinstance(key, str) and key.startswith(NOTE):  # a damaged file may have others
            with contextlib.suppress(ValueError, TypeError, KeyError):  # what a damaged record may hold
                found.append(of_note(json.loads(text)))
    return tuple(sorted(found, key=lambda result: result.step))


def _rolled_back(run: Reader, rollback: Rollback) -> RolledBack:
    with run.before(rollback) as before:
        events = [e for e in find_explosions(Course(before)) if (e.last_step or e.step or 0) >= rollback.step]
    return RolledBack(rollback.session, rollback.step, rollback.last_step, rollback.rows, tuple(events))
