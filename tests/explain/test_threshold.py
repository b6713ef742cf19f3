"""Threshold advice: right on distributions that are known, and silent on what norms do not hold."""

import math

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.explain import advise, explain
from gradkeel.explain.explosion import Explosion
from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.norms import Decision, GradientNorms
from gradkeel.record import Reader, Recorder
from gradkeel.record.rows import Subject
from scripted import scripted_run

LEVELS = {0.5: 0.0, 0.75: 0.67448975, 0.9: 1.28155157, 0.95: 1.64485363, 0.99: 2.32634787}


def write(path, norms, *, optimizer="SGD", policy="none", bound=None, lr=0.1):
    """A record of one parameter with these norms."""
    recorder = Recorder(path)
    for i, norm in enumerate(norms.double()):
        measured = GradientNorms(("w",), norm.reshape(1), norm, 2.0, (0,), i + 1, (1,))
        decision = Decision() if bound is None else Decision(bound=torch.tensor(bound, dtype=torch.float64))
        selection = SelectionReport("main", policy, measured, decision, (True,))
        recorder.record(StepReport(i + 1, (selection,), 1.0, {"lr": lr}))
        recorder._outbox.subject = Subject(("w",), {"w": (1,)}, policy, optimizer, "skip")
    recorder.close()
    return path


def lognormal(steps, seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(spread * torch.randn(steps, generator=generator, dtype=torch.float64))


def test_quantiles_and_their_intervals_cover_the_truth(tmp_path):
    covered, total = 0, 0
    for seed in range(8):
        with Reader(write(tmp_path / f"{seed}.keel", lognormal(1000, seed))) as run:
            advice = advise(run)
        assert advice.steps == 1000
        for level, z in LEVELS.items():
            estimate = advice.quantiles[level]
            assert estimate.low <= estimate.value <= estimate.high
            covered += estimate.low <= math.exp(0.5 * z) <= estimate.high
            total += 1
    assert covered / total > 0.8  # nominally 95%; a bootstrap of 1000 values is too narrow in the tails


def test_numbers_of_a_candidate(tmp_path):
    norms = lognormal(2000)
    with Reader(write(tmp_path / "run.keel", norms)) as run:
        advice = advise(run, bounds=[1.5])
    candidate = next(c for c in advice.candidates if c.origin == "given")
    coefficients = 1.5 / norms.clamp(min=1.5)
    assert candidate.bound == 1.5
    assert candidate.clip_rate.value == pytest.approx(float((norms > 1.5).double().mean()))
    assert candidate.mean_coefficient.value == pytest.approx(float(coefficients.mean()))
    assert candidate.coefficient_spread == pytest.approx(
        (float(coefficients.quantile(0.05)), float(coefficients.quantile(0.95)))
    )
    assert candidate.effective_lr.value == pytest.approx(0.1 * float(coefficients.median()))
    assert advice.log_median == pytest.approx(float(norms.log().median()))
    assert advice.drift.low < 1 < advice.drift.high
    assert [c.bound for c in advice.candidates] == sorted(c.bound for c in advice.candidates)


def test_the_live_bound_is_a_candidate(tmp_path):
    with Reader(write(tmp_path / "run.keel", lognormal(200), bound=0.1)) as run:
        advice = advise(run)
    live = next(c for c in advice.candidates if c.origin == "live")
    assert live.bound == pytest.approx(0.1)
    assert live.clips_nearly_always
    assert any("normalized SGD, effective lr = lr * bound / norm" in words for words in advice.remarks)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "RMSprop"])
def test_under_adam_no_effective_learning_rate_is_given(tmp_path, optimizer):
    with Reader(write(tmp_path / "run.keel", lognormal(200), optimizer=optimizer, bound=0.1)) as run:
        advice = advise(run)
    assert advice.scale_cancels is True
    assert all(candidate.effective_lr is None for candidate in advice.candidates)
    assert any(
        f"Under {optimizer} a constant factor on the gradients cancels" in words for words in advice.remarks
    )
    assert not any("normalized SGD" in words for words in advice.remarks)


