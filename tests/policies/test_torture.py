"""What every bound that learns must survive: a spike, a lasting rise, a fall, and years of the same.

All of it on streams of norms, 40 independent ones at a time: each adaptive policy is taken per tensor.
"""

import dataclasses
import math

import pytest
import torch

from gradkeel import policies as gp
from gradkeel.policies.spec.parse import REGISTRY
from streams import bounds, log_normal, measured, play

SPREAD = 0.3  # of the logarithm: norms of ordinary training vary by about that much from step to step
CELLS = 40


def normal_tail(z):
    return 0.5 * math.erfc(z / math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class Torture:
    """One adaptive policy as `per_tensor`, and what its docstring promises.

    Attributes:
        rate: share of stationary log-normal norms that are above the bound.
        memory: steps after a tenfold fall until the bound has followed.
        caught: what may be left of a 50-fold spike, as a multiple of the median.
    """

    name: str
    per_tensor: gp.Policy
    rate: float
    memory: int
    caught: float


ROWS = [
    Torture("autoclip", gp.AutoClip(window=300, scope="tensor"), 0.1, 300, 2.0),
    Torture("quantile", gp.QuantileClip(scope="tensor"), 0.1, 115, 2.5),
    # The averages of 33 steps only estimate mean and spread: 0.8% instead of the 0.6% beyond 2.5 sigma.
    Torture("zclip", gp.ZClip(scope="tensor"), 0.0083, 150, 1.5),
    Torture("zclip", gp.ZClip(2.0, scope="tensor"), 0.0266, 150, 1.5),
    # The same for a window of 128: about twice the 0.13% beyond 3 sigma.
    Torture("robust", gp.RobustClip(scope="tensor"), 0.0025, 128, 4.0),
    Torture("adagc", gp.AdaGC(ratio=1.05).parts.after, normal_tail(math.log(1.05) / SPREAD), 100, 1.3),
    Torture("adagc", gp.AdaGC(ratio=2.0).parts.after, normal_tail(math.log(2.0) / SPREAD), 100, 2.5),
    # As a bound; that it skips instead of scaling is below. Norms are skewed, hence more than the normal 1e-9.
    Torture("skip-step", gp.Clip("tensor", gp.SkipStep().parts.stages[0].bound, gp.Hard()), 3e-4, 128, 4.0),
]
torture = pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.name}-{row.rate:.4f}")


def test_every_adaptive_policy_is_tortured():
    examples = {"value": (1.0,), "norm": (1.0,), "global-norm": (1.0,), "block-rms": (1.0,), "smooth": (1.0,)}
    examples["smoothness-step"] = (1.0, 1.0)
    stateful = {
        name for name, kind in REGISTRY.items() if kind(*examples.get(name, ())).init(measured([1.0]))
    }
    assert stateful == {row.name for row in ROWS}


@torture
def test_stationary_norms_are_clipped_at_the_promised_rate(row):
    steps, warm = 1000, 300
    stream = log_normal(steps, CELLS, spread=SPREAD)
    above = (stream > bounds(row.per_tensor, stream))[warm:]
    # Four standard deviations of a binomial share, and a tenth for how the bound moves while it is followed.
    noise = 4 * math.sqrt(max(row.rate, 1e-4) / above.numel())
    assert above.double().mean().item() == pytest.approx(row.rate, abs=0.1 * row.rate + noise)


@torture
def test_a_spike_is_caught_and_the_next_one_too(row):
    stream = log_normal(400, CELLS, spread=SPREAD, seed=1)
    stream[300] *= 50
    stream[340] *= 50
    limits = bounds(row.per_tensor, stream)
    first, second = (torch.minimum(stream[step], limits[step]) for step in (300, 340))
    assert first.median().item() < row.caught
    assert second.median().item() < 1.3 * row.caught
    # What came in between is treated as before.
    between = (torch.minimum(stream, limits) / stream)[301:340]
    usual = (torch.minimum(stream, limits) / stream)[200:300]
    assert between.mean().item() > usual.mean().item() - 0.05


@torture
def test_a_tenfold_rise_is_accepted_within_200_steps(row):
    stream = log_normal(900, CELLS, spread=SPREAD, seed=2)
    stream[400:] *= 10
    left = torch.minimum(stream, bounds(row.per_tensor, stream)) / stream
    usual = left[300:400].mean().item()
    assert left[400:405].mean().item() < usual  # it does see the rise
    assert left[600:].mean().item() == pytest.approx(usual, abs=0.03)


@torture
def test_a_tenfold_fall_is_followed(row):
    stream = log_normal(1001, CELLS, spread=SPREAD, seed=3)
    stream[400:] /= 10
    stream[1000] *= 50
    limits = bounds(row.per_tensor, stream)
    before, after = limits[300:400].median().item(), limits[400 + row.memory : 1000].median().item()
    assert after / before == pytest.approx(0.1, rel=0.15)
    assert torch.minimum(stream, limits)[1000].median().item() < row.caught / 10


