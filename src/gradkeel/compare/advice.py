"""What a comparison does not say, and what to run after it."""

import math
import statistics
from collections.abc import Sequence

from gradkeel.compare.contest import Contest, starts_in_words
from gradkeel.compare.words import bound_of, is_unclipped, number, without_exclude
from gradkeel.language import count, join, say

MOSTLY = 0.9  # a bound that clips in more of the steps than this sets their length


def caution(contest: Contest) -> str:
    """At most two sentences on what the table does not show."""
    found = [
        starts_in_words(contest.comparison),
        _interrupted(contest),
        _excluded(contest),
        _lengths(contest),
        _few(contest),
        _edge_words(contest),
    ]
    if words := list(filter(None, found)):
        return join(words[:2])
    return say(
        "This is one task and {seeds}; differences smaller than the ranges in the table mean little.",
        seeds=_seeds(contest),
    )


def _seeds(contest: Contest) -> str:
    return count(len({run.seed for run in contest.runs}), "{n} seed", "{n} seeds")


def _excluded(contest: Contest) -> str:
    """Whether leaving parameters out undid the clipping."""
    rows = {row.policy: row for row in contest.rows}
    for row in contest.rows:
        whole = rows.get(without_exclude(row.policy))
        if whole is not None and whole is not row and row.diverged > whole.diverged:
            return say(
                "Look at what is excluded: {row.policy} diverged in {row.diverged} of {runs}, {whole.policy} in "
                "{whole.diverged}.",
                row=row,
                whole=whole,
                runs=count(row.runs, "{n} run", "{n} runs"),
            )
    return ""


def _lengths(contest: Contest) -> str:
    row = contest.winner
    if is_unclipped(row.policy):
        return ""
    if row.clip_rate == 0:
        if any(run.is_one_of_several for run in contest.runs if run.policy == row.policy):
            return say(
                "{policy} never clipped at its best learning rate in the guard that was attached last; whether the "
                "script's other guards clipped is not known.",
                policy=row.policy,
            )
        return say(
            "{policy} never clipped at its best learning rate, so its result there is that of no clipping.",
            policy=row.policy,
        )
    if row.clip_rate <= MOSTLY:
        return ""
    share = say("{policy} clipped in {share:.0%} of the steps", policy=row.policy, share=row.clip_rate)
    optimizer = next((run.optimizer for run in contest.runs if run.policy == row.policy), "")
    if optimizer and optimizer != "SGD":
        return say(
            "{clipped}; {optimizer} rescales gradients itself, so this evens steps out more than it shortens them.",
            clipped=share,
            optimizer=optimizer,
        )
    bound = bound_of(row.policy)
    product = "" if bound is None or row.lr is None else say(" (here {n})", n=number(row.lr * bound))
    normalized = row.policy.startswith("global-norm")
    kind = say("which is nearly normalized SGD" if normalized else "so the bound sets their length")
    return say(
        "{clipped}, {kind}: lr x bound{product} is what you tune.", clipped=share, kind=kind, product=product
    )


def _interrupted(contest: Contest) -> str:
    if not contest.comparison.interrupted:
        return ""
    return say(
        "Interrupted: {done} of {runs} finished, and the table may change.",
        done=len(contest.runs),
        runs=count(len(contest.comparison.plan.trials), "{n} run", "{n} runs"),
    )


def _few(contest: Contest) -> str:
    if len({run.seed for run in contest.runs}) >= 3:
        return ""
    return say("Only {seeds}: how much of this is chance is not known.", seeds=_seeds(contest))


def _edge(contest: Contest) -> float | None:
    """The factor that leads out of the list of learning rates, where the winner's best one is its last."""
    rates = contest.comparison.plan.learning_rates
    if len(rates) < 2 or contest.winner.lr is None or math.isinf(contest.winner.loss):
        return None
    return 2.0 if contest.winner.lr == max(rates) else 0.5 if contest.winner.lr == min(rates) else None


def _edge_words(contest: Contest) -> str:
    side = {2.0: say("highest"), 0.5: say("lowest"), None: ""}[_edge(contest)]
    return side and say(
        "The best lr of {policy} is the {side} that was tried; its optimum may lie beyond.",
        policy=contest.winner.policy,
        side=side,
    )


def next_command(contest: Contest) -> list[str]:
    """The words of a command whose result would say more."""
    plan, winner, rival = contest.comparison.plan, contest.winner, contest.rival
    command = ["gradkeel", "compare", *plan.arguments]
    pair = [winner.policy] if rival is None else [rival.policy, winner.policy]
    policies = _repeated("--policy", pair)
    rates = plan.learning_rates

    def at(*values: float | None) -> list[str]:
        if plan.is_command:
            return []
        return _repeated("--lr", [f"{lr:g}" for lr in dict.fromkeys(values) if lr is not None])

    if contest.comparison.interrupted:
        again = _repeated("--policy", plan.policies)
        return [*command, *again, *at(*rates), "--seeds", str(len(plan.seeds))]
    if rival is None and is_unclipped(winner.policy):
        norms = [norm for run in contest.runs for norm in run.norms if math.isfinite(norm)]
        bound = statistics.median(norms) if norms else 1.0
        both = _repeated("--policy", [winner.policy, f"global-norm:{bound or 1.0:.3g}"])
        return [*command, *both, *at(*rates)]
    if math.isinf(winner.loss) and rates:
        return [*command, *policies, *at(min(rates) / 10, min(rates) / 100)]
    if (factor := _edge(contest)) is not None and winner.lr is not None:
        return [*command, *policies, *at(*sorted(winner.lr * factor**i for i in range(3)))]
    limit = bound_of(winner.policy)
    agreed = rival is None or contest.wins()[2] in contest.wins()[:2]
    if not agreed or limit is None or plan.sweep is not None:
        best = at(winner.lr, None if rival is None else rival.lr)
        return [*command, *policies, *best, "--seeds", str(2 * len(plan.seeds))]
    name, _, rest = winner.policy.partition(":")
    options = "".join(f",{word}" for word in rest.split(",")[1:])
    return [*command, "--sweep", f"{name}:{limit / 10:.3g}..{limit * 10:.3g}{options}", *at(winner.lr)]


def _repeated(option: str, values: Sequence[str]) -> list[str]:
    return [word for value in values for word in (option, value)]