def test_under_an_unknown_optimizer_nothing_is_claimed(tmp_path):
    with Reader(write(tmp_path / "run.keel", lognormal(200), optimizer="MyOwn")) as run:
        advice = advise(run)
    assert advice.scale_cancels is None
    assert all(candidate.effective_lr is None for candidate in advice.candidates)
    assert any(
        "What a smaller gradient does under MyOwn is not known here" in words for words in advice.remarks
    )


def test_what_cannot_be_said_is_not_said(tmp_path):
    text = str(explain(write(tmp_path / "run.keel", lognormal(300))))
    for forbidden in ("optimal", "recommended", "should be", "final loss will", "L0", "L1"):
        assert forbidden not in text
    assert "cannot be said from norms" in text


def test_drift_is_seen_with_its_interval(tmp_path):
    norms = lognormal(1000) * torch.linspace(1, 4, 1000)
    with Reader(write(tmp_path / "run.keel", norms)) as run:
        drift = advise(run).drift
    assert drift.low > 1.5
    assert drift.low < drift.value < drift.high


def test_non_finite_zero_and_exploded_steps_are_left_out(tmp_path):
    norms = lognormal(400)
    norms[10], norms[20], norms[300:] = math.nan, 0.0, 1e9
    with Reader(write(tmp_path / "run.keel", norms)) as run:
        advice = advise(run, explosion=Explosion(True, "explosion", step=301, ended="high"))
        assert advice.steps == 298
        assert advice.quantiles[0.99].value < 10
        assert advise(run).steps == 398


def test_too_few_steps(tmp_path):
    with Reader(write(tmp_path / "run.keel", lognormal(19))) as run:
        assert advise(run) is None


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bounds_must_be_positive(tmp_path, bound):
    with (
        Reader(write(tmp_path / "run.keel", lognormal(30))) as run,
        pytest.raises(ValueError, match="a bound must be a positive finite number"),
    ):
        advise(run, bounds=[bound])


