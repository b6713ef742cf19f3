"""The norms of one selection's gradients, as the guard's stages make them."""

import torch

from gradkeel.measure import blank_norms, readings, true_norms


@torch.no_grad()
def measure(selection, needs, *, device, prescale=1.0, step=1, loss=None):
    """The norms of a selection's true gradients, and which of its parameters have one."""
    found = readings(selection, needs, device)
    blank = blank_norms(selection, needs, device)
    return true_norms(blank, found, prescale, step=step, loss=loss), found.present
