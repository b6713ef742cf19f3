"""One verdict a run, from runs whose right name is known."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.explain import Verdict, explain
from gradkeel.explain.signs import Sign, Signals
from gradkeel.explain.verdict import judge
from gradkeel.guard import SkipReason
from scripted import trained


def train(path, *, rate=1e-2, steps=120, warmup=0, clip=None, log=True, fault=None):
    """A small network on exactly specified data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    guard = gk.attach(optimizer, clip, model=model, record=path, nonfinite="keep", max_consecutive_skips=1000)
    for step in range(1, steps + 1):
        if warmup:
            optimizer.param_groups[0]["lr"] = rate * min(1.0, step / warmup)
        x = torch.randn(32, 8)
        loss = ((model(x) - x.sum(dim=1, keepdim=True)) ** 2).mean()
        if fault == "nan" and step >= 80:
            loss = loss * math.nan
        loss.backward()
        if log:
            guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    return explain(path)


def test_a_healthy_run(tmp_path):
    found = train(tmp_path / "run.keel", rate=3e-3)
    assert found.verdict is Verdict.HEALTHY
    assert found.diagnosis.onset is None
    assert found.diagnosis.missing == ()


def test_a_learning_rate_far_too_high_is_named_at_the_first_step(tmp_path):
    found = train(tmp_path / "run.keel", rate=1.0)
    assert found.verdict is Verdict.DIVERGED_FROM_START
    assert found.diagnosis.onset == 1
    assert "No explosion was found" not in str(found)


def test_in_warm_up(tmp_path):
    found = train(tmp_path / "run.keel", rate=1.0, warmup=80)
    assert found.verdict is Verdict.DIVERGED_IN_WARMUP
    assert 1 < found.diagnosis.onset <= 80


def test_clipped_it_is_found_as_well(tmp_path):
    found = train(tmp_path / "run.keel", rate=1.0, clip="global-norm:1.0")
    assert found.verdict in {Verdict.DIVERGED_FROM_START, Verdict.CLIPPING_HIDES_DIVERGENCE}


def test_a_loss_that_becomes_nan(tmp_path):
    found = train(tmp_path / "run.keel", fault="nan")
    assert (found.verdict, found.diagnosis.onset) == (Verdict.NON_FINITE, 80)
    assert found.diagnosis.where == ()
    assert "All gradients were hit at once" in str(found)


def test_what_was_not_recorded_is_said(tmp_path):
    found = train(tmp_path / "run.keel", log=False)
    assert any("guard.log(loss=loss)" in what for what in found.diagnosis.missing)
    assert found.diagnosis.confidence < 0.9


def test_json_has_the_verdict_beside_its_older_keys(tmp_path):
    found = json.loads(json.dumps(train(tmp_path / "run.keel", rate=1.0).to_json(), allow_nan=False))
    assert found["verdict"] == "diverged_from_start"
    assert found["onset"] == 1
    assert 0 < len(found["where"]) <= 3
    assert {"confidence", "missing", "explosion", "events", "fading", "threshold"} <= found.keys()
    assert "diagnosis" not in found


def signals(losses, **fields):
    losses = torch.tensor(losses, dtype=torch.float64)
    ones, steps = torch.ones_like(losses), torch.arange(1, len(losses) + 1)
    fields = {"coefficients": ones, "rates": ones, "totals": ones, "shares": [(1, 0.01)], **fields}
    return Signals(
        steps=steps, losses=losses, nonfinite=torch.zeros(len(losses), dtype=torch.bool), skips={}, **fields
    )


FALLING = [2.0 - 0.01 * i for i in range(100)]


