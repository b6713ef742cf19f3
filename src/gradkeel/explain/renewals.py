"""Where what is asked of a network changed: the loss rose at once, by more than the update before could have made it.

Along a step ``dw`` a loss changes by about ``|g| |dw|`` at most. What it rises by more, and keeps, was not done to the
weights: an agent's target network was renewed, or its experience; or other data came. Where training then brings it
down again, it does what it is for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.explain.course import Course
from gradkeel.language import count

_BEFORE, _AFTER = 8, 5  # rows whose median is the loss before, and after
_PAST = 32  # rows, above the highest of which it stays: noise does not
_LATELY = 3  # measured updates, the largest of which stands for the one before
_GAVE_UP = 0.3  # of what was learned until then
_APART = 10  # rows: nearer ones are one
AGAIN = 3
"""So many are no accident; fewer count only where the very update before each was measured."""


def find_renewals(course: Course) -> list[int]:
    """Steps at which the loss rose by itself and stayed, and training brought it down again by half or more."""
    losses = course.losses
    known = losses[torch.isfinite(losses)]
    if len(known) < _BEFORE + 2 * _AFTER:
        return []
    before, after = _median_before(losses, _BEFORE), _after(losses)
    rise, half = losses - before, (losses + before) / 2
    least = torch.maximum(_can_change(course), _GAVE_UP * (known[0] - before))
    lowest = after.nan_to_num(nan=torch.inf).flip(0).cummin(dim=0).values.flip(0)  # from each row on
    highest = losses.nan_to_num(nan=-torch.inf)
    highest = (
        torch.cat([highest.new_full((_PAST,), -torch.inf), highest[:-1]]).unfold(0, _PAST, 1).amax(dim=1)
    )
    is_new = (
        (rise > least) & (losses.roll(1) <= half) & (after > torch.maximum(half, highest)) & (lowest < half)
    )
    is_new[:_BEFORE] = False
    found: list[int] = []
    for row in is_new.nonzero().flatten().tolist():
        near = found.pop() if found and row - found[-1] < _APART else row
        found.append(max(near, row, key=rise.__getitem__))
    if len(found) < AGAIN:
        measured = set(_sizes(course)[0].tolist())
        found = [row for row in found if course.step(row - 1) in measured]
    return [course.step(row) for row in found]


def _after(losses: Tensor) -> Tensor:
    return _median_before(losses.flip(0), _AFTER, own=True).flip(0)


def words(renewals: Sequence[int]) -> str:
    """Of these steps, what they mean."""
    return count(
        len(renewals),
        "At step {first} the loss rose at once, by more than the updates before can have done, and training brought "
        "it down again: what is asked of the network changed there, as where an agent's target network or experience "
        "is renewed, or the data.",
        "{n} times, from step {first} to step {last}, the loss rose at once, by more than the updates before can have "
        "done, and training brought it down again: what is asked of the network changed there, as where an agent's "
        "target network or experience is renewed, or the data.",
        first=renewals[0],
        last=renewals[-1],
    )


def _median_before(values: Tensor, many: int, *, own: bool = False) -> Tensor:
    """[k] median of so many values before each, NaN left out; with its ``own`` it is one of them."""
    padded = torch.cat([values.new_full((many,), torch.nan), values])[int(own) :]
    parts = padded.unfold(0, many, 1)[: len(values)].split(8192)
    return torch.cat([part.nanmedian(dim=1).values for part in parts])


def _sizes(course: Course) -> tuple[Tensor, Tensor]:
    """[s] the steps whose whole update was measured, and its norm."""
    steps, _, updates = course.samples
    sizes = torch.linalg.vector_norm(updates, dim=1)
    known = ~sizes.isnan()
    return steps[known], sizes[known]


def _can_change(course: Course) -> Tensor:
    """[k] by how much an update like the last that were measured can have changed the loss; NaN where none was."""
    steps, sizes = _sizes(course)
    sizes = torch.cat([sizes.new_full((_LATELY,), -torch.inf), sizes])
    largest = sizes.unfold(0, _LATELY, 1).amax(dim=1)
    largest = torch.where(largest < 0, torch.nan, largest)
    totals = course.totals
    gradients = (totals + torch.cat([totals[:1], totals[:-1]])) / 2
    return gradients * largest[torch.searchsorted(steps, course.steps)]
