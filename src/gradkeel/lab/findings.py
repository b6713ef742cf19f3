"""The four lines under the table: FOUND, WHY, CAUTION, NEXT, from the runs and nothing else."""

import math
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from gradkeel.lab.plan import Comparison
from gradkeel.lab.run import Run
from gradkeel.lab.summary import Row, summarize
from gradkeel.lab.words import bound_of, capital, count, is_unclipped, named, number, without_exclude

MOSTLY = 0.9  # a bound that clips more of the steps than this sets their length


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


@dataclass(frozen=True)
class _Contest:
    """The best clipped policy against the unclipped one, or against the runner-up where there is none."""

    comparison: Comparison
    rows: Sequence[Row]
    winner: Row
    rival: Row | None

    @property
    def runs(self) -> Sequence[Run]:
        return self.comparison.runs

    def of(self, policy: str, lr: float | None) -> dict[int, Run]:
        """The policy's runs at this learning rate, by seed."""
        return {run.seed: run for run in self.runs if run.policy == policy and run.lr == lr}

    def wins(self) -> tuple[int, int, int]:
        """In how many seeds the winner's score is lower than the rival's, in how many higher, and of how many."""
        assert self.rival is not None
        ours = self.of(self.winner.policy, self.winner.lr)
        theirs = self.of(self.rival.policy, self.rival.lr)
        pairs = [(ours[seed].score, theirs[seed].score) for seed in ours.keys() & theirs.keys()]
        return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs), len(pairs)


def findings(comparison: Comparison) -> Findings:
    """The four lines.

    Raises:
        ValueError: no run has finished.
    """
    if not comparison.runs:
        raise ValueError("no run has finished, so there is nothing to say")
    rows = summarize(comparison.runs, comparison.plan.target_loss)
    clipped = [row for row in rows if not is_unclipped(row.policy)]
    unclipped = [row for row in rows if is_unclipped(row.policy)]
    winner = (clipped or rows)[0]
    rival = next((row for row in [*unclipped, *clipped[1:]] if row is not winner), None)
    contest = _Contest(comparison, rows, winner, rival)
    return Findings(_found(contest), _why(contest), _caution(contest), shlex.join(_next(contest)))


def _found(contest: _Contest) -> str:
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


def _rescue(contest: _Contest) -> str:
    """Where the rival diverged and the winner did not, at the learning rate at which most seeds show it."""
    winner, rival = contest.winner, contest.rival
    assert rival is not None
    best = (0, "")
    for lr in dict.fromkeys(run.lr for run in contest.runs):
        ours, theirs = contest.of(winner.policy, lr), contest.of(rival.policy, lr)
        seeds = ours.keys() & theirs.keys()
        failed = sum(theirs[seed].diverged for seed in seeds)
        if failed > best[0] and not any(ours[seed].diverged for seed in seeds):
            at = "" if lr is None else f"at lr {number(lr)} "
            best = (
                failed,
                f"{at}{named(rival.policy)} diverged in {failed} of {count(len(seeds), 'seed')}, "
                f"{named(winner.policy)} in 0.",
            )
    return capital(best[1])


def _at_best(row: Row, contest: _Contest) -> str:
    several = len({run.lr for run in contest.runs}) > 1
    best = f" at its best lr ({number(row.lr)})" if several and row.lr is not None else ""
    return f"{named(row.policy)}{best}"


def _why(contest: _Contest) -> str:
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
    return where + _blow_up(run) + _contrast(run, twin(run))


def _contrast(run: Run, twin: Run | None) -> str:
    """What the same update came to under the winner."""
    if run.onset is None or twin is None or twin.diverged:
        return ""
    if twin.onset is None:
        return f" Under {named(twin.policy)} no update was that large."
    times, step = f"{twin.onset.ratio:.3g}", twin.onset.step
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
        f"{number(run.onset.ratio)} times as large as"
        if math.isfinite(run.onset.ratio)
        else "not finite, unlike"
    )
    norm = run.norms[run.onset.step - 1] if run.onset.step <= len(run.norms) else math.nan
    gradient = f" (gradient norm {number(norm)})" if math.isfinite(norm) else ""
    return f"at step {run.onset.step} the update of {run.onset.parameter} was {times} its weights{gradient}; {end}"


def _caution(contest: _Contest) -> str:
    cautions = [_excluded(contest), _lengths(contest), _few(contest), _edge_words(contest)]
    words = [caution for caution in cautions if caution]
    seeds = len({run.seed for run in contest.runs})
    general = f"This is one task and {count(seeds, 'seed')}"
    return " ".join(words[:2]) or f"{general}; differences smaller than the ranges in the table mean little."


