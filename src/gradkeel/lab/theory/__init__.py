"""Experiments on what clipping does and why, each with a criterion that was fixed beforehand."""

from gradkeel.lab.theory import deterministic, dynamics, estimator, language_model, noise
from gradkeel.lab.theory.experiment import EXPERIMENTS, Experiment, Outcome, Result

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
