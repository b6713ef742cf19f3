"""Replay is the live policy's own decision, and refuses what the record does not hold."""

import math

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import RecordError, SkippedStepWarning
from gradkeel.explain import replay
from gradkeel.policies import descriptions, parse
from gradkeel.record import Reader

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


def train(path, spec, steps=60, spoil=()):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    chosen = parse(spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    guard = gk.attach(optimizer, chosen.policy, model=model, exclude=chosen.exclude, record=path)
    for step in range(1, steps + 1):
        loss = (model(torch.randn(6, 4)) ** 2).sum() * (30 if step % 17 == 0 else 1)
        if step in spoil:
            loss = loss * math.nan
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


@pytest.mark.parametrize("spec", ["zclip", "autoclip", "adagc"])
def test_a_skipped_step_leaves_no_trace_in_the_state(tmp_path, spec):
    with pytest.warns(SkippedStepWarning):
        train(tmp_path / "run.keel", spec, steps=160, spoil={40, 41, 90})
    with Reader(tmp_path / "run.keel") as run:
        result = replay(run, spec)
        assert not result.differs.any()
        assert [
            step for step, skipped in zip(run.steps().tolist(), result.skipped, strict=True) if skipped
        ] == [40, 41, 90]


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
