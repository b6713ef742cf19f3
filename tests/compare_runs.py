"""Runs as they come out of a comparison, written down instead of trained."""

from gradkeel.compare import Comparison, Onset, Plan, Run
from gradkeel.compare.run import divergence


def run(policy, lr=0.1, seed=0, losses=(4.0, 2.0, 1.0), **other):
    """A run with these losses; whether it diverged follows from them."""
    diverged, diverged_at = divergence(losses, other.pop("bad_step", None))
    values = {
        "policy": policy,
        "lr": lr,
        "seed": seed,
        "losses": list(losses),
        "norms": [1.0] * len(losses),
        "initial_validation_loss": losses[0] if losses else None,
        "validation_loss": losses[-1] if losses else None,
        "diverged": diverged,
        "diverged_at": diverged_at,
        "onset": None,
        "clip_rate": 0.0 if policy == "none" else 0.5,
        "skipped": 0,
        "seconds_per_step": 0.001,
        "optimizer": "SGD",
    }
    return Run(**values | other)


def comparison(runs, **other):
    """All of a plan's runs."""
    rates = tuple(dict.fromkeys(run.lr for run in runs if run.lr is not None))
    values = {
        "target": "char-lstm",
        "policies": tuple(dict.fromkeys(run.policy for run in runs)),
        "learning_rates": rates,
        "seeds": tuple(dict.fromkeys(run.seed for run in runs)),
        "steps": 3,
        "arguments": ("char-lstm",),
    }
    interrupted = other.pop("interrupted", False)
    return Comparison(Plan(**values | other), tuple(runs), interrupted)


BLOWN_UP = Onset(2, "layer.weight", 7.5)
EXPLODING = (4.0, 9.0, 1e30, float("inf"))
