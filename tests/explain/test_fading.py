"""Vanishing, dead and frozen parameters: in real training, and on norms whose answer is known to the step."""

import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.explain import explain
from scripted import scripted_run


def train(path, model, optimizer, steps=128, change=None):
    guard = gk.attach(optimizer, None, model=model, record=path)
    for step in range(1, steps + 1):
        if change is not None:
            change(step)
        model(torch.randn(32, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    return explain(path).fading


def test_a_healthy_network_has_none(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(model.parameters(), lr=0.01))
    assert (fading.vanishing, fading.dead, fading.frozen) == ((), (), ())


def test_a_layer_whose_gradient_vanishes(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))

    def cut_off(step):
        if step == 65:
            with torch.no_grad():
                model[2].weight.mul_(1e-7)

    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(model.parameters(), lr=1e-6), change=cut_off)
    assert {faded.parameter for faded in fading.vanishing} == {"0.weight", "0.bias"}
    for faded in fading.vanishing:
        assert 63 <= faded.since <= 66
        assert faded.share < 1e-4


def test_a_layer_behind_dead_units(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))

    def kill(step):
        if step == 33:
            with torch.no_grad():
                model[0].bias.fill_(-1e3)

    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(model.parameters(), lr=0.01), change=kill)
    assert {faded.parameter for faded in fading.dead} == {"0.weight", "0.bias", "2.weight"}
    assert all(31 <= faded.since <= 34 and faded.share == 0 for faded in fading.dead)


