"""Layers that are frozen or unfrozen in mid-run: no explosion, and none is missed for it."""

import pytest
import torch

from gradkeel.explain import explain
from scripted import scripted_run

STEPS, CHANGE = 160, 80


def events_of(path, norms, present, **options):
    """Of a run whose last parameter has a gradient at these steps only."""
    absent = {(step, "c") for step in range(1, STEPS + 1) if step not in present}
    return explain(scripted_run(path, norms, absent=absent, **options)).events


def noise(*levels):
    noise = torch.randn(STEPS, len(levels), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.exp(0.1 * noise) * torch.tensor(levels)


@pytest.mark.parametrize("policy", [None, "norm:1.0", "global-norm:1.0,norm_type=inf"])
@pytest.mark.parametrize(
    "present", [range(CHANGE, STEPS + 1), range(1, CHANGE), range(30, 60)], ids=["unfrozen", "frozen", "both"]
)
def test_a_layer_that_is_unfrozen_is_no_explosion(tmp_path, present, policy):
    assert events_of(tmp_path / "run.keel", noise(1, 0.5, 9), present, policy=policy) == ()


@pytest.mark.parametrize("column", [0, 2])
@pytest.mark.parametrize("at", [CHANGE, CHANGE + 3, CHANGE + 30])
def test_an_explosion_beside_it_is_told_by_its_true_norm(tmp_path, at, column):
    if (at, column) == (CHANGE, 2):
        pytest.skip("how large the gradient of an unfrozen layer is usually, nobody knows then")
    norms = noise(1, 0.5, 9)
    norms[at - 1 :, :2] *= 300
    norms[at - 1 :, 2] *= 300 if column == 2 else 1
    (event,) = events_of(tmp_path / "run.keel", norms, range(CHANGE, STEPS + 1))
    assert (event.kind, event.step, event.ended) == ("explosion", at, "high")
    assert event.norm_before == pytest.approx(9 if at > CHANGE else 1.1, rel=0.3)


def test_where_sets_alternate_each_step_nothing_is_compared(tmp_path):
    assert events_of(tmp_path / "run.keel", noise(1, 0.5, 9), range(1, STEPS + 1, 3)) == ()


def test_a_zero_bias_that_is_unfrozen_was_not_written_to_by_something_else(tmp_path):
    weights, updates = torch.ones(STEPS, 3), torch.full((STEPS, 3), 1e-3)
    weights[:, 2] = (1e-3 * (torch.arange(STEPS) - 119)).clamp(min=0)
    updates[:119, 2] = 0
    kept = range(120, STEPS + 1)
    assert events_of(tmp_path / "run.keel", noise(1, 1, 1), kept, weights=weights, updates=updates) == ()
