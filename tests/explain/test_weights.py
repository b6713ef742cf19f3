"""Weights that something else wrote to, and updates that overwrite them: told from samples of known size."""

import copy

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.explain import explain
from scripted import scripted_run

STEPS = 120


def calm(parameters, steps=STEPS):
    return torch.ones(steps, parameters, dtype=torch.float64)


def changed(before, after, at, steps=STEPS, parameters=2):
    """Weights of 1, but for the last parameter's: it goes from ``before`` to ``after`` at step ``at``."""
    weights = calm(parameters, steps)
    weights[:, -1] = before
    weights[at - 1 :, -1] = after
    return weights


def explained(path, norms, **options):
    return explain(scripted_run(path, norms, **options))


@pytest.mark.parametrize(("after", "is_found"), [(1.49, False), (1.51, True), (1 / 1.49, False), (0.6, True)])
def test_a_change_by_half_is_told_where_updates_were_measured(tmp_path, after, is_found):
    explosion = explained(tmp_path / "run.keel", calm(2), weights=changed(1, after, 50)).explosion
    assert explosion.found == is_found
    if is_found:
        assert (explosion.kind, explosion.step, explosion.parameter) == ("weights", 50, "b")
        assert (explosion.altered, explosion.last_step, explosion.ended) == (("b",), 50, "recovered")
        assert explosion.evidence == (
            f"The weights of b changed at step 50. Their norm went from 1 to {after:.3g} ({after:.3g} times), and no "
            "update explains it: something else wrote to them.",
        )
        assert [(r.parameter, r.step, r.growth) for r in explosion.spread] == [("b", 50, None)]


@pytest.mark.parametrize(("update", "is_explained"), [(0.334, True), (0.333, False)])
@pytest.mark.parametrize("steps_before", [0, 9])
def test_an_update_of_a_third_of_the_change_explains_it(tmp_path, update, is_explained, steps_before):
    updates = torch.full(
        (STEPS, 2), 0.3
    )  # of the size of weights all along, so that this is not what is found
    updates[48 - steps_before, 1] = update
    explanation = explained(tmp_path / "run.keel", calm(2), weights=changed(1, 2, 50), updates=updates)
    assert bool(explanation.explosion.altered) != is_explained


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize(("missing", "is_explained"), [(2e-5, False), (1e-6, True)])
def test_an_update_explains_a_change_to_a_hundred_thousandth_of_the_weights(
    tmp_path, size, missing, is_explained
):
    updates = torch.full((STEPS, 2), 0.3 * size, dtype=torch.float64)
    updates[48, 1] = size * (1 - missing) / 3
    weights = changed(size, 2 * size, 50)
    weights[:, 0] = size
    explanation = explained(tmp_path / "run.keel", calm(2), weights=weights, updates=updates)
    assert bool(explanation.explosion.altered) != is_explained


def decay(model, slow, step):
    for parameter in model.parameters():
        parameter.mul_(0.999)


def look_ahead(model, slow, step):
    if step % 6 == 5:
        for mean, parameter in zip(slow.parameters(), model.parameters(), strict=True):
            parameter.copy_(mean.lerp_(parameter, 0.5))


