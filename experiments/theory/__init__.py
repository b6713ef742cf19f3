"""Experiments on what clipping does and why, each with a criterion that was fixed beforehand."""

from experiments.theory import deterministic, dynamics, estimator, language_model, noise
from experiments.theory import experiment as _experiment
from experiments.theory.experiment import Experiment, Outcome, Result

# Importing a module of experiments registers them; here they get their order.
EXPERIMENTS: dict[str, Experiment] = dict(
    sorted(_experiment.EXPERIMENTS.items(), key=lambda item: int(item[0].removeprefix("R")))
)
"""All experiments by number."""

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "Outcome",
    "Result",
    "deterministic",
    "dynamics",
    "estimator",
    "language_model",
    "noise",
]
