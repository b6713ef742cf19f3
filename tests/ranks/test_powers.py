"""Norms of pieces, told as numbers that add up, against the norm of all pieces in float64, over its whole range."""

import math

import pytest
import torch

from gradkeel.ranks.powers import PowerSums

WIDE = [5e-324, 1e-310, 2.2e-308, 1e-200, 1e-160, 1e-100, 1.0, 1e100, 1e150, 1e160, 1e300, 1.7e308]
SINGLE = [2.0**-149, 1e-38, 1e-20, 1.0, 1e20, 3.4e38]
KINDS = [(True, WIDE), (False, SINGLE)]
ORDERS = [0.5, 1.0, 2.0, 3.0, 8.0]


def whole(pieces, p):
    """The p-norm of these norms, relative to the largest."""
    largest = max(pieces)
    return largest and largest * math.fsum((piece / largest) ** p for piece in pieces) ** (1 / p)


def told(pieces, p, is_wide):
    """What ranks come to that tell their pieces and add up what was told."""
    sums = PowerSums(p, is_wide=is_wide)
    rows = [sums.of(torch.tensor([piece], dtype=torch.float64)) for piece in pieces]
    assert {row.shape for row in rows} == {(1, sums.width)}
    return sums.norms(torch.stack(rows).sum(0)).item()


def close():
    # A rounding of a power between 2^-900 and 2^900 is a rounding of its root; pow() takes a few more of 1e-16. The
    # smallest norms of all have few digits.
    return {"rel": 1e-12, "abs": 5e-324}


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize(("is_wide", "norms"), KINDS)
def test_a_norm_of_any_size_comes_back(p, is_wide, norms):
    for norm in norms:
        assert told([norm], p, is_wide) == pytest.approx(norm, **close())


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize(("is_wide", "norms"), KINDS)
def test_pieces_of_any_two_sizes_add_up(p, is_wide, norms):
    for one in norms:
        for other in norms:
            expected = whole([one, other, other], p)
            if math.isfinite(expected) and expected < norms[-1]:
                assert told([one, other, other], p, is_wide) == pytest.approx(expected, **close())


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("is_wide", [True, False])
def test_zeros_and_what_is_not_finite(p, is_wide):
    assert told([0.0, 0.0], p, is_wide) == 0
    assert told([0.0, 3.0], p, is_wide) == pytest.approx(3.0, rel=1e-14)
    assert told([math.inf, 3.0, 0.0], p, is_wide) == math.inf
    assert math.isnan(told([math.nan, 3.0, 0.0], p, is_wide))


@pytest.mark.parametrize(("p", "is_wide", "width"), [
    (0.0, True, 1), (1.0, True, 1), (2.0, False, 1), (2.0, True, 3), (3.0, True, 4), (3.0, False, 1), (8.0, False, 2),
])  # fmt: skip
def test_how_many_numbers_stand_for_a_norm(p, is_wide, width):
    # Powers within 2^-900 to 2^900: 2099 binary orders of magnitude of float64, or 300 of float32, times p over 1800.
    assert PowerSums(p, is_wide=is_wide).width == width


def test_the_zero_norm_counts():
    assert told([3.0, 0.0, 4.0], 0.0, True) == 7