def _excluded(contest: _Contest) -> str:
    """Whether leaving parameters out undid the clipping."""
    rows = {row.policy: row for row in contest.rows}
    for row in contest.rows:
        whole = rows.get(without_exclude(row.policy))
        if whole is not None and whole is not row and row.diverged > whole.diverged:
            return (
                f"Look at what is excluded: {row.policy} diverged in {row.diverged} of {count(row.runs, 'run')}, "
                f"{whole.policy} in {whole.diverged}."
            )
    return ""


def _lengths(contest: _Contest) -> str:
    row = contest.winner
    if is_unclipped(row.policy):
        return ""
    if row.clip_rate == 0:
        return f"{row.policy} never clipped at its best learning rate, so its result there is that of no clipping."
    if row.clip_rate <= MOSTLY:
        return ""
    share = f"{row.policy} clipped in {row.clip_rate:.0%} of the steps"
    optimizer = next((run.optimizer for run in contest.runs if run.policy == row.policy), "")
    if optimizer and optimizer != "SGD":
        return f"{share}; {optimizer} rescales gradients itself, so this evens steps out more than it shortens them."
    bound = bound_of(row.policy)
    product = "" if bound is None or row.lr is None else f" (here {number(row.lr * bound)})"
    kind = (
        "which is nearly normalized SGD"
        if row.policy.startswith("global-norm")
        else "so the bound sets their length"
    )
    return f"{share}, {kind}: lr x bound{product} is what you tune."


def _few(contest: _Contest) -> str:
    seeds = len({run.seed for run in contest.runs})
    if contest.comparison.interrupted:
        done, planned = len(contest.runs), len(contest.comparison.plan.trials)
        return f"Interrupted: {done} of {planned} runs finished, and the table may change."
    return f"Only {count(seeds, 'seed')}: how much of this is chance is not known." if seeds < 3 else ""


def _edge(contest: _Contest) -> float | None:
    """The factor that leads out of the list of learning rates, where the winner's best one is its last."""
    rates = contest.comparison.plan.learning_rates
    if len(rates) < 2 or contest.winner.lr is None or math.isinf(contest.winner.loss):
        return None
    return 2.0 if contest.winner.lr == max(rates) else 0.5 if contest.winner.lr == min(rates) else None


def _edge_words(contest: _Contest) -> str:
    side = {2.0: "highest", 0.5: "lowest", None: ""}[_edge(contest)]
    winner = contest.winner
    return (
        side and f"The best lr of {winner.policy} is the {side} that was tried; its optimum may lie beyond."
    )


def _next(contest: _Contest) -> list[str]:
    plan, winner, rival = contest.comparison.plan, contest.winner, contest.rival
    command = ["gradkeel", "compare", *plan.arguments]
    pair = [winner.policy] if rival is None else [rival.policy, winner.policy]
    policies = [word for policy in pair for word in ("--policy", policy)]
    rates = plan.learning_rates

    def at(*values: float | None) -> list[str]:
        if plan.is_command:
            return []
        return [word for lr in dict.fromkeys(values) if lr is not None for word in ("--lr", f"{lr:g}")]

    if contest.comparison.interrupted:
        again = [word for policy in plan.policies for word in ("--policy", policy)]
        return [*command, *again, *at(*rates), "--seeds", str(len(plan.seeds))]
    if rival is None and is_unclipped(winner.policy):
        norms = [norm for run in contest.runs for norm in run.norms if math.isfinite(norm)]
        bound = statistics.median(norms) if norms else 1.0
        return [
            *command,
            "--policy",
            winner.policy,
            "--policy",
            f"global-norm:{bound or 1.0:.3g}",
            *at(*rates),
        ]
    if math.isinf(winner.loss) and rates:
        return [*command, *policies, *at(min(rates) / 10, min(rates) / 100)]
    if (factor := _edge(contest)) is not None and winner.lr is not None:
        return [*command, *policies, *at(winner.lr, winner.lr * factor, winner.lr * factor**2)]
    limit = bound_of(winner.policy)
    agreed = rival is None or contest.wins()[2] in contest.wins()[:2]
    if not agreed or limit is None or plan.sweep is not None:
        best = at(winner.lr, None if rival is None else rival.lr)
        return [*command, *policies, *best, "--seeds", str(2 * len(plan.seeds))]
    name, _, rest = winner.policy.partition(":")
    options = "".join(f",{word}" for word in rest.split(",")[1:])
    return [*command, "--sweep", f"{name}:{limit / 10:.3g}..{limit * 10:.3g}{options}", *at(winner.lr)]
