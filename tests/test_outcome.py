"""What a decision is said to do to norms, against the gradients themselves, scaled and clamped in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradkeel.norms import Decision, GradientNorms
from gradkeel.outcome import Outcome

# Both sides are float64 sums of at most a few dozen numbers, and roots of them.
CLOSE = {"rel": 1e-12}


class Case:
    """Gradients of parameters with these numbers of units, and a decision on them."""

    def __init__(self, counts, seed, *, norm_type=2.0, one=None, each=False, unit=False, clamp=None):
        generator = torch.Generator().manual_seed(seed)
        draw = {"generator": generator, "dtype": torch.float64}
        self.counts, self.norm_type, self.clamp = counts, norm_type, clamp
        self.gradients = [torch.randn(count, 3, **draw) for count in counts]
        self.whole = one
        self.of_parameters = (0.5 + torch.rand(len(counts), **draw)).tolist() if each else None
        self.of_units = (0.25 + torch.rand(sum(counts), **draw)).tolist() if unit else None

    @property
    def outcome(self):
        norm = self.norm
        peaks = [[float(g.min()), float(g.max())] if len(g) else [0.0, 0.0] for g in self.gradients]
        measured = GradientNorms(
            names=tuple(f"w{i}" for i in range(len(self.counts))),
            norms=real([norm(gradient) for gradient in self.gradients]),
            total=real(norm(torch.cat(self.gradients))),
            norm_type=self.norm_type,
            groups=(0,) * len(self.counts),
            step=1,
            units=real([norm(row) for gradient in self.gradients for row in gradient]),
            unit_counts=tuple(self.counts),
            peaks=real(peaks),
        )
        coefficients = self.whole if self.of_parameters is None else self.of_parameters
        return Outcome(
            measured,
            Decision(
                coefficients=None if coefficients is None else real(coefficients),
                unit_coefficients=None if self.of_units is None else real(self.of_units),
                clamp=self.clamp,
            ),
        )

    def norm(self, values):
        return float(torch.linalg.vector_norm(values, self.norm_type)) if values.numel() else 0.0

    @property
    def factors(self):
        """What each unit of each parameter is multiplied by, by hand."""
        rows, factors = iter(self.of_units or [1.0] * sum(self.counts)), []
        for i, count in enumerate(self.counts):
            own = self.of_parameters[i] if self.of_parameters else (1.0 if self.whole is None else self.whole)
            factors.append([own * next(rows) for _ in range(count)])
        return factors

    @property
    def scaled(self):
        """The gradients after scaling, by hand."""
        return [g * real(f).unsqueeze(1) for g, f in zip(self.gradients, self.factors, strict=True)]


def real(values):
    return torch.tensor(values, dtype=torch.float64)


COUNTS = st.lists(st.integers(0, 4), min_size=1, max_size=5).filter(any)
NORM_TYPES = st.sampled_from([1.0, 2.0, 3.0, math.inf])
DECISIONS = st.fixed_dictionaries(
    {},
    optional={
        "one": st.floats(0.1, 1.9),
        "each": st.booleans(),
        "unit": st.booleans(),
    },
)


@given(COUNTS, st.integers(0, 10**6), NORM_TYPES, DECISIONS)
def test_norms_after_scaling_are_those_of_the_scaled_gradients(counts, seed, norm_type, decision):
    case = Case(counts, seed, norm_type=norm_type, **decision)
    total = case.norm(torch.cat(case.scaled))
    assert case.outcome.total().item() == pytest.approx(total, **CLOSE)
    units = [case.norm(row) for gradient in case.scaled for row in gradient]
    assert case.outcome.norms.after(case.outcome.decision).units.tolist() == pytest.approx(units, **CLOSE)


@given(COUNTS, st.integers(0, 10**6), DECISIONS)
def test_a_parameters_coefficient_is_the_smallest_of_its_units(counts, seed, decision):
    case = Case(counts, seed, **decision)
    own = case.of_parameters or [1.0 if case.whole is None else case.whole] * len(counts)
    # A parameter without units has its own coefficient.
    expected = [min(row, default=alone) for row, alone in zip(case.factors, own, strict=True)]
    assert case.outcome.coefficients().tolist() == pytest.approx(expected, **CLOSE)


@given(COUNTS, st.integers(0, 10**6), DECISIONS)
def test_gradients_are_clipped_where_any_is_made_smaller(counts, seed, decision):
    case = Case(counts, seed, **decision)
    parts = [*(case.of_parameters or ([] if case.whole is None else [case.whole])), *(case.of_units or [])]
    assert bool(case.outcome.is_clipped()) == any(part < 1 for part in parts)


@given(
    COUNTS,
    st.integers(0, 10**6),
    DECISIONS,
    st.floats(-2, 0).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 3))),
)
def test_a_clamp_comes_last(counts, seed, decision, clamp):
    case = Case(counts, seed, clamp=clamp, **{**decision, "unit": False})
    own = case.of_parameters or [1.0 if case.whole is None else case.whole] * len(counts)
    entries = torch.cat([g * factor for g, factor in zip(case.gradients, own, strict=True)])
    # A parameter without entries is measured with peaks of 0.
    empty = 0 in counts and not clamp[0] <= 0 <= clamp[1]
    outside = bool(((entries < clamp[0]) | (entries > clamp[1])).any())
    smaller = any(factor < 1 for factor in own)
    assert bool(case.outcome.is_clipped()) == (outside or smaller or empty)
    assert case.outcome.total() is None  # what is left of single entries is not known from norms
    assert case.outcome.bound().item() == clamp[1]


@pytest.mark.parametrize(
    ("decision", "smallest"),
    [
        (Decision(), 1.0),
        (Decision(coefficients=real(0.5)), 0.5),
        (Decision(coefficients=real([0.75, 0.5, 2.0])), 0.5),
        (Decision(unit_coefficients=real([0.25, 1.0])), 0.25),
        (Decision(coefficients=real([0.5, 1.0]), unit_coefficients=real([0.75, 0.5])), 0.25),
        (Decision(coefficients=real([]), unit_coefficients=real([0.5])), 0.5),
        (Decision(coefficients=real(1.0), unit_coefficients=real([])), 1.0),
    ],
)
def test_the_smallest_coefficient_of_all(decision, smallest):
    assert Outcome(Case([1], 0).outcome.norms, decision).coefficient() == smallest


@pytest.mark.parametrize(
    ("decision", "bound"),
    [
        (Decision(), None),
        (Decision(bound=real(3.0)), 3.0),
        (Decision(bound=real([3.0, 2.0, 4.0])), 2.0),
        (Decision(bound=real([math.inf, math.inf])), math.inf),
        (Decision(bound=real([])), None),
        (Decision(clamp=(-2.0, 0.5)), 0.5),
        (Decision(bound=real([]), clamp=(-2.0, 0.5)), 0.5),
        (Decision(bound=real(3.0), clamp=(-2.0, 0.5)), 3.0),
    ],
)
def test_the_smallest_bound_of_all(decision, bound):
    found = Outcome(Case([1], 0).outcome.norms, decision).bound()
    assert (None if found is None else found.item()) == bound


@pytest.mark.parametrize(("peaks", "is_clipped"), [
    ((-1.0, 2.0), False), ((-1.01, 2.0), True), ((-1.0, 2.01), True), ((0.0, 0.0), False), (None, False),
])  # fmt: skip
def test_an_entry_at_the_limit_is_not_clipped(peaks, is_clipped):
    norms = Case([1], 0).outcome.norms
    norms.peaks = None if peaks is None else real([peaks])
    assert bool(Outcome(norms, Decision(clamp=(-1.0, 2.0))).is_clipped()) == is_clipped


@pytest.mark.parametrize(("factor", "is_clipped"), [(1.0, False), (1.5, False), (1.75, True), (0.5, True)])
def test_entries_are_clamped_after_they_were_scaled(factor, is_clipped):
    norms = Case([1], 0).outcome.norms
    norms.peaks = real([(-0.625, 1.0)])
    decision = Decision(coefficients=real(factor), clamp=(-1.0, 2.0))
    assert bool(Outcome(norms, decision).is_clipped()) == is_clipped


@pytest.mark.parametrize("factor", [1.0, 1.0 - 2.0**-53, 1.5])
@pytest.mark.parametrize("kind", ["coefficients", "unit_coefficients"])
def test_a_coefficient_of_one_clips_nothing(factor, kind):
    decision = Decision(**{kind: real([1.0, factor])})
    assert bool(Outcome(Case([1, 1], 0).outcome.norms, decision).is_clipped()) == (factor < 1)


def test_units_that_were_not_measured_have_no_norms():
    norms = Case([2, 1], 0).outcome.norms
    norms.units = None
    assert norms.after(Decision()).units is None
    assert Outcome(norms, Decision()).total() is norms.total
