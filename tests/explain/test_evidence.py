"""Which parameters an event reached, in which order, and the sentences that say what was seen."""

import math
from types import SimpleNamespace

import pytest
import torch

from gradkeel.explain import explain
from gradkeel.explain.evidence import initial
from scripted import scripted_run

STEPS = 160


def ones(parameters=3, steps=STEPS):
    return torch.ones(steps, parameters, dtype=torch.float64)


def explosion_of(path, norms, **options):
    return explain(scripted_run(path, norms, **options)).explosion


def spread_of(explosion):
    return [(reached.parameter, reached.step, reached.growth) for reached in explosion.spread]


def test_the_order_is_by_step_and_then_by_growth(tmp_path):
    norms = ones(4)
    norms[100] = torch.tensor([4.0, 1.9, 8.0, 1.0])  # b is not twice its usual norm yet
    norms[101] = torch.tensor([4.0, 2.1, 8.0, 1.9])
    explosion = explosion_of(tmp_path / "run.keel", norms)
    assert (explosion.step, explosion.parameter, explosion.last_step) == (101, "c", 102)
    assert spread_of(explosion) == [
        ("c", 101, pytest.approx(8)),
        ("a", 101, pytest.approx(4)),
        ("b", 102, pytest.approx(2.1)),
    ]
    total = math.sqrt(4.0**2 + 1.9**2 + 8.0**2 + 1)
    score = math.log10(total / 2) / (0.04 * (1 + 8 / 32))  # the least deviation, of 32 norms
    assert explosion.score == pytest.approx(score)
    assert explosion.evidence == (
        f"At step 101 the gradient norm was {total:.3g}, {total / 2:.3g} times 2, the median of the steps before: a "
        f"robust z-score of {score:.1f} on the log norm.",
        "2 of 4 parameters were reached at step 101, and 3 within the event.",
        "After step 102 the norm was back.",
    )


def test_a_noisy_parameter_is_reached_above_three_and_a_half_deviations(tmp_path):
    norms = ones(3)
    norms[:, :2] = 10 ** (0.2 * (torch.arange(STEPS) % 2)).unsqueeze(1)  # 3.5 deviations are 1.297 decades
    norms[100] = torch.tensor([10**1.28, 10**1.31, 500.0], dtype=torch.float64)
    assert spread_of(explosion_of(tmp_path / "run.keel", norms)) == [
        ("c", 101, pytest.approx(500)),
        ("b", 101, pytest.approx(10**1.31)),
    ]


def test_gradients_that_are_not_finite_come_first_from_the_last_one_back(tmp_path):
    norms = ones(5)
    norms[100] = torch.tensor([90.0, math.inf, 1.0, math.nan, 50.0])
    explosion = explosion_of(tmp_path / "run.keel", norms, nonfinite="skip")
    assert spread_of(explosion) == [
        ("d", 101, None),
        ("b", 101, None),
        ("a", 101, pytest.approx(90)),
        ("e", 101, pytest.approx(50)),
    ]
    assert (explosion.kind, explosion.ended, explosion.score) == ("spike", "recovered", None)
    assert (explosion.peak_norm, explosion.peak_step, explosion.growth_per_step) == (None, None, None)
    assert explosion.evidence == (
        "At step 101 the gradient was not finite; its norm had been 2.24, the median of the steps before.",
        "4 of 5 parameters were reached at step 101.",
        "1 step was skipped; the first: step 101: the gradient of 'd' is not finite (NaN).",
        "After step 101 the norm was back.",
    )


def test_skipped_steps_are_counted_within_the_event_only(tmp_path):
    norms = ones(1)
    norms[[60, 100, 101]] = math.nan
    events = explain(scripted_run(tmp_path / "run.keel", norms, nonfinite="skip")).events
    assert [event.step for event in events] == [61, 101]
    assert events[1].evidence[2:] == (
        "2 steps were skipped; the first: step 101: the gradient of 'a' is not finite (NaN).",
        "After step 102 the norm was back.",
    )


def test_a_parameter_whose_usual_norm_is_zero_is_reached_by_nan_alone(tmp_path):
    norms = ones(3)
    norms[:, 1:] = 0
    norms[100] = torch.tensor([9.0, 5.0, math.nan])
    assert spread_of(explosion_of(tmp_path / "run.keel", norms)) == [
        ("c", 101, None),
        ("a", 101, pytest.approx(9)),
    ]


@pytest.mark.parametrize(("share", "order"), [(2e-4, "ba"), (0.5e-4, "ab")])
def test_a_gradient_that_is_negligible_beside_the_others_comes_last(tmp_path, share, order):
    norms = ones(2)
    norms[:, 1] = 1e-5
    norms[100] = torch.tensor([20.0, 20.0 * share])
    names = [name for name, *_ in spread_of(explosion_of(tmp_path / "run.keel", norms))]
    assert names == list(order)