@pytest.mark.parametrize(
    ("given", "verdict", "onset"),
    [
        (signals(FALLING), "healthy", None),
        (signals([2.0] * 50 + [2.0] * 50), "healthy", None),
        (signals([2.0] * 50 + [2.005] * 50), "stalled", 1),
        (signals(FALLING + [1.9] * 30), "spike_unrecovered", 101),
        (signals(FALLING + [5.0] * 30), "diverged", 101),
        (signals(FALLING + [5.0] * 30, coefficients=torch.full((130,), 1e-3)), "clipping_hides_divergence", 101),
        (signals(FALLING + [9.0] * 3 + [1.0] * 30, signs=[Sign("spike", 101, ("a",), True)]), "spike_recovered", 101),
        (signals(FALLING, signs=[Sign("overflow", 5, ("a",), True)]), "loss_scale_overflow", 5),
        (signals(FALLING, signs=[Sign("drift", 50, ("a",), False)]), "drift", 50),
        (signals(FALLING, hardly=[("a.weight", 30)]), "vanishing", 30),
        (signals(FALLING + [math.nan] * 5), "non_finite", 101),
        (signals(FALLING + [math.inf] * 5), "non_finite", 101),
        (signals([2.0, math.nan] * 50), "healthy", None),  # logged at every other step
    ],
)  # fmt: skip
def test_what_the_signals_come_to(given, verdict, onset):
    found = judge(given)
    assert (found.verdict, found.onset) == (verdict, onset)


# An agent's: it never fell, and swings around 0. And a game's between two networks: it fell, and slowly came back.
AGENT = [-0.5] * 30 + [-0.4, 5.0] * 30 + [1.0] * 40
GAME = [1.3 - 0.02 * i for i in range(35)] + [0.6 + 0.01 * i for i in range(80)]


JUMP = [2.3] * 60 + [4.0] * 240


@pytest.mark.parametrize(("losses", "signs"), [(GAME, []), (JUMP, []), (JUMP, [Sign("loss", 61, (), True)])])
def test_an_objective_that_moves_by_itself_is_no_divergence(losses, signs):
    found = judge(signals(losses, signs=signs))
    assert found.verdict is Verdict.HEALTHY
    assert found.confidence == 0.5
    assert "its objective moves" in found.reasons[-1]


# Of policy gradients: around 0 all along, as GRPO's for completions of unlike lengths, and for those of one length,
# whose only size is its penalty for leaving the first policy.
AROUND_0 = [-0.1, *[0.0, -0.3, 1e-9, -0.02, 0.2, -1e-9] * 12, *[0.0, -1e-9, 1e-9, 0.1] * 12]
FROM_0 = [0.0] * 20 + [1e-5 * i for i in range(100)]


@pytest.mark.parametrize(
    ("losses", "signs"), [(AGENT, []), (AROUND_0, []), (FROM_0, [Sign("loss", 24, (), False)])]
)
def test_the_level_of_a_surrogate_says_nothing(losses, signs):
    found = judge(signals(losses, signs=signs))
    assert (found.verdict, found.confidence) == (Verdict.HEALTHY, 0.5)
    assert "as that of a policy gradient" in found.reasons[-1]


def test_a_density_loss_that_falls_through_0_and_rises_again_has_diverged():
    falling = [2.0 - 0.03 * i for i in range(100)]
    assert judge(signals([*falling, *[1.5] * 30])).verdict is Verdict.SPIKE_UNRECOVERED
    assert judge(signals([*falling, *[5.0] * 30])).verdict is Verdict.DIVERGED


@pytest.mark.parametrize("losses", [AGENT, [*GAME, *[2.0] * 30], FROM_0])
@pytest.mark.parametrize(
    "evidence",
    [
        {"shares": [(1, 0.01), (50, 0.2)]},
        {"totals": "grown"},
        {"signs": [Sign("explosion", 60, ("a",), False)]},
        {"shares": []},
    ],
    ids=["large steps", "gradients that grew", "an explosion that lasts", "nothing recorded"],
)
def test_a_loss_that_rises_with_steps_or_gradients_has_diverged(losses, evidence):
    if evidence.get("totals") == "grown":
        totals = torch.ones(len(losses), dtype=torch.float64)
        totals[-30:] = 20.0
        evidence = {"totals": totals}
    assert judge(signals(losses, **evidence)).verdict in {Verdict.DIVERGED, Verdict.DIVERGED_FROM_START}


@pytest.mark.parametrize("kind", ["spike", "weights"])
def test_a_loss_that_jumps_with_a_spike_and_stays_has_diverged_though_it_had_never_fallen(kind):
    found = judge(signals(JUMP, signs=[Sign(kind, 61, ("a",), True)]))
    assert (found.verdict, found.onset) == (Verdict.DIVERGED, 61)


