"""Replay is the live policy's own decision, and refuses what the record does not hold."""

import math

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import RecordError
from gradkeel.explain import replay
from gradkeel.policies import descriptions, parse
from gradkeel.record import Reader
from scripted import scripted_run

# Every policy that looks at nothing but norms, peaks and losses; those that look at units have no replay.
SPECS = [
    "none",
    "global-norm:0.3",
    "global-norm:0.3,norm_type=inf",
    "norm:0.1",
    "norm:0.1,exclude=*.bias",
    "value:0.05",
    *[d.name for d in descriptions() if all(p.default is not None for p in d.parameters)],
]


def train(path, spec, steps=60):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    chosen = parse(spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = gk.attach(optimizer, chosen.policy, model=model, exclude=chosen.exclude, record=path)
    for step in range(1, steps + 1):
        loss = (model(torch.randn(6, 4)) ** 2).sum() * (30 if step % 17 == 0 else 1)
        loss.backward()
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()


def replayable(spec):
    policy = parse(spec).policy
    return policy is None or policy.needs.unit_dim is None


@pytest.mark.parametrize("spec", [s for s in dict.fromkeys(SPECS) if replayable(s)])
def test_replay_of_the_live_policy_equals_live(tmp_path, spec):
    train(tmp_path / "run.keel", spec)
    with Reader(tmp_path / "run.keel") as run:
        result = replay(run, spec)
        assert result.is_live == ("exclude" not in spec)
        assert not result.differs.any()
        assert result.coefficients.tolist() == run.coefficients().tolist()
        assert result.clipped.tolist() == run.clipped().tolist()
        assert result.skipped.tolist() == (~run.stepped()).tolist()
        assert result.norms.tolist() == run.totals().tolist()
        both = ~result.clipped_norms.isnan()
        torch.testing.assert_close(result.clipped_norms[both], run.clipped_totals()[both], rtol=1e-12, atol=0)


@pytest.mark.parametrize("spec", ["zclip", "autoclip:0.9,warmup=10", "adagc"])
@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_a_skipped_step_leaves_no_trace_in_the_state(tmp_path, spec, nonfinite):
    """NaN in a gradient that the policy does not look at, while those that it looks at are finite and large."""
    norms = wavy(120)
    norms[[60, 61, 90], 1] = math.nan
    norms[[60, 61, 90], 0] = 30.0
    path = scripted_run(tmp_path / "run.keel", norms, policy=spec, exclude=["b"], nonfinite=nonfinite)
    with Reader(path) as run:
        assert run.nonfinite().nonzero().flatten().tolist() == [60, 61, 90]
        result = replay(run, spec)
        assert result.is_live
        assert not result.differs.any()
        assert result.bounds[62:].isfinite().all()
        # The same policy on the same numbers, so the same bits; one that had learnt from 30.0 would have other bounds.
        assert result.bounds.tolist() == run.bounds().tolist()
        skipped = [60, 61, 90] if nonfinite == "skip" else []
        assert result.skipped.nonzero().flatten().tolist() == skipped
        assert result.coefficients[skipped].tolist() == [1.0] * len(skipped)
        assert not result.clipped[skipped].any()
        assert result.clipped_norms[skipped].tolist() == [30.0] * len(skipped)
        assert result.skip_rate == len(skipped) / 120
        # Another policy would not have made these steps either.
        assert replay(run, "none").skipped.tolist() == result.skipped.tolist()


def test_a_step_without_any_gradient_leaves_no_trace_in_the_state(tmp_path):
    losses = 1 + 0.1 * (torch.arange(100) % 2)
    absent = {(step, name) for step in range(71, 81) for name in "ab"}
    losses[70:80] = 5.0  # had they been learnt from, the loss of step 91 would be none of an outlier
    losses[90] = 2.0
    path = scripted_run(
        tmp_path / "run.keel", torch.ones(100, 2), policy="skip-step", absent=absent, losses=losses
    )
    with Reader(path) as run:
        result = replay(run, "skip-step")
        assert (~run.stepped()).nonzero().flatten().tolist() == [*range(70, 80), 90]
        assert result.skipped.nonzero().flatten().tolist() == [*range(70, 80), 90]
        assert not result.differs.any()


@pytest.mark.parametrize("spec", ["warmup:20/global-norm:0.3/norm:0.1", "warmup:40/value:0.05/none"])
@pytest.mark.parametrize("first", [1, 31])
def test_replay_of_a_warmup_counts_the_runs_own_steps(tmp_path, spec, first):
    """Also where the record begins in the middle of the run, before or after the change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def go(guard, steps):
        for _ in range(steps):
            (model(torch.randn(6, 4)) ** 2).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        state = guard.state_dict()
        guard.detach()
        return state

    state = go(gk.attach(optimizer, parse(spec).policy, model=model), first - 1)
    guard = gk.attach(optimizer, parse(spec).policy, model=model, record=tmp_path / "run.keel")
    guard.load_state_dict(state)
    go(guard, 25)
    with Reader(tmp_path / "run.keel") as run:
        assert run.steps().tolist() == list(range(first, first + 25))
        result = replay(run, spec)
        assert result.is_live
        assert result.steps.tolist() == run.steps().tolist()
        assert not result.differs.any()
        assert result.coefficients.tolist() == run.coefficients().tolist()
        assert result.clipped.tolist() == run.clipped().tolist()
        assert result.clipped.any()


def test_a_warmup_hands_over_at_its_step_with_what_was_learnt_meanwhile(tmp_path):
    path = scripted_run(tmp_path / "run.keel", wavy(1100), policy=None)
    with Reader(path) as run:
        result = replay(run, "warmup:1050/global-norm:0.5/autoclip:0.9,warmup=10")
        alone = replay(run, "autoclip:0.9,warmup=10")
        assert result.bounds[:1050].tolist() == [0.5] * 1050
        assert (
            result.bounds[1050:].tolist() == alone.bounds[1050:].tolist()
        )  # the same numbers in the same order


def wavy(steps):
    """Norms of two parameters that go up and down."""
    generator = torch.Generator().manual_seed(0)
    return torch.exp(0.3 * torch.randn(steps, 2, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("policy", ["global-norm:1.0", gk.ClipByGlobalNorm(1.0)])
def test_the_live_policy_of_a_run_with_exclude_looks_at_what_it_looked_at(tmp_path, policy):
    norms = wavy(40) + torch.tensor([0.0, 5.0])
    path = scripted_run(tmp_path / "run.keel", norms, policy="global-norm:1.0", exclude=["b"])
    with Reader(path) as run:
        result = replay(run, policy)
        assert result.is_live
        assert result.norms.tolist() == norms[:, 0].tolist()
        assert result.coefficients.tolist() == run.coefficients().tolist()
        assert not result.differs.any()
        assert 0 < result.clip_rate < 1
        # With patterns of its own, given either way, it looks at all that these leave.
        for all_of_them in (
            replay(run, policy, exclude=["nothing"]),
            replay(run, "global-norm:1.0,exclude=nothing"),
        ):
            assert not all_of_them.is_live
            # One root of a sum of two squares, either way.
            torch.testing.assert_close(all_of_them.norms, norms.norm(dim=1), rtol=1e-12, atol=0)
            assert all_of_them.clip_rate == 1
        assert replay(run, policy, exclude=["a"]).norms.tolist() == norms[:, 1].tolist()
        both = replay(run, "global-norm:1.0,exclude=a", exclude=["b"])
        assert both.norms.tolist() == [0.0] * 40
        assert both.clip_rate == 0


def test_every_number_of_a_replay(tmp_path):
    norms = torch.tensor([1.0, 2.0, 4.0, math.nan, 8.0])
    path = scripted_run(tmp_path / "run.keel", norms, policy="value:4.0", nonfinite="skip")
    with Reader(path) as run:
        result = replay(run, "global-norm:2.0")
        assert result.policy == "global-norm:2.0"
        assert not result.is_live
        assert result.steps.tolist() == [1, 2, 3, 4, 5]
        assert result.coefficients.tolist() == [1, 1, 0.5, 1, 0.25]
        assert result.clipped.tolist() == [False, False, True, False, True]
        assert result.skipped.tolist() == [False, False, False, True, False]
        assert result.bounds.tolist() == [2.0] * 5
        assert result.norms.tolist() == pytest.approx([1, 2, 4, math.nan, 8], nan_ok=True, rel=0)
        assert result.clipped_norms.tolist() == pytest.approx([1, 2, 2, math.nan, 2], nan_ok=True, rel=0)
        assert result.differs.tolist() == [False, False, True, False, True]
        assert (result.clip_rate, result.skip_rate, result.mean_coefficient) == (0.4, 0.2, 2.75 / 4)
        clamped = replay(run, "value:2.0")  # what is NaN beside a NaN norm was recorded all the same
        assert clamped.clipped.tolist() == [False, False, True, False, True]
        assert clamped.bounds.tolist() == [2.0] * 5
        # Norms do not tell what is left of clamped entries.
        assert clamped.clipped_norms.tolist() == pytest.approx([1, 2, *[math.nan] * 3], nan_ok=True, rel=0)
        nothing = replay(run, "none")
        assert nothing.bounds.isnan().all()
        assert nothing.clipped_norms.tolist() == pytest.approx([1, 2, 4, math.nan, 8], nan_ok=True, rel=0)
        assert nothing.clip_rate == 0


def test_a_policy_of_single_tensors_tells_the_smallest_coefficient_and_bound(tmp_path):
    path = scripted_run(tmp_path / "run.keel", [[3.0, 4.0], [3.0, 40.0], [0.5, 0.5]])
    with Reader(path) as run:
        result = replay(run, "norm:2.0")
    assert result.coefficients.tolist() == pytest.approx([0.5, 0.05, 1])
    assert result.clipped.tolist() == [True, True, False]
    assert result.clipped_norms.tolist() == pytest.approx([8**0.5, 8**0.5, 0.5**0.5])
    assert result.differs.tolist() == [True, True, False]


@pytest.mark.parametrize("exclude", [(), ("b",)])
def test_replay_of_single_entries_needs_those_that_it_looks_at(tmp_path, exclude):
    path = scripted_run(tmp_path / "run.keel", wavy(20), policy="value:1.0", exclude=exclude)
    with Reader(path) as run:
        result = replay(run, "value:1.0")
        assert result.is_live
        assert not result.differs.any()
        assert result.clipped.tolist() == run.clipped().tolist()
        assert 0 < result.clip_rate < 1
        if exclude:
            with pytest.raises(RecordError, match="it looks at the highest entry of each gradient"):
                replay(run, "value:1.0,exclude=nothing")


def test_what_a_policy_asked_to_skip_another_would_have_made(tmp_path):
    norms = torch.ones(100, dtype=torch.float64) + 0.01 * (torch.arange(100) % 7)
    norms[90] = 1e6
    path = scripted_run(tmp_path / "run.keel", norms, policy="skip-step")
    with Reader(path) as run:
        assert (~run.stepped()).nonzero().flatten().tolist() == [90]
        live, other = replay(run, "skip-step"), replay(run, "none")
        assert live.is_live
        assert live.skipped.nonzero().flatten().tolist() == [90]
        assert not live.differs.any()
        assert not other.skipped.any()
        assert other.differs.nonzero().flatten().tolist() == [90]


def test_another_policy_on_the_same_norms(tmp_path):
    train(tmp_path / "run.keel", "none")
    with Reader(tmp_path / "run.keel") as run:
        result = replay(run, gk.ClipByGlobalNorm(0.5))
        expected = 0.5 / run.totals().clamp(min=0.5)
        torch.testing.assert_close(
            result.coefficients, expected, rtol=1e-12, atol=0
        )  # one division, either way
        assert result.clip_rate == float((run.totals() > 0.5).double().mean())
        assert not result.is_live
        assert result.differs.tolist() == (expected < 1).tolist()


def test_excluded_parameters_leave_the_norm(tmp_path):
    train(tmp_path / "run.keel", "none")
    with Reader(tmp_path / "run.keel") as run:
        result = replay(run, "global-norm:0.5,exclude=*.bias")
        weights = run.norms()[:, [0, 2]]
        torch.testing.assert_close(result.norms, torch.linalg.vector_norm(weights, dim=1), rtol=1e-12, atol=0)


def test_what_the_record_does_not_hold_is_refused(tmp_path):
    train(tmp_path / "run.keel", "global-norm:1.0")
    with Reader(tmp_path / "run.keel") as run:
        with pytest.raises(RecordError, match=r"'agc'.*the norm of each unit, which records do not hold"):
            replay(run, "agc")
        with pytest.raises(RecordError, match=r"'value:1.0'.*highest entry.*here that was 'global-norm:1.0'"):
            replay(run, "value:1.0")
        with pytest.raises(RecordError, match=r"looks at inf-norms, and .* holds 2-norms"):
            replay(run, "global-norm:1.0,norm_type=inf")
        with pytest.raises(gk.PolicySpecError, match="unknown policy"):
            replay(run, "no-such-policy")


def test_a_record_without_steps_is_refused(tmp_path):
    path = scripted_run(tmp_path / "run.keel", torch.empty(0, 2), policy="global-norm:1.0")
    with Reader(path) as run, pytest.raises(RecordError, match="holds no steps yet"):
        replay(run, "global-norm:1.0")


def test_rates_are_shares_of_all_steps_and_the_mean_is_of_those_that_are_made(tmp_path):
    norms = torch.ones(80, dtype=torch.float64) + 0.01 * (torch.arange(80) % 7)
    norms[10], norms[70] = 4.0, 1e6  # clipped while the other rule warms up, and skipped
    path = scripted_run(tmp_path / "run.keel", norms, policy="none")
    with Reader(path) as run:
        result = replay(run, "skip-step+global-norm:2.0")
    skipped = result.skipped.nonzero().flatten().tolist()
    assert 70 in skipped
    assert result.skip_rate == len(skipped) / 80
    made = [n for i, n in enumerate(norms.tolist()) if i not in skipped]
    assert result.clip_rate == sum(n > 2 for n in made) / 80
    # Float64: one division each, and their mean.
    assert result.mean_coefficient == pytest.approx(sum(min(1, 2 / n) for n in made) / len(made), rel=1e-12)
    assert result.coefficients[skipped].tolist() == [1.0] * len(skipped)
