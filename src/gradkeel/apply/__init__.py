"""Carries decisions out: scaling and clamping, folding into fused optimizers, skipping."""

from gradkeel.apply.decision import apply, clamp, factors, scale
from gradkeel.apply.device import separate

__all__ = ["apply", "clamp", "factors", "scale", "separate"]