@pytest.mark.parametrize("write", [decay, look_ahead])
def test_what_a_loop_writes_after_each_step_is_no_fault(tmp_path, write):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
    slow, target = copy.deepcopy(model), torch.randn(8, 1)
    kind, lr = (torch.optim.SGD, 1e-2) if write is decay else (torch.optim.Adam, 3e-3)
    optimizer = kind(model.parameters(), lr=lr)
    path = tmp_path / "run.keel"
    guard = gk.attach(optimizer, "global-norm:1.0", model=model, record=path)
    for step in range(300):
        inputs = torch.randn(32, 8)
        loss = (model(inputs) - inputs @ target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        guard.log(loss=loss)
        optimizer.step()
        with torch.no_grad():
            write(model, slow, step)
    guard.detach()
    assert explain(path).events == ()


def test_of_several_the_one_that_changed_most_comes_first(tmp_path):
    weights = calm(3)
    weights[49:] = torch.tensor([2.0, 0.1, 3.0])
    weights[59:, 0] = 1.0
    explanation = explained(tmp_path / "run.keel", calm(3), weights=weights)
    assert [(event.step, event.parameter, event.altered) for event in explanation.events] == [
        (50, "b", ("a", "b", "c")),
        (60, "a", ("a",)),
    ]
    assert explanation.explosion.step == 50  # the first sure fault
    assert len(explanation.explosion.evidence) == 3


def test_a_weight_that_was_zero(tmp_path):
    explosion = explained(tmp_path / "run.keel", calm(2), weights=changed(0, 5, 50)).explosion
    assert (explosion.step, explosion.altered) == (50, ("b",))
    assert "from 0 to 5 (inf times)" in explosion.evidence[0]


@pytest.mark.parametrize(
    ("after", "update", "is_found"),
    [
        (2.9, 1e-4, False),  # between samples only a change by three times is told
        (3.1, 1e-4, True),
        (3.1, 0.0139, True),  # three times the usual update, 50 times over, comes to 2.085
        (3.1, 0.0141, False),
        (1 / 2.9, 1e-4, False),
        (1 / 3.1, 1e-4, True),
    ],
)
def test_between_samples_the_update_is_estimated(tmp_path, after, update, is_found):
    norms, losses = calm(2, 230), torch.ones(230)
    norms[169:, 0], losses[169:] = 1.8, 1.3  # what gradients and loss do when somebody writes to the weights
    explosion = explained(
        tmp_path / "run.keel", norms, losses=losses, weights=changed(1, after, 170, 230), updates=update
    ).explosion
    assert explosion.found == is_found
    if is_found:
        assert (explosion.kind, explosion.step, explosion.altered) == ("weights", 170, ("b",))
        assert explosion.evidence[0].startswith(
            "The weights of b changed between steps 150 and 200, judging by the gradients at step 170. "
            f"Their norm went from 1 to {after:.3g} ({after:.3g} times)"
        )


@pytest.mark.parametrize(("update", "is_found"), [(0.0069, True), (0.0071, False)])
def test_a_higher_learning_rate_explains_a_larger_change(tmp_path, update, is_found):
    rates = torch.full((230,), 0.1)
    rates[160:] = 0.2
    explosion = explained(
        tmp_path / "run.keel", calm(2, 230), rates=rates, weights=changed(1, 3.1, 170, 230), updates=update
    ).explosion
    assert explosion.found == is_found


@pytest.mark.parametrize(
    ("share", "growth", "is_found"),
    [
        (1e-11, 1, True),
        (1e-11, 20, False),  # its updates grew with it, while they were not measured
        (1e-3, 20, True),  # an optimizer that normalizes makes no larger updates of a larger gradient
    ],
)
def test_a_negligible_gradient_that_grew_explains_a_larger_change(tmp_path, share, growth, is_found):
    norms = calm(2, 230) * torch.tensor([1.0, share])
    norms[154:, 1] *= growth
    weights = changed(6e-6, 5e-5, 170, 230)
    explosion = explained(tmp_path / "run.keel", norms, weights=weights, updates=[1e-3, 1e-7]).explosion
    assert explosion.altered == (("b",) if is_found else ())


@pytest.mark.parametrize(("together", "is_found"), [(1, True), (2, True), (3, False)])
def test_more_than_a_quarter_of_all_at_once_is_put_down_to_the_optimizer(tmp_path, together, is_found):
    weights = calm(8, 210)
    weights[169:, :together] = 5.0
    explosion = explained(tmp_path / "run.keel", calm(8, 210), weights=weights, updates=1e-5).explosion
    assert explosion.found == is_found
    assert len(explosion.altered) == (together if is_found else 0)


@pytest.mark.parametrize(
    ("at", "steps"),
    [
        (60, [60]),
        (57, [57]),
        (56, [56, 60]),
        (62, [60, 62]),
    ],  # a change up to three steps before belongs to it
)
def test_a_change_of_weights_is_told_with_the_event_that_it_led_to(tmp_path, at, steps):
    norms = calm(2)
    norms[59] = torch.tensor([50.0, 1.0])
    events = explained(tmp_path / "run.keel", norms, weights=changed(1, 2, at)).events
    assert [event.step for event in events] == steps
    first = next(event for event in events if event.altered)
    assert (first.altered, first.parameter) == (("b",), "b")
    if len(events) == 1:
        assert first.kind == "spike"
        assert first.evidence[0].startswith(f"The weights of b changed at step {at}.")
        assert first.evidence[1].startswith("At step 60 the gradient norm was 50, ")
        assert [(r.parameter, r.step) for r in first.spread] == [("b", at), ("a", 60)]


def small_then(ratio, at=50, usual=0.01, steps=STEPS, lasting=1):
    """Updates of this share of two weights of 1 and 0.1: as usual, but larger at some steps."""
    updates = torch.full((steps, 2), 1.0, dtype=torch.float64) * torch.tensor([1.0, 0.1]) * usual
    updates[at - 1 : at - 1 + lasting] = torch.tensor([1.0, 0.1]) * ratio
    return updates


@pytest.mark.parametrize(
    ("ratio", "at", "usual", "is_found"),
    [
        (0.29, 50, 0.01, False),  # less than three tenths of the weights
        (0.31, 50, 0.01, True),
        (0.49, 50, 0.05, False),  # less than ten times the usual
        (0.51, 50, 0.05, True),
        (1.3, 50, 0.099, True),
        (1.3, 50, 0.101, False),  # large ones were usual
        (1.3, 9, 0.01, True),
        (1.3, 8, 0.01, False),  # too few before
    ],
)
def test_updates_that_overwrite_the_weights(tmp_path, ratio, at, usual, is_found):
    explosion = explained(
        tmp_path / "run.keel", calm(2), weights=[1.0, 0.1], updates=small_then(ratio, at, usual)
    ).explosion
    assert explosion.found == is_found
    if is_found:
        assert (explosion.kind, explosion.step, explosion.last_step, explosion.ended) == (
            "updates", at, at, "recovered",
        )  # fmt: skip
        assert set(explosion.overwritten) == ({"a", "b"} if ratio > 1 else set())
        assert explosion.evidence[0].startswith(
            f"The update at step {at} was {ratio:.3g} times as large as the weights that it changed "
            f"(usual before: {usual:.2g})"
        )


def test_the_parameters_that_were_overwritten_largest_first(tmp_path):
    updates = small_then(0.01)
    updates[49] = torch.tensor([1.2, 0.5])
    rates = torch.full((STEPS,), 0.1)
    rates[49:] = 0.4
    explosion = explained(
        tmp_path / "run.keel", calm(2), weights=[1.0, 0.1], updates=updates, rates=rates
    ).explosion
    assert (explosion.parameter, explosion.overwritten) == ("b", ("b", "a"))
    ratio = (1.2**2 + 0.5**2) ** 0.5 / 1.01**0.5
    assert explosion.evidence == (
        "The learning rate rose from 0.1 to 0.4 at step 50.",
        f"The update at step 50 was {ratio:.3g} times as large as the weights that it changed (usual before: 0.01), "
        "most of all in b: 5 times.",
    )


@pytest.mark.parametrize(("lasting", "last", "ended"), [(5, 54, "recovered"), (51, 100, "high")])
def test_until_when_updates_were_large(tmp_path, lasting, last, ended):
    updates = small_then(0.5, lasting=lasting, steps=100)
    explosion = explained(tmp_path / "run.keel", calm(2, 100), weights=[1.0, 0.1], updates=updates).explosion
    assert (explosion.step, explosion.last_step, explosion.ended) == (50, last, ended)


@pytest.mark.parametrize(("at", "events"), [(45, [45]), (44, [44, 95]), (96, [95]), (97, [95, 97])])
def test_an_overwriting_update_belongs_to_the_event_up_to_fifty_steps_later(tmp_path, at, events):
    norms = calm(2)
    norms[94] = torch.tensor([50.0, 1.0])
    explanation = explained(tmp_path / "run.keel", norms, weights=[1.0, 0.1], updates=small_then(1.3, at))
    assert [event.step for event in explanation.events] == events
    first = explanation.events[0]
    if at == 45:
        assert (first.kind, set(first.overwritten)) == ("spike", {"a", "b"})
        assert first.evidence[0].startswith("The update at step 45 was 1.3 times as large")
        assert first.spread[0].step == 45