@torture
def test_only_the_scale_of_norms_counts(row):
    """All that learns from norms alone knows no unit: a thousandfold gradient has a thousandfold bound."""
    stream = log_normal(200, 5, spread=SPREAD, seed=4)
    plain, scaled = bounds(row.per_tensor, stream), bounds(row.per_tensor, 1024 * stream)
    # Logarithms and exponentials of float64.
    torch.testing.assert_close(scaled, 1024 * plain, rtol=1e-12, atol=0)


@torture
def test_bad_norms_change_nothing(row):
    stream = log_normal(200, 5, spread=SPREAD, seed=5)
    _, state = play(row.per_tensor, stream)
    for bad in (0.0, math.nan, math.inf):
        _, after = play(row.per_tensor, torch.full((3, 5), bad, dtype=torch.float64), state=state, first=201)
        assert all(torch.equal(after[key], state[key]) for key in state)


def test_skip_step_skips_spikes_and_accepts_a_rise():
    stream = log_normal(600, 1, spread=SPREAD, seed=6)
    stream[300] *= 50
    stream[450:] *= 10
    skipped = torch.stack([decision.skip for decision in play(gp.SkipStep(), stream)[0]])
    assert skipped[300]
    assert not skipped[301:450].any()
    assert 1 <= skipped[450:].sum().item() <= 8


def test_published_skip_step_is_blind_after_one_spike_and_the_hardened_one_is_not():
    stream = log_normal(200, 1, spread=SPREAD, seed=6)
    stream[100] *= 1000
    stream[120] *= 100

    def skipped(policy):
        return [step for step, decision in enumerate(play(policy, stream)[0]) if decision.skip]

    assert skipped(gp.SkipStep(reference=True)) == [100]
    assert skipped(gp.SkipStep()) == [100, 120]


def test_skip_step_hardly_ever_skips_stationary_norms():
    bound = gp.Clip("tensor", gp.SkipStep().parts.stages[0].bound, gp.Hard())
    stream = log_normal(1000, 300, spread=0.25, seed=7)
    assert (stream > bounds(bound, stream)).double().mean().item() < 1e-4


class Stubborn(gp.AdaptiveBound):
    """Believes in the first norm it has seen, for ever: only patience can change its mind."""

    def start(self, cells):
        return {"first": torch.zeros_like(cells.norms)}

    def learn(self, cells, state, bound):
        return {"first": torch.where(state["seen"] == 0, cells.norms, state["first"])}

    def estimate(self, cells, state):
        return 2 * state["first"]


def test_patience_starts_any_bound_afresh():
    """The mechanism alone: 100 norms in a row above the bound, not 99, and the last bound until enough is seen."""
    policy = gp.Clip("tensor", Stubborn(warmup=3, patience=100), gp.Hard())
    calm, raised = torch.ones(10, 2).double(), torch.full((98, 2), 5.0).double()
    low = torch.tensor([[5.0, 1.0]]).double()
    end = torch.tensor([[5.0, 5.0]] * 6).double()
    limits = bounds(policy, torch.cat([calm, raised, low, end]))
    assert limits[:3].isinf().all()
    # The first stream runs out of patience at its 100th; the second was interrupted after 98.
    run_out = 10 + 98 + 1
    assert limits[3 : run_out + 1].eq(2).all()
    assert limits[run_out + 1 :, 0].tolist() == [2, 2, 10, 10, 10]
    assert limits[run_out + 1 :, 1].eq(2).all()
    stubborn = gp.Clip("tensor", Stubborn(patience=None), gp.Hard())
    assert bounds(stubborn, torch.cat([calm, raised, raised, raised]))[1:].eq(2).all()


@pytest.mark.parametrize(("name", "usual"), [("zclip", 0.99), ("adagc", 0.95)])
def test_the_published_form_locks_up_where_the_hardened_one_does_not(name, usual):
    stream = log_normal(1200, 3, spread=0.1, median=0.1, seed=8)
    stream[400:] *= 4

    def left(**options):
        decisions, _ = play(REGISTRY[name](**options), stream)
        return torch.stack([d.coefficients.mean() for d in decisions])[600:].mean().item()

    assert left() > usual
    assert left(reference=True) < 0.6


def test_published_adagc_clips_most_stationary_steps():
    """Its average, of norms clipped to 1.05 times itself, settles at 0.81 of the median, which 71% are above."""
    stream = log_normal(4000, 20, spread=SPREAD, median=0.05, seed=9)
    for policy, share in ((gp.AdaGC(reference=True), 0.71), (gp.AdaGC(), 0.435)):
        decisions, _ = play(policy, stream)
        clipped = torch.stack([d.coefficients < 1 for d in decisions[2000:]])
        assert clipped.double().mean().item() == pytest.approx(share, abs=0.02)