def test_a_drift_from_the_first_step_on_is_no_onset_of_what_came_later():
    found = judge(signals([*FALLING, *[9.0] * 60], signs=[Sign("drift", 1, ("a",), False)]))
    assert (found.verdict, found.onset) == (Verdict.DIVERGED, 101)


def test_a_game_that_ends_far_above_its_beginning_has_diverged():
    assert judge(signals([*GAME, *[2.0] * 30])).verdict is Verdict.DIVERGED


LARGE_FIRST = {"shares": [(1, 0.5), (2, 0.1)], "larger": [("a.weight", 1, 1.2)]}


def test_a_run_that_trained_until_then_did_not_diverge_from_the_start():
    found = judge(signals([*FALLING, *[9.0] * 60], **LARGE_FIRST))
    assert (found.verdict, found.onset) == (Verdict.DIVERGED, 101)
    assert not any("the update of" in reason for reason in found.reasons)


def test_one_that_never_trained_did():
    found = judge(signals([2.0, *[5.0] * 99], **LARGE_FIRST))
    assert (found.verdict, found.onset) == (Verdict.DIVERGED_FROM_START, 1)
    assert any("At step 1 the update of a.weight" in reason for reason in found.reasons)


def test_single_batches_that_fit_do_not_put_the_onset_off():
    sick = [5.0, 5.0, 5.0, 0.5] * 25  # each fourth is as low as ever
    found = judge(signals([*FALLING, *sick, 0.5, 5.0], signs=[Sign("spike", 101, ("a",), True)]))
    assert (found.verdict, found.onset, found.where) == (Verdict.DIVERGED, 101, ("a",))


def test_an_event_that_lasts_until_the_loss_leaves_is_the_onset():
    losses = [*FALLING, *[1.0] * 60, *[5.0] * 40]
    found = judge(signals(losses, signs=[Sign("explosion", 101, ("a",), False)]))
    assert (found.verdict, found.onset) == (Verdict.DIVERGED, 101)


@pytest.mark.parametrize("steps", [5, 30, 300])
def test_a_blow_up_to_nan_is_a_divergence_however_long_the_loop_goes_on(steps):
    lasts = [Sign("explosion", 101, ("a",), False)]
    totals = torch.cat([torch.ones(100), torch.tensor([300.0, 1e9]), torch.full((steps,), math.nan)]).double()
    found = judge(signals([*FALLING, 1.0, 1.1, *[math.nan] * steps], totals=totals, signs=lasts))
    assert (found.verdict, found.onset) == (Verdict.DIVERGED, 101)
    assert "and ended at not finite." in found.reasons[-1]


@pytest.mark.parametrize(
    ("every", "last", "reason", "verdict"),
    [
        (10, 200, None, Verdict.DIVERGED),
        (50, 200, None, Verdict.DIVERGED),
        (50, 199, None, Verdict.SPIKE_RECOVERED),
        (50, 200, SkipReason.LOSS_SCALE, Verdict.SPIKE_RECOVERED),
    ],
)
def test_gradients_not_finite_to_the_end_tell_of_a_loss_seldom_logged(every, last, reason, verdict):
    losses = [loss if row % every == 0 else math.nan for row, loss in enumerate([*FALLING, *[1.0] * 100])]
    losses[150:] = [math.nan] * 50
    given = signals(losses, signs=[Sign("explosion", 148, ("a",), False)])
    given.totals[147:150] = torch.tensor([300.0, 1e9, 1e18], dtype=torch.float64)
    given.nonfinite[150:last] = True
    if reason is not None:
        given = dataclasses.replace(given, skips=dict.fromkeys(range(151, 201), reason))
    found = judge(given)
    assert (found.verdict, found.onset) == (verdict, 148)