def test_frozen_ones(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    groups = [{"params": model[:2].parameters()}, {"params": model[2].parameters(), "lr": 0.0}]
    fading = train(tmp_path / "run.keel", model, torch.optim.SGD(groups, lr=0.01))
    assert fading.frozen == ("0.weight", "2.weight", "2.bias")
    assert fading.dead == ()


def fading_of(path, norms, **options):
    return explain(scripted_run(path, norms, **options)).fading


def late(value, *, steps=64, since=49):
    """Norms of three parameters; the third one's are ``value`` from step ``since`` on."""
    norms = torch.ones(steps, 3, dtype=torch.float64)
    norms[:, 1] = 4.0
    norms[since - 1 :, 2] = value
    return norms


@pytest.mark.parametrize(("share", "vanishes"), [(1.01e-3, False), (0.99e-3, True)])
def test_vanishing_is_below_a_thousandth_of_the_median_parameter(tmp_path, share, vanishes):
    fading = fading_of(tmp_path / "run.keel", late(share))  # the lower median of 1, 4 and the third
    assert [(f.parameter, f.since) for f in fading.vanishing] == ([("c", 49)] if vanishes else [])
    if vanishes:
        assert fading.vanishing[0].share == pytest.approx(share)
        assert fading.dead == ()


@pytest.mark.parametrize(("since", "fades"), [(30, True), (49, True), (50, False)])
@pytest.mark.parametrize("value", [1e-6, 0.0])
def test_only_the_last_quarter_counts(tmp_path, since, value, fades):
    fading = fading_of(tmp_path / "run.keel", late(value, since=since))
    shown, other = (fading.dead, fading.vanishing) if value == 0 else (fading.vanishing, fading.dead)
    assert other == ()
    assert [(f.parameter, f.since, f.share) for f in shown] == (
        [("c", since, pytest.approx(value))] if fades else []
    )


def test_a_parameter_that_never_learnt_is_so_from_the_first_step_on(tmp_path):
    norms = late(0.0, since=1)
    norms[:, 1] = 1e-5
    fading = fading_of(tmp_path / "run.keel", norms)
    assert [(f.parameter, f.since) for f in fading.dead] == [("c", 1)]
    # The dead one does not count for the median, which of 1 and 1e-5 is the lower.
    assert fading.vanishing == ()


def test_one_lively_step_is_enough_not_to_be_dead(tmp_path):
    norms = late(0.0, since=20)
    norms[60, 2] = 1.0
    assert fading_of(tmp_path / "run.keel", norms).dead == ()


@pytest.mark.parametrize(("steps", "is_told"), [(15, False), (16, True)])
def test_sixteen_steps_have_a_last_quarter(tmp_path, steps, is_told):
    fading = fading_of(tmp_path / "run.keel", late(0.0, steps=steps, since=1))
    assert bool(fading.dead) == is_told


@pytest.mark.parametrize(("last", "is_frozen"), [(48, True), (49, False)])
def test_without_a_gradient_in_the_last_quarter_it_is_frozen(tmp_path, last, is_frozen):
    absent = {(step, "c") for step in range(1, 65) if step != last}
    fading = fading_of(tmp_path / "run.keel", late(1.0), absent=absent)
    assert fading.frozen == (("c",) if is_frozen else ())
    assert fading.dead == ()  # and one step with a gradient in the last quarter is not dead either


def test_one_that_was_frozen_in_mid_run_is_told_with_its_step_and_is_no_fault(tmp_path):
    absent = {(step, "c") for step in range(41, 65)} | {(step, "d") for step in range(1, 65)}
    norms, losses = torch.ones(64, 4), torch.linspace(2, 1, 64)
    explanation = explain(scripted_run(tmp_path / "run.keel", norms, losses=losses, absent=absent))
    assert explanation.verdict == "healthy"
    assert explanation.fading.frozen == ("c", "d")
    assert [(f.parameter, f.since) for f in explanation.fading.stopped] == [("c", 41)]
    assert str(explanation).partition("Hardly learning:\n")[2].splitlines()[:2] == [
        "  - c is frozen: it has got no gradient since step 41.",
        "  - d is frozen: it got no gradient, or no update moved it.",
    ]


def test_where_none_gets_a_gradient_any_more_it_is_a_fault(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model, record=tmp_path / "run.keel")
    for step in range(1, 65):
        loss = (model(torch.randn(8, 4)) - 1).square().mean()
        loss.backward()
        if step > 40:
            guard.optimizer.zero_grad()
        guard.log(loss=loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gk.SkippedStepWarning)
            guard.optimizer.step()
        guard.optimizer.zero_grad()
    guard.detach()
    diagnosis = explain(tmp_path / "run.keel").diagnosis
    assert (diagnosis.verdict, diagnosis.onset, diagnosis.where) == ("vanishing", 41, ("weight",))


def test_without_an_update_it_is_frozen_though_it_has_gradients(tmp_path):
    norms = torch.cat([late(1.0), torch.full((64, 1), 2.0)], dim=1)
    updates = torch.full((64, 4), 1e-3)
    updates[:, 0], updates[:, 2], updates[5, 2] = 0, 0, 1e-9  # one update that moved it is enough
    fading = fading_of(tmp_path / "run.keel", norms, updates=updates)
    assert (fading.frozen, fading.dead, fading.vanishing) == (("a",), (), ())


def test_a_frozen_one_does_not_count_for_the_median(tmp_path):
    norms = torch.tensor([[1e-9, 1e-9, 1.0, 1.0, 1e-4]]).expand(64, 5)
    updates = torch.full((64, 5), 1e-3)
    updates[:, :2] = 0
    fading = fading_of(tmp_path / "run.keel", norms, updates=updates)
    assert fading.frozen == ("a", "b")
    assert [(f.parameter, f.since, f.share) for f in fading.vanishing] == [("e", 1, pytest.approx(1e-4))]


@pytest.mark.parametrize(("made", "frozen"), [(2, ()), (3, ("a", "b", "c"))])
def test_a_skipped_step_moves_nothing_and_says_nothing(tmp_path, made, frozen):
    norms = late(1.0, steps=20)
    norms[: 20 - made] = float("nan")
    fading = fading_of(tmp_path / "run.keel", norms, updates=0.0, nonfinite="skip", max_consecutive_skips=20)
    assert fading.frozen == frozen


def test_what_hardly_learns_in_words(tmp_path):
    norms = torch.ones(64, 6, dtype=torch.float64)
    norms[40:, 1], norms[30:, 2] = 2e-5, 0.0
    updates = torch.full((64, 6), 1e-3)
    updates[:, 3] = 0.0
    text = str(explain(scripted_run(tmp_path / "run.keel", norms, updates=updates)))
    assert text.partition("Hardly learning:\n")[2].splitlines()[:3] == [
        "  - The gradient of b is vanishing: 2e-05 of the median parameter's since about step 41.",
        "  - The gradient of c is dead: exactly zero since about step 31.",
        "  - d is frozen: it got no gradient, or no update moved it.",
    ]