def test_a_policy_of_single_tensors_is_advised_on_single_tensors(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    guard = gk.attach(
        torch.optim.SGD(model.parameters(), lr=1e-3), "norm:0.5", model=model, record=tmp_path / "run.keel"
    )
    for _ in range(60):
        model(torch.randn(8, 4)).square().mean().backward()
        guard.optimizer.step()
        guard.optimizer.zero_grad()
    guard.detach()
    with Reader(tmp_path / "run.keel") as run:
        advice = advise(run)
        assert advice.scope == "tensor"
        live = next(c for c in advice.candidates if c.origin == "live")
        assert live.clip_rate.value == pytest.approx(float((run.norms() > 0.5).double().mean()))
        assert advise(run, scope="global").scope == "global"


def advice_of(path, norms, *, bounds=(), **options):
    with Reader(write(path, norms, **options)) as run:
        return advise(run, bounds=bounds)


def test_the_numbers_of_the_integers_from_1_to_101(tmp_path):
    shuffled = torch.randperm(101, generator=torch.Generator().manual_seed(0)) + 1
    advice = advice_of(tmp_path / "run.keel", shuffled)
    assert (advice.steps, advice.scope, advice.norm_type, advice.optimizer) == (101, "global", 2.0, "SGD")
    # The quantiles of 101 values are values, but for the last one, which lies nine tenths between two.
    values = {0.5: 51.0, 0.75: 76.0, 0.9: 91.0, 0.95: 96.0, 0.99: 100.0, 0.999: 100.9}
    assert {level: e.value for level, e in advice.quantiles.items()} == pytest.approx(values)
    assert [(c.bound, c.origin) for c in advice.candidates] == [
        (51, "50%"),
        (pytest.approx(91), "90%"),
        (100, "99%"),
    ]
    assert advice.log_median == pytest.approx(math.log(51))
    logs = [abs(math.log(n / 51)) for n in range(1, 102)]
    assert advice.log_mad == pytest.approx(sorted(logs)[50])
    middle = advice.candidates[0]
    assert middle.clip_rate.value == pytest.approx(50 / 101)  # a norm that equals the bound is not clipped
    assert middle.mean_coefficient.value == pytest.approx(sum(min(1, 51 / n) for n in range(1, 102)) / 101)
    assert middle.effective_lr.value == pytest.approx(0.1)
    assert advice.candidates[0].coefficient_spread == pytest.approx((51 / 96, 1))
    first, last = (sorted(part.tolist())[12] for part in (shuffled[:25], shuffled[-25:]))
    assert advice.drift.value == pytest.approx(last / first)


def test_an_interval_is_as_wide_as_chance_makes_it(tmp_path):
    norms = torch.where(torch.rand(2000, generator=torch.Generator().manual_seed(0)) < 0.3, 2.0, 1.0)
    advice = advice_of(tmp_path / "run.keel", norms, bounds=[1.5])
    rate = next(c for c in advice.candidates if c.origin == "given").clip_rate
    width = 2 * 1.96 * math.sqrt(0.3 * 0.7 / 2000)  # of 95% of the shares of 2000 independent draws
    # 200 resamples of 45 blocks each know their own width to about a fifth.
    assert rate.high - rate.low == pytest.approx(width, rel=0.2)
    assert rate.low < rate.value < rate.high


def test_neighbouring_steps_are_drawn_together(tmp_path):
    norms = torch.where(torch.arange(2000) // 100 % 2 == 0, 2.0, 1.0)  # 20 stretches, far from independent
    advice = advice_of(tmp_path / "run.keel", norms, bounds=[1.5])
    rate = next(c for c in advice.candidates if c.origin == "given").clip_rate
    # Blocks of 44 steps lie nearly within a stretch: about 45 independent draws, where single steps were 2000.
    assert rate.high - rate.low > 3 * 2 * 1.96 * math.sqrt(0.25 / 2000)


@pytest.mark.parametrize(("clipped", "is_told"), [(90, False), (91, True)])
@pytest.mark.parametrize(("optimizer", "words"), [
    ("SGD", "normalized SGD, effective lr = lr * bound / norm: what you tune is lr x bound"),
    ("Adam", "the size of the gradient hardly enters the update any more"),
])  # fmt: skip
def test_a_bound_that_clips_nine_of_ten_steps(tmp_path, clipped, is_told, optimizer, words):
    norms = torch.ones(100)
    norms[:clipped] = 3.0
    advice = advice_of(tmp_path / "run.keel", norms, bounds=[2.0], optimizer=optimizer)
    given = next(c for c in advice.candidates if c.origin == "given")
    assert given.clips_nearly_always == is_told
    sentence = f"The bound 2 clips more than 90% of the steps: {words}."
    assert (sentence in advice.remarks) == is_told


@pytest.mark.parametrize(("steps", "has_advice", "has_drift"), [
    (19, False, False), (20, True, False), (79, True, False), (80, True, True),
])  # fmt: skip
def test_how_many_steps_it_takes(tmp_path, steps, has_advice, has_drift):
    advice = advice_of(tmp_path / "run.keel", lognormal(steps))
    assert (advice is not None) == has_advice
    assert (has_advice and advice.drift is not None) == has_drift


def test_drift_is_the_last_quarter_over_the_first(tmp_path):
    norms = torch.tensor([2.0, 99.0, 99.0, 6.0]).repeat_interleave(25)
    drift = advice_of(tmp_path / "run.keel", norms).drift
    assert (drift.value, drift.low, drift.high) == (3, 3, 3)


@pytest.mark.parametrize(
    ("optimizer", "cancels"),
    [*[(name, True) for name in (
        "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adafactor", "RMSprop", "Adagrad", "Adadelta", "Rprop", "Muon",
    )], ("SGD", False), ("ASGD", False), ("LBFGS", None)],
)  # fmt: skip
def test_in_which_optimizers_a_constant_factor_cancels(tmp_path, optimizer, cancels):
    advice = advice_of(tmp_path / "run.keel", lognormal(20), optimizer=optimizer)
    assert advice.scale_cancels is cancels
    assert all((c.effective_lr is None) == (cancels is not False) for c in advice.candidates)


def test_without_a_learning_rate_there_is_no_effective_one(tmp_path):
    advice = advice_of(tmp_path / "run.keel", lognormal(30), lr=math.nan)
    assert all(candidate.effective_lr is None for candidate in advice.candidates)


@pytest.mark.parametrize(
    ("kind", "ended", "steps"),
    [
        ("explosion", "high", 30),
        ("explosion", "non-finite", 30),
        ("spike", "recovered", 40),
        ("drift", "high", 40),
    ],
)
def test_which_steps_are_left_out(tmp_path, kind, ended, steps):
    with Reader(write(tmp_path / "run.keel", lognormal(40))) as run:
        explosion = Explosion(True, kind, step=31, ended=ended)
        assert advise(run, explosion=explosion).steps == steps


def test_bounds_that_change_are_no_candidate(tmp_path):
    torch.manual_seed(0)
    path = scripted_run(tmp_path / "run.keel", lognormal(60), policy="autoclip")
    with Reader(path) as run:
        assert len(set(run.bounds().tolist())) > 2
        assert {c.origin for c in advise(run).candidates} == {"50%", "90%", "99%"}


def test_a_given_bound_that_is_the_live_one_is_named_so(tmp_path):
    advice = advice_of(tmp_path / "run.keel", lognormal(60), bound=0.25, bounds=[0.25, 4.0])
    assert [(c.bound, c.origin) for c in advice.candidates if "%" not in c.origin] == [
        (0.25, "live"), (4.0, "given"),
    ]  # fmt: skip


def test_single_tensors_leave_out_excluded_and_dead_ones(tmp_path):
    norms = torch.stack([torch.arange(1.0, 41.0), torch.zeros(40), torch.full((40,), 7.0)], dim=1)
    norms[3] = math.nan
    path = scripted_run(tmp_path / "run.keel", norms, policy="norm:5.0", exclude=["c"], nonfinite="skip")
    with Reader(path) as run:
        advice = advise(run)
    assert (advice.scope, advice.steps) == ("tensor", 39)
    live = next(c for c in advice.candidates if c.origin == "live")
    assert live.clip_rate.value == pytest.approx(35 / 39)  # of the first one's norms alone: 6 to 40
    text = str(explain(path))
    assert "Over 39 steps the median norm (of single parameters' gradients) was 21;" in text


def test_a_long_run_is_sampled_evenly(tmp_path):
    norms = torch.where(torch.arange(8193) % 2 == 0, 1.0, 3.0)
    advice = advice_of(tmp_path / "run.keel", norms)
    assert advice.steps == 8193
    assert advice.quantiles[0.9].value == 1  # each second step, from the first on


def test_the_distribution_in_words(tmp_path):
    norms = torch.tensor([2.0, 3.0, 3.0, 6.0]).repeat_interleave(300)
    text = str(explain(write(tmp_path / "run.keel", norms, bound=1.0)))
    assert "Over 1,200 steps the median norm was 3; 90% below 6 and 99% below 6, before clipping." in text
    assert "Its level in the last quarter is 3 [3, 3] times that in the first (95% interval)." in text
    head, live = (line.split("  ") for line in text.splitlines() if line.strip().startswith(("bound", "1  ")))
    assert [cell.strip() for cell in head if cell] == [
        "bound", "which", "clipped", "mean coefficient", "coefficients 5%-95%", "effective lr",
    ]  # fmt: skip
    cells = [cell.strip() for cell in live if cell.strip()]
    assert cells[:3] == ["1", "live", "100.0% [100.0%, 100.0%]"]
    assert cells[4] == "0.167 to 0.5"
    mean = (1 / 2 + 2 / 3 + 1 / 6) / 4
    assert cells[3].startswith(f"{mean:.3g} [")
    assert cells[5].startswith("0.0333 [")  # a tenth, times a third


def test_under_adam_the_table_has_no_effective_rate(tmp_path):
    assert (
        "effective lr"
        not in str(explain(write(tmp_path / "run.keel", lognormal(60), optimizer="Adam")))
        .split("bound  ")[1]
        .splitlines()[0]
    )
