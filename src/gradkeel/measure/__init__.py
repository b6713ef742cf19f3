"""Reads each gradient once and returns norms of the true gradients; nothing else reads gradients."""

from gradkeel.measure.powers import wide_dtype
from gradkeel.measure.readings import Readings, blank_norms, readings, true_norms

__all__ = ["Readings", "blank_norms", "readings", "true_norms", "wide_dtype"]
