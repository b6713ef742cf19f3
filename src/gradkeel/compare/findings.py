"""The four lines under the table: FOUND, WHY, CAUTION, NEXT, from the runs and nothing else."""

import math
import shlex
from dataclasses import dataclass, fields

from gradkeel.compare.advice import caution, next_command
from gradkeel.compare.contest import Contest, contest_of
from gradkeel.compare.plan import Comparison
from gradkeel.compare.run import Run
from gradkeel.compare.summary import Row
from gradkeel.compare.words import capital, count, named, number
from gradkeel.explain.readable import readable


@dataclass(frozen=True)
class Findings:
    """What the runs show.

    Attributes:
        found: what clipping changed, and in how many of the seeds.
        why: the first parameter and step of the blow-up in one failing run.
        caution: what the result does not say.
        next: a command to run.
    """

    found: str
    why: str
    caution: str
    next: str

    def lines(self) -> list[tuple[str, str]]:
        """Label and text of each line."""
        return [(field.name.upper(), getattr(self, field.name)) for field in fields(self)]


def findings(comparison: Comparison) -> Findings:
    """The four lines.

    Raises:
        ValueError: no run has finished.
    """
    contest = contest_of(comparison)
    return Findings(_found(contest), _why(contest), caution(contest), shlex.join(next_command(contest)))


def _found(contest: Contest) -> str:
    winner, rival = contest.winner, contest.rival
    if rival is None:
        return (
            f"Only {winner.policy} was run: it diverged in {winner.diverged} of {count(winner.runs, 'run')}."
        )
    if math.isinf(winner.loss) and math.isinf(rival.loss):
        return "No difference found: every policy diverged in most seeds, at every learning rate tried."
    lower, higher, seeds = contest.wins()
    rescue = _rescue(contest)
    if math.isnan(winner.loss) or math.isnan(rival.loss):
        missing = "No loss is known: guard.log(loss=...) in the script, before optimizer.step(), gives one."
        return f"{rescue} {missing}".strip()
    if max(lower, higher) < seeds or not seeds:
        result = (
            f"No difference found between {_at_best(winner, contest)} and {_at_best(rival, contest)}: the first "
            f"ended lower in {lower} of {count(seeds, 'seed')}, higher in {higher}."
        )
    else:
        better, worse = (winner, rival) if lower else (rival, winner)
        result = (
            f"{capital(_at_best(better, contest))} ended with the lower loss in {seeds} of {count(seeds, 'seed')}: "
            f"median {number(better.loss)}"
        )
        against = f", against {number(worse.loss)} for {_at_best(worse, contest)}."
        result += "." if math.isinf(worse.loss) else against
    return f"{rescue} {result}".strip()


def _rescue(contest: Contest) -> str:
    """Where the rival diverged and the winner did not, at the learning rate at which most seeds show it."""
    winner, rival = contest.winner, contest.rival
    assert rival is not None
    best = (0, "")
    for lr in dict.fromkeys(run.lr for run in contest.runs):
        ours, theirs = contest.of(winner.policy, lr), contest.of(rival.policy, lr)
        seeds = contest.seeds(ours, theirs)
        failed = sum(theirs[seed].diverged for seed in seeds)
        if failed > best[0] and not any(ours[seed].diverged for seed in seeds):
            at = "" if lr is None else f"at lr {number(lr)} "
            best = (
                failed,
                f"{at}{named(rival.policy)} diverged in {failed} of {count(len(seeds), 'seed')}, "
                f"{named(winner.policy)} in 0.",
            )
    return capital(best[1])


def _at_best(row: Row, contest: Contest) -> str:
    several = len({run.lr for run in contest.runs}) > 1
    best = f" at its best lr ({number(row.lr)})" if several and row.lr is not None else ""
    return f"{named(row.policy)}{best}"


def _why(contest: Contest) -> str:
    failed = [run for run in contest.runs if run.diverged]
    if not failed:
        return "No run diverged, so there is no blow-up to explain."
    rival, winner = contest.rival, contest.winner

    def twin(run: Run) -> Run | None:
        """The winner's run from the same weights, on the same batches, at the same learning rate."""
        return contest.of(winner.policy, run.lr).get(run.seed) if run.policy != winner.policy else None

    def known(run: Run) -> tuple[bool, bool, bool, bool, int]:
        """The best-known failure: the rival's, with an onset that its twin does not share, where the winner is best."""
        other = twin(run)
        shared = other is None or (other.onset is not None and run.onset is not None)
        return (
            rival is not None and run.policy != rival.policy,
            run.onset is None,
            shared,
            run.lr != winner.lr,
            run.seed,
        )

    run = min(failed, key=known)
    where = (
        f"{capital(named(run.policy))}, "
        + ("" if run.lr is None else f"lr {number(run.lr)}, ")
        + f"seed {run.seed}: "
    )
    verdict = f" Explain's verdict: {run.verdict.replace('_', ' ')}." if run.verdict else ""
    return where + _blow_up(run) + verdict + _contrast(run, twin(run))


def _contrast(run: Run, twin: Run | None) -> str:
    """What the same update came to under the winner."""
    if run.onset is None or twin is None or twin.diverged:
        return ""
    if twin.onset is None:
        return f" Under {named(twin.policy)} no update was that large."
    times, step = readable(twin.onset.ratio), twin.onset.step
    return f" Under {named(twin.policy)} the first such update, at step {step}, was {times} times as large."


def _blow_up(run: Run) -> str:
    finite = math.isfinite(run.losses[-1]) if run.losses else True
    end = "the loss was no longer finite" if not finite else "the loss stayed above where it began"
    if finite and not all(math.isfinite(norm) for norm in run.norms):
        end = "the gradient was no longer finite"
    end = f"after step {run.diverged_at} {end}."
    if run.onset is None:
        return f"no update was larger than the weights it changed; {end}"
    times = (
        f"{readable(run.onset.ratio)} times as large as"
        if math.isfinite(run.onset.ratio)
        else "not finite, unlike"
    )
    norm = run.norms[run.onset.step - 1] if run.onset.step <= len(run.norms) else math.nan
    gradient = f" (gradient norm {number(norm)})" if math.isfinite(norm) else ""
    return f"at step {run.onset.step} the update of {run.onset.parameter} was {times} its weights{gradient}; {end}"
