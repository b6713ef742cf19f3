"""What a comparison does not say, and what to run after it."""

import math
import statistics

from gradkeel.compare.contest import Contest
from gradkeel.compare.starts import in_words
from gradkeel.compare.words import bound_of, count, is_unclipped, number, without_exclude

MOSTLY = 0.9  # a bound that clips in more of the steps than this sets their length


def caution(contest: Contest) -> str:
    """At most two sentences on what the table does not show."""
    found = [
        in_words(contest.comparison),
        _interrupted(contest),
        _excluded(contest),
        _lengths(contest),
        _few(contest),
        _edge_words(contest),
    ]
    words = [words for words in found if words]
    seeds = len({run.seed for run in contest.runs})
    general = f"This is one task and {count(seeds, 'seed')}"
    return " ".join(words[:2]) or f"{general}; differences smaller than the ranges in the table mean little."


def _excluded(contest: Contest) -> str:
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


def _lengths(contest: Contest) -> str:
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


def _interrupted(contest: Contest) -> str:
    done, planned = len(contest.runs), len(contest.comparison.plan.trials)
    interrupted = contest.comparison.interrupted
    return f"Interrupted: {done} of {planned} runs finished, and the table may change." if interrupted else ""


def _few(contest: Contest) -> str:
    seeds = len({run.seed for run in contest.runs})
    return f"Only {count(seeds, 'seed')}: how much of this is chance is not known." if seeds < 3 else ""


def _edge(contest: Contest) -> float | None:
    """The factor that leads out of the list of learning rates, where the winner's best one is its last."""
    rates = contest.comparison.plan.learning_rates
    if len(rates) < 2 or contest.winner.lr is None or math.isinf(contest.winner.loss):
        return None
    return 2.0 if contest.winner.lr == max(rates) else 0.5 if contest.winner.lr == min(rates) else None


def _edge_words(contest: Contest) -> str:
    side = {2.0: "highest", 0.5: "lowest", None: ""}[_edge(contest)]
    winner = contest.winner
    return (
        side and f"The best lr of {winner.policy} is the {side} that was tried; its optimum may lie beyond."
    )


def next_command(contest: Contest) -> list[str]:
    """The words of a command whose result would say more."""
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
        return [*command, *policies, *at(*sorted(winner.lr * factor**i for i in range(3)))]
    limit = bound_of(winner.policy)
    agreed = rival is None or contest.wins()[2] in contest.wins()[:2]
    if not agreed or limit is None or plan.sweep is not None:
        best = at(winner.lr, None if rival is None else rival.lr)
        return [*command, *policies, *best, "--seeds", str(2 * len(plan.seeds))]
    name, _, rest = winner.policy.partition(":")
    options = "".join(f",{word}" for word in rest.split(",")[1:])
    return [*command, "--sweep", f"{name}:{limit / 10:.3g}..{limit * 10:.3g}{options}", *at(winner.lr)]
