"""What a report says of a step, and when it reads it."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import gradkeel as gk
import reference
from gradkeel.guard import SkipReason
from optimizers import CASES


def guarded(policy, *gradients, make=torch.optim.SGD, **arguments):
    """A guard after one step on these gradients."""
    parameters = [nn.Parameter(torch.ones(len(g) if g is not None else 2)) for g in gradients]
    guard = gk.attach(make(parameters, lr=0.1), policy, **arguments)
    give(guard, *gradients)
    guard.optimizer.step()
    return guard


def give(guard, *gradients):
    for parameter, gradient in zip(guard.parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient)


def test_before_the_first_step():
    guard = gk.attach(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), gk.ClipByGlobalNorm(1.0))
    report = guard.report
    assert (report.step, report.stepped, report.reason, report.norm) == (0, False, "no step yet", 0.0)
    assert (report.coefficient, report.clipped, report.norms) == (1.0, False, {})
    assert "no step yet" in repr(report)


def test_a_clipped_step():
    guard = guarded("global-norm:1.0", [3.0, 0.0], [0.0, 4.0], None)
    report = guard.report
    assert (report.step, report.norm_type, report.norm) == (1, 2.0, 5.0)
    assert report.clipped_norm == pytest.approx(1.0, rel=1e-12)
    assert report.coefficient == pytest.approx(0.2, rel=1e-12)
    assert (report.clipped, report.stepped, report.reason) == (True, True, None)
    assert report.norms == {"0": 3.0, "1": 4.0}
    assert repr(report) == "StepReport(step 1, 2-norm 5 -> 1, coefficient 0.2, clipped, stepped)"


def test_a_step_below_the_bound():
    report = guarded("global-norm:10.0", [3.0, 4.0]).report
    assert (report.norm, report.clipped_norm, report.coefficient, report.clipped) == (5.0, 5.0, 1.0, False)
    assert repr(report) == "StepReport(step 1, 2-norm 5, coefficient 1, not clipped, stepped)"


def test_each_tensor_has_its_coefficient():
    report = guarded("norm:1.0", [3.0, 4.0], [0.6, 0.0]).report
    (main, _) = report.selections
    assert main.coefficients == {"0": pytest.approx(0.2), "1": 1.0}
    assert report.coefficient == pytest.approx(0.2)
    assert report.clipped_norm == pytest.approx(reference.norm([torch.tensor([1.0, 0.6])]), rel=1e-6)
    assert main.outcome.bound() == 1.0


def test_the_norm_type_is_named():
    report = guarded("global-norm:1.0,norm_type=inf", [3.0, 4.0]).report
    assert (report.norm_type, report.norm) == (math.inf, 4.0)
    assert "inf-norm 4 -> 1" in repr(report)
    # excluded parameters are measured in the same norm
    assert report.selections[-1].measured.norm_type == math.inf


def test_the_last_report_stays_and_old_ones_keep_their_numbers():
    guard = guarded("global-norm:1.0", [3.0, 4.0])
    first = guard.report
    give(guard, [6.0, 8.0])
    guard.optimizer.step()
    assert (first.step, first.norm, guard.report.step, guard.report.norm) == (1, 5.0, 2, 10.0)


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_a_skipped_step():
    report = guarded("norm:1.0", [30.0, 40.0], [math.nan, 1.0]).report
    assert (report.stepped, report.clipped, report.coefficient) == (False, False, 1.0)
    assert report.norms["0"] == 50.0
    assert math.isnan(report.norm)
    assert "SKIPPED: step 1: the gradient of '1' is not finite (NaN)" in repr(report)


def test_as_html_for_notebooks():
    html = guarded("norm:1.0", [3.0, 4.0]).report._repr_html_()
    assert "<td>0</td><td>5</td>" in html


# -- the norm after a value or unit clip ------------------------------------------------------------------------


def test_value_clips_measure_what_is_left_when_it_is_read():
    guard = guarded("value:1.0", [3.0, 0.5])
    assert guard.report.clipped
    assert guard.report.clipped_norm == pytest.approx(math.hypot(1.0, 0.5), rel=1e-7)
    give(guard, [0.3, 0.4])
    guard.optimizer.step()
    assert not guard.report.clipped
    assert guard.report.clipped_norm == guard.report.norm == pytest.approx(0.5, rel=1e-6)


def test_value_clips_do_not_measure_what_has_changed_since():
    guard = guarded("value:1.0", [3.0, 0.5])
    guard.parameters[0].grad.zero_()
    assert guard.report.clipped_norm is None
    guard = guarded("value:1.0", [3.0, 0.5])
    guard.optimizer.zero_grad()
    assert guard.report.clipped_norm is None
    assert "2-norm" in repr(guard.report)
    guard = guarded("value:1.0", [0.3, 0.5])
    guard.optimizer.zero_grad()
    assert guard.report.clipped_norm == guard.report.norm


def test_value_clips_with_one_sided_limits():
    assert guarded("value:-0.5,1", [-0.4, 0.9]).report.clipped is False
    assert guarded("value:-0.5,1", [-0.6, 0.9]).report.clipped is True
    assert guarded("value:-0.5,1", [-0.4, 1.1]).report.clipped_norm == pytest.approx(math.hypot(0.4, 1.0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_norm_after_a_value_clip_is_right_or_none_under_every_optimizer(case):
    model, loss = case.problem()
    optimizer = case.make(list(model.parameters()))
    guard = gk.attach(optimizer, "value:0.05", model=model)
    clamped = []
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: clamped.append(
            reference.norm([p.grad for p in model.parameters() if p.grad is not None])
        )
    )
    case.step(optimizer, lambda: loss(0))
    assert guard.report.clipped
    if not case.closure:
        assert guard.report.clipped_norm in (None, pytest.approx(clamped[0], rel=2e-6))


def test_unit_clips_know_the_norm_after():
    parameter = nn.Parameter(torch.ones(2, 2))
    guard = gk.attach(torch.optim.SGD([parameter], lr=0.1), "agc:0.01")
    parameter.grad = torch.tensor([[3.0, 4.0], [0.001, 0.0]])
    guard.optimizer.step()
    left = reference.norm([parameter.grad])
    guard.optimizer.zero_grad()
    assert guard.report.clipped_norm == pytest.approx(left, rel=1e-6)
    # a unit of weights (1, 1) may have a gradient of 0.01 times its norm
    assert guard.report.coefficient == pytest.approx(0.01 * 2**0.5 / 5, rel=1e-6)


@pytest.mark.parametrize("policy", ["global-norm:1.0", "norm:1.0", "value:1.0", "agc:0.01", "smooth:1.0"])
def test_what_is_excluded_keeps_the_coefficient_one_under_a_clip(policy):
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(3))]
    guard = gk.attach(torch.optim.SGD(parameters, lr=0.1), policy, exclude=parameters[1:])
    give(guard, [30.0, 40.0], [[30.0, 40.0], [0.0, 0.0]], [0.0, 0.0, 60.0])
    guard.optimizer.step()
    main, excluded = guard.report.selections
    assert main.clipped
    assert excluded.coefficients == {"1": 1.0, "2": 1.0}
    assert (excluded.coefficient, excluded.clipped, excluded.outcome.bound()) == (1.0, False, None)
    assert excluded.norm == excluded.clipped_norm == pytest.approx(math.hypot(50.0, 60.0), rel=1e-12)
    assert parameters[1].grad.tolist() == [[30.0, 40.0], [0.0, 0.0]]
    assert set(main.coefficients) == {"0"}


def test_the_smallest_coefficient_stands_for_units_and_tensors_together():
    """Under a chain both kinds multiply; the report names the product for each parameter."""
    parameters = [nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))]
    guard = gk.attach(torch.optim.SGD(parameters, lr=0.1), "agc:1.0+norm:0.5")
    give(guard, [[3.0, 4.0], [0.6, 0.8]], [0.0, 0.25])
    guard.optimizer.step()
    (main, _) = guard.report.selections
    unit = math.sqrt(2) / 5  # weights (1, 1) against a gradient of norm 5; the other row is below its bound
    tensor = 0.5 / math.sqrt(2 + 1)
    assert main.coefficients == {"0": pytest.approx(unit * tensor, rel=1e-6), "1": 1.0}
    assert main.coefficient == pytest.approx(unit * tensor, rel=1e-6)
    assert main.clipped_norm == pytest.approx(math.hypot(0.5, 0.25), rel=1e-6)
    assert main.outcome.bound().item() == 0.5
    assert repr(main).startswith("main: Chain(")
    assert repr(main).endswith(f"norm {main.norm:.6g}, coefficient {main.coefficient:.6g}, 2 parameters")


@pytest.mark.parametrize(("policy", "bound"), [("value:-0.5,1", 1.0), ("norm:2.0", 2.0), ("none", None)])
def test_the_bound_that_was_in_force_is_told(policy, bound):
    (main, excluded) = guarded(policy, [3.0, 4.0]).report.selections
    assert main.outcome.bound() == bound
    assert excluded.outcome.bound() is None


def test_growth_is_no_clip():
    report = guarded("normalize:10.0", [3.0, 4.0]).report
    assert (report.clipped, report.coefficient) == (False, 2.0)
    assert report.clipped_norm == pytest.approx(10.0, rel=1e-12)
    assert repr(report) == "StepReport(step 1, 2-norm 5, coefficient 2, not clipped, stepped)"


# -- lazily --------------------------------------------------------------------------------------------------------


def test_tensors_of_a_report_are_on_the_device_and_in_float64():
    report = guarded("norm:1.0", [3.0, 4.0]).report
    main = report.selections[0]
    for tensor in (
        main.measured.norms,
        main.measured.total,
        main.outcome.coefficients(),
        main.clipped_total(),
    ):
        assert tensor.dtype == torch.float64
        assert tensor.device == main.measured.norms.device
    assert main.outcome.is_clipped().dtype == torch.bool
    assert report.stepped_tensor().item() is True
    assert report.stepped_or_pending is True


def test_no_gradient_no_row():
    assert guarded(None, [3.0, 4.0], None).report.norms == {"0": 5.0}


@pytest.mark.parametrize("policy", ["value:1.0", "norm:1.0", "agc", "zclip", "none"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda report: pickle.loads(pickle.dumps(report))])
def test_a_copy_or_pickle_tells_the_same(policy, again):
    report = guarded(policy, [3.0, 4.0]).report
    copied = again(report)
    assert (copied.step, copied.norm, copied.norms, copied.coefficient) == (
        1,
        5.0,
        {"0": 5.0},
        report.coefficient,
    )
    assert (copied.clipped, copied.stepped, copied.reason) == (report.clipped, True, None)


@pytest.mark.parametrize(("why", "without_place", "with_place"), [
    (SkipReason.NONFINITE, "step 7: a gradient is not finite", "PLACE"),
    (SkipReason.LOSS_SCALE, "step 7: the loss scale overflowed", "step 7: the loss scale overflowed (PLACE)"),
    (SkipReason.NO_GRADIENT, "no parameter has a gradient", "no parameter has a gradient"),
    (SkipReason.EMPTY_WINDOW, "the window's weight is zero", "the window's weight is zero"),
    (SkipReason.POLICY, "the policy asked to skip this step", "the policy asked to skip this step"),
])  # fmt: skip
def test_the_words_of_every_reason(why, without_place, with_place):
    assert why.words(7) == without_place
    assert why.words(7, "PLACE") == with_place
    assert SkipReason.of_words(without_place) is why


@pytest.mark.parametrize(("value", "kind"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "inf")])
def test_the_gradient_where_non_finite_begins_is_named_with_its_kind(value, kind):
    guard = guarded("global-norm:1.0", [math.nan], [value], [1.0], nonfinite="keep")
    assert guard.report.skip_reason is None  # the step was made
    assert guard.report.nonfinite_reason() == f"step 1: the gradient of '1' is not finite ({kind})"


@pytest.mark.parametrize("policy", ["value:0.5", "agc:0.1", "global-norm:1.0"])
def test_a_default_device_does_not_say_where_a_norm_is(policy):
    parameter = nn.Parameter(torch.ones(4))
    guard = gk.attach(torch.optim.SGD([parameter], lr=0.1), policy)
    parameter.grad = torch.ones(4)
    with torch.device("meta"):
        guard.optimizer.step()
        assert guard.report.clipped_norm == pytest.approx(float(torch.linalg.vector_norm(parameter.grad)))
        assert guard.report.stepped_tensor().is_cpu
