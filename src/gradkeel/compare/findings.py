"""The four lines under the table: FOUND, WHY, CAUTION, NEXT, from the runs and nothing else; and all of it as JSON."""

import math
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from gradkeel.compare.advice import caution, next_command
from gradkeel.compare.contest import Contest, contest_of
from gradkeel.compare.plan import Comparison
from gradkeel.compare.run import Run
from gradkeel.compare.summary import Row, summarize
from gradkeel.compare.sweep import sweep_points
from gradkeel.compare.words import capital, named, number
from gradkeel.language import count, heard, join, readable, say
from gradkeel.page.page import Line
from gradkeel.record.notes import plain


@dataclass(frozen=True)
class Findings:
    """What the runs show."""

    found: str  # what clipping changed, and in how many of the seeds
    why: str  # the first parameter and step of the blow-up in one failing run
    caution: str  # what the result does not say
    next: str  # a command to run

    def lines(self) -> list[Line]:
        """All four, labelled."""
        return [
            Line(say("FOUND"), self.found),
            Line(say("WHY"), self.why),
            Line(say("CAUTION"), self.caution),
            Line(say("NEXT"), self.next, command=True),
        ]


def findings(comparison: Comparison) -> Findings:
    """The four lines."""
    contest = contest_of(comparison)
    return Findings(_found(contest), _why(contest), caution(contest), shlex.join(next_command(contest)))


def _found(contest: Contest) -> str:
    winner, rival = contest.winner, contest.rival
    if rival is None:
        return say(
            "Only {policy} was run: it diverged in {n} of {runs}.",
            policy=winner.policy,
            n=winner.diverged,
            runs=count(winner.runs, "{n} run", "{n} runs"),
        )
    if math.isinf(winner.loss) and math.isinf(rival.loss):
        return say("No difference found: every policy diverged in most seeds, at every learning rate tried.")
    lower, higher, seeds = contest.wins()
    of_seeds = count(seeds, "{n} seed", "{n} seeds")
    rescue = _rescue(contest)
    if math.isnan(winner.loss) or math.isnan(rival.loss):
        missing = say(
            "No loss is known: guard.log(loss=...) in the script, before optimizer.step(), gives one."
        )
        return join([rescue, missing])
    if max(lower, higher) < seeds or not seeds:
        result = say(
            "No difference found between {one} and {other}: the first ended lower in {lower} of {seeds}, higher in "
            "{higher}.",
            one=_at_best(winner, contest),
            other=_at_best(rival, contest),
            lower=lower,
            seeds=of_seeds,
            higher=higher,
        )
    else:
        better, worse = (winner, rival) if lower else (rival, winner)
        against = say(
            ", against {loss} for {policy}", loss=number(worse.loss), policy=_at_best(worse, contest)
        )
        result = say(
            "{policy} ended with the lower loss in {n} of {seeds}: median {loss}{against}.",
            policy=capital(_at_best(better, contest)),
            n=seeds,
            seeds=of_seeds,
            loss=number(better.loss),
            against="" if math.isinf(worse.loss) else against,
        )
    return join([rescue, result])


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
            told = say(
                "{at}{rival} diverged in {n} of {seeds}, {winner} in 0.",
                at="" if lr is None else say("at lr {lr} ", lr=number(lr)),
                rival=named(rival.policy),
                n=failed,
                seeds=count(len(seeds), "{n} seed", "{n} seeds"),
                winner=named(winner.policy),
            )
            best = (failed, told)
    return capital(best[1])


def _at_best(row: Row, contest: Contest) -> str:
    several = len({run.lr for run in contest.runs}) > 1
    if not several or row.lr is None:
        return named(row.policy)
    return say("{policy} at its best lr ({lr})", policy=named(row.policy), lr=number(row.lr))


def _why(contest: Contest) -> str:
    failed = [run for run in contest.runs if run.diverged]
    if not failed:
        return say("No run diverged, so there is no blow-up to explain.")
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
    told = say(
        "{policy}, {lr}seed {seed}: {what}",
        policy=capital(named(run.policy)),
        lr="" if run.lr is None else say("lr {lr}, ", lr=number(run.lr)),
        seed=run.seed,
        what=_blow_up(run),
    )
    verdict = heard(run.verdict.replace("_", " "))
    judged = run.verdict and say("Explain's verdict: {verdict}.", verdict=verdict)
    return join([told, judged, _contrast(run, twin(run))])


def _contrast(run: Run, twin: Run | None) -> str:
    """What the same update came to under the winner."""
    if run.onset is None or twin is None or twin.diverged:
        return ""
    if twin.onset is None:
        return say("Under {policy} no update was that large.", policy=named(twin.policy))
    return say(
        "Under {policy} the first such update, at step {step}, was {times} times as large.",
        policy=named(twin.policy),
        step=twin.onset.step,
        times=readable(twin.onset.ratio),
    )


def _blow_up(run: Run) -> str:
    finite = math.isfinite(run.losses[-1]) if run.losses else True
    step = run.diverged_at
    if not finite:
        end = say("after step {step} the loss was no longer finite", step=step)
    elif not all(math.isfinite(norm) for norm in run.norms):
        end = say("after step {step} the gradient was no longer finite", step=step)
    else:
        end = say("after step {step} the loss stayed above where it began", step=step)
    if run.onset is None:
        return say("no update was larger than the weights it changed; {end}.", end=end)
    if math.isfinite(run.onset.ratio):
        size = say("{ratio} times as large as its weights", ratio=readable(run.onset.ratio))
    else:
        size = say("not finite, unlike its weights")
    norm = run.norms[run.onset.step - 1] if run.onset.step <= len(run.norms) else math.nan
    return say(
        "at step {step} the update of {parameter} was {size}{gradient}; {end}.",
        step=run.onset.step,
        parameter=run.onset.parameter,
        size=size,
        gradient=say(" (gradient norm {norm})", norm=number(norm)) if math.isfinite(norm) else "",
        end=end,
    )


def document(comparison: Comparison) -> dict[str, Any]:
    """A comparison as ``compare.json`` has it (docs/compare.md); non-finite numbers are None."""
    plan, runs = comparison.plan, comparison.runs
    result = {
        "task": plan.target,
        "steps": plan.steps,
        "accumulate": plan.accumulate,
        "planned_runs": len(plan.trials),
        "interrupted": comparison.interrupted,
        "runs": [_told(run) for run in runs],
        "summary": [asdict(row) for row in summarize(runs, plan.target_loss)],
        "findings": asdict(findings(comparison)) if runs else None,
    }
    if plan.sweep is not None:
        result["sweep"] = [asdict(point) for point in sweep_points(plan.sweep, runs)]
    return plain(result)


def _told(run: Run) -> dict[str, Any]:
    fields = asdict(run) | {"final_loss": run.final_loss}
    del fields["optimizer"]
    return fields