def test_parameters_are_looked_for_in_256_steps(tmp_path):
    norms = ones(3, 420)
    norms[100:, 0] = 90.0
    norms[355:, 1] = 90.0
    norms[356:, 2] = 90.0
    assert [(name, step) for name, step, _ in spread_of(explosion_of(tmp_path / "run.keel", norms))] == [
        ("a", 101),
        ("b", 356),
    ]


@pytest.mark.parametrize(
    ("risen_at", "factor", "told"),
    [(101, 1.6, True), (51, 1.6, True), (50, 1.6, False), (101, 1.4, False), (102, 1.6, False)],
)
def test_a_rise_of_the_learning_rate_in_the_fifty_steps_before_is_told(tmp_path, risen_at, factor, told):
    norms = ones(1)
    norms[100] = 9.0
    rates = torch.full((STEPS,), 0.5)
    rates[risen_at - 1 :] *= factor
    sentence = f"The learning rate rose from 0.5 to {0.5 * factor:.3g} at step {risen_at}."
    evidence = explosion_of(tmp_path / "run.keel", norms, rates=rates).evidence
    assert (sentence in evidence) == told
    assert any("learning rate" in words for words in evidence) == told


def test_the_largest_rise_is_told(tmp_path):
    norms = ones(1)
    norms[100] = 9.0
    rates = torch.full((STEPS,), 0.01)
    rates[70:], rates[80:], rates[90:] = 0.02, 0.1, 0.16
    assert explosion_of(tmp_path / "run.keel", norms, rates=rates).evidence[0] == (
        "The learning rate rose from 0.02 to 0.1 at step 81."
    )


@pytest.mark.parametrize(
    ("spoilt", "sentence"),
    [
        ({100: 3.0, 101: 7.0, 102: 99.0}, "The loss rose from 1.5 to 7."),
        ({100: math.inf, 101: 2.0}, "The loss rose from 1.5 to 2."),
        ({100: 1.5, 101: 1.0, 102: 99.0}, None),
    ],
)
def test_the_loss_is_told_where_it_rose_within_the_event(tmp_path, spoilt, sentence):
    norms = ones(1)
    norms[100:102] = 9.0
    losses = torch.full((STEPS,), 1.5)
    for row, loss in spoilt.items():
        losses[row] = loss
    evidence = explosion_of(tmp_path / "run.keel", norms, losses=losses).evidence
    assert [words for words in evidence if "loss" in words] == ([sentence] if sentence else [])


