"""How fast the gradient changes along training steps, and which bound on its norm follows."""

from gradkeel.explain.smoothness.fit import SmoothnessFit, fit_smoothness, theorem_3
from gradkeel.explain.smoothness.probe import LocalSmoothness, SmoothnessProbe, local_smoothness

__all__ = [
    "LocalSmoothness",
    "SmoothnessFit",
    "SmoothnessProbe",
    "fit_smoothness",
    "local_smoothness",
    "theorem_3",
]
