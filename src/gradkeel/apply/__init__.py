"""Carries decisions out: scaling and clamping, folding into fused optimizers, skipping."""

from gradkeel.apply.scale import apply, factors

__all__ = ["apply", "factors"]