def test_an_overflow_of_the_loss_scale_has_a_kind_of_its_own_and_comes_last(tmp_path):
    torch.manual_seed(0)
    from torch import nn

    import gradkeel as gk

    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = gk.attach(optimizer, "global-norm:1e6", model=model, record=tmp_path / "run.keel")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    for step in range(1, 101):
        loss = model(torch.ones(4, 2)).sum() * {40: 1e38, 80: 9.0}.get(step, 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    guard.detach()
    explanation = explain(tmp_path / "run.keel")
    assert [(event.kind, event.step) for event in explanation.events] == [("overflow", 40), ("spike", 80)]
    assert explanation.explosion.step == 80
    assert any("1 step was skipped; the first: " in words for words in explanation.events[0].evidence)


def climb(steps=40, parameters=2):
    """Norms that grow fourfold a step from the first on, up to step 13, and are not finite from step 31 on."""
    norms = ones(parameters, steps)
    norms[:13, 0] = 4.0 ** torch.arange(13)
    norms[13:30, 0] = 4.0**12
    norms[30:] = math.nan
    return norms


def test_an_explosion_without_a_past_is_told_by_the_first_larger_update(tmp_path):
    updates = torch.full((40, 2), 0.01)
    updates[4:, 1], updates[6:, 0] = 1.5, 3.0
    explosion = explosion_of(tmp_path / "run.keel", climb(), updates=updates, losses=[1.0] * 40)
    assert (explosion.kind, explosion.step, explosion.parameter) == ("initialization", 5, "b")
    assert spread_of(explosion)[:2] == [("b", 5, 1.0), ("a", 7, 4.0**6)]
    assert (explosion.norm_before, explosion.score) == (None, None)
    assert (explosion.ended, explosion.last_step) == ("non-finite", 40)
    assert explosion.peak_step == 13
    first, peak = math.sqrt(2), math.hypot(4.0**12, 1)
    assert explosion.peak_norm == pytest.approx(peak)
    assert explosion.growth_per_step == pytest.approx((peak / first) ** (1 / 12))
    shown = ", ".join(f"{math.hypot(4.0**i, 1):.3g}" for i in range(5))
    assert explosion.evidence == (
        f"There is no past to compare with: the gradient norm grew from the first steps on ({shown}, ...).",
        "The first update larger than the weights it changed was that of b at step 5: 1.5 times.",
        "Gradient norms do not tell why; initial weights and learning rate are what acted until then.",
        "It was not finite at step 40, the last one recorded.",
    )


@pytest.mark.parametrize(
    ("totals", "words"),
    [
        ([math.nan, math.nan, math.inf, 2.0, 8.0, 32.0], "grew from the first steps on (2, 8, 32)."),
        ([math.nan, 25200.0, 31.6, 9.2], "was high from the first steps on (25,200, 31.6, 9.2)."),
        ([math.nan, math.inf], "no past to compare with: no gradient norm was finite."),
    ],
)
def test_norms_that_are_told_are_finite_and_did_what_is_said(totals, words):
    course = SimpleNamespace(totals=torch.tensor(totals), losses=torch.ones(6), step=lambda row: 6)
    event = SimpleNamespace(start=0, stop=6, ended="high")
    assert initial(course, event, [])[0].endswith(words)


@pytest.mark.parametrize("ratio", [0.99, 1.01])
def test_an_update_is_larger_than_the_weights_from_their_size_on(tmp_path, ratio):
    updates = torch.full((40, 2), 0.01)
    updates[4:] = torch.tensor([0.5 * ratio, 0.3])
    explosion = explosion_of(tmp_path / "run.keel", climb(), updates=updates, weights=[0.5, 1.0])
    assert explosion.kind == "initialization"
    assert (explosion.step == 5) == (ratio > 1)
    assert any("larger than the weights" in words for words in explosion.evidence) == (ratio > 1)


def test_of_updates_at_one_step_the_largest_comes_first(tmp_path):
    updates = torch.full((40, 3), 0.01)
    updates[4:] = torch.tensor([2.0, 3.0, 9.0])
    weights = [1.0, 1.0, 0.0]  # zero weights have no ratio
    explosion = explosion_of(tmp_path / "run.keel", climb(parameters=3), updates=updates, weights=weights)
    assert [name for name, _, _ in spread_of(explosion)[:2]] == ["b", "a"]
    assert "b at step 5: 3 times" in explosion.evidence[1]


def test_an_explosion_from_the_initialization_on_that_no_parameter_shows(tmp_path):
    norms = ones(2, 40)
    norms[:4, 1], norms[4:, 1] = 0.0, 500.0  # it has no norm to grow from
    norms[5:7, 1] = 501.0
    path = scripted_run(tmp_path / "run.keel", norms)
    explosion = explain(path).explosion
    assert (explosion.kind, explosion.step, explosion.parameter) == ("initialization", 4, None)
    assert explosion.spread == ()
    assert "The gradients exploded from the initialization on: first at step 4." in str(explain(path))
    assert (explosion.peak_step, explosion.last_step, explosion.ended) == (6, 40, "high")
    assert explosion.growth_per_step == pytest.approx(math.hypot(501, 1) ** (1 / 5))
    assert explosion.evidence[-1] == "It was still high at step 40, the last one recorded."


@pytest.mark.parametrize(
    ("parameters", "rest"), [(1, None), (8, ""), (9, ", and 1 more"), (11, ", and 3 more")]
)
def test_eight_parameters_are_told_in_their_order_and_the_others_counted(tmp_path, parameters, rest):
    norms = ones(parameters, 60)
    for j in range(parameters):
        norms[40 + j :, j] = 50.0 + j
    text = str(explain(scripted_run(tmp_path / "run.keel", norms)))
    order = ", ".join(f"{'abcdefgh'[j]} ({41 + j})" for j in range(min(parameters, 8)))
    assert (f"Order (step): {order}{rest}." in text) == (rest is not None)
    assert ("Order (step)" in text) == (rest is not None)


@pytest.mark.parametrize("step", [1, 2, 4, 7])
def test_a_bad_batch_among_the_first_steps_is_no_explosion_from_the_initialization_on(tmp_path, step):
    norms = ones(3, 40)
    norms[:, 0] = 1 + 0.3 * (torch.arange(40) % 3)
    norms[step - 1] = math.nan
    path = scripted_run(tmp_path / "run.keel", norms, losses=[1.0] * 40)
    found = explain(path)
    assert (found.explosion.kind, found.explosion.step, found.explosion.ended) == ("spike", step, "recovered")
    text = str(found)
    assert "initialization" not in text
    assert "from the first steps on" not in text
    assert f"At step {step} the gradient was not finite" in text
    assert ("no past" in text) == (step == 1)


def test_a_climb_from_the_first_steps_to_what_is_not_finite_is_one(tmp_path):
    norms = ones(2, 40)
    norms[:6, 0] = 4.0 ** torch.arange(6)
    norms[6:] = math.nan
    explosion = explosion_of(tmp_path / "run.keel", norms)
    assert (explosion.kind, explosion.ended) == ("initialization", "non-finite")
    updates = torch.full((40, 2), 0.01)
    updates[1, 1] = 1.5
    norms[:6, 0] = 1.0
    explosion = explosion_of(tmp_path / "other.keel", norms, updates=updates)
    assert (explosion.kind, explosion.step, explosion.parameter) == ("initialization", 2, "b")
