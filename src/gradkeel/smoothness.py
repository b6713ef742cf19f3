"""How fast the gradient changes along training steps, and which bound on its norm follows."""

from gradkeel.explain.smoothness import LocalSmoothness, SmoothnessProbe, local_smoothness
from gradkeel.explain.smoothness_fit import SmoothnessFit, fit_smoothness, theorem_3

__all__ = [
    "LocalSmoothness",
    "SmoothnessFit",
    "SmoothnessProbe",
    "fit_smoothness",
    "local_smoothness",
    "theorem_3",
]