@pytest.mark.parametrize(
    ("rates", "verdict"),
    [
        ([0.01 * min(step, 50) for step in range(1, 161)], Verdict.DIVERGED_IN_WARMUP),
        ([0.01 * (step // 10 + 1) for step in range(160)], Verdict.DIVERGED_IN_WARMUP),  # once an epoch
        ([0.01] * 100 + [0.3] * 60, Verdict.DIVERGED),  # a mistake in a schedule
    ],
    ids=["each step", "in stairs", "a jump"],
)
def test_a_rate_that_rises_from_the_beginning_is_a_warm_up(rates, verdict):
    losses = [*FALLING, *[9.0] * 60]
    large = {"shares": [(101, 0.5)], "larger": [("a.weight", 101, 1.2)]}
    if verdict is Verdict.DIVERGED_IN_WARMUP:
        losses = [2.0] * 30 + [9.0] * 130
        large = {"shares": [(30, 0.5)], "larger": [("a.weight", 30, 1.2)]}
    found = judge(signals(losses, rates=torch.tensor(rates, dtype=torch.float64), **large))
    assert found.verdict is verdict


def test_a_few_steps_as_large_as_the_weights_are_those_of_lbfgs():
    few = [0.0025, 0.0024, 0.0023]
    assert judge(signals(few, **LARGE_FIRST)).verdict is Verdict.HEALTHY


@pytest.mark.parametrize("steps", [300, 3_000, 300_000])
def test_a_long_flat_run_is_healthy(steps):
    """The lowest of very many short stretches of noise is no best that was lost."""
    noise = 1 + 0.1 * torch.randn(steps, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise[:3] = 1.05
    assert judge(signals(noise.tolist())).verdict is Verdict.HEALTHY


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("idle", [{5, 10, 15, 20, 25, 30, 35, 40, 45, 50}, {60}])
def test_a_step_without_a_gradient_is_no_number_that_is_not_finite(tmp_path, idle):
    """A trainer whose training step may return nothing steps all the same, with neither gradient nor loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(0.5), model=model, record=tmp_path / "run.keel")
    for step in range(1, 61):
        if step not in idle:
            x = torch.randn(32, 8)
            loss = ((model(x) - x.sum(dim=1, keepdim=True)) ** 2).mean()
            loss.backward()
            guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    assert explain(tmp_path / "run.keel").verdict is Verdict.HEALTHY


def test_a_loss_that_is_missing_where_there_was_a_gradient_is_one():
    given = signals([*FALLING[:50], math.nan, *FALLING[50:]])
    assert judge(given).verdict is Verdict.NON_FINITE
    given = dataclasses.replace(given, skips={51: gk.guard.SkipReason.EMPTY_WINDOW})
    assert judge(given).verdict is Verdict.HEALTHY
    given = dataclasses.replace(given, losses=torch.tensor([*FALLING[:50], math.inf, *FALLING[50:]]))
    assert judge(given).verdict is Verdict.NON_FINITE  # told, and no number


@pytest.mark.filterwarnings("ignore::gradkeel.errors.GradkeelWarning")
@pytest.mark.parametrize("is_finite", [True, False])
def test_where_all_gradients_are_hit_and_the_loss_is_not_it_did_not_come_with_it(tmp_path, is_finite):
    """As by a foreign clip by the total norm, which makes all gradients NaN where one is."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    guard = gk.attach(optimizer, None, model=model, record=tmp_path / "run.keel")
    for step in range(1, 13):
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        if step == 11:
            for parameter in model.parameters():
                parameter.grad.fill_(math.nan)
            loss = loss if is_finite else loss * math.nan
        guard.log(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        if step == 11:
            assert ("it came with the loss" in guard.report.reason) != is_finite
            assert ("another clip" in guard.report.reason) == is_finite
    guard.detach()
    found = explain(tmp_path / "run.keel").diagnosis
    assert (found.verdict, found.onset, found.where) == (Verdict.NON_FINITE, 11, ())
    assert ("the loss was finite" in found.reasons[-1]) == is_finite


@pytest.mark.parametrize("times", [1, 50])
def test_unusual_first_weights_are_told_of_a_run_in_which_nothing_happened(tmp_path, times):
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(times)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = (torch.randn(32, 16) for _ in range(60))
    losses = (nn.functional.cross_entropy(model(x), x[:, :4].argmax(1)) for x in batches)
    found = explain(trained(tmp_path / "run.keel", model, optimizer, losses, "global-norm:1.0")).diagnosis
    assert any("usual initialization" in words for words in found.reasons) == (times > 1)
    assert (found.confidence <= 0.5) == (times > 1)
