"""Steps that are not made: which count, what each mode of ``nonfinite`` does, and tiny norms that are none of these."""

import math
import warnings

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel import policies as gp

SKIPPED = "ignore::gradkeel.errors.SkippedStepWarning"


def guarded(policy, *, count=1, **arguments):
    """A guard over ``count`` parameters of two entries under SGD, and a function that makes a step on gradients."""
    parameters = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(count)]
    guard = gk.attach(torch.optim.SGD(parameters, lr=1.0), policy, **arguments)

    def step(*gradients):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        guard.optimizer.step()
        return guard.report

    return parameters, guard, step


GOOD, NAN, INF = [3.0, 4.0], [math.nan, 1.0], [math.inf, 1.0]


# -- gradients in a buffer of the loop's ------------------------------------------------------------------------------


def views(parameters, flat):
    """Each gradient is a part of the buffer, as in Megatron's and fairseq's loops."""
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return parameters


def contiguous(parameters, flat):
    """The optimizer has one parameter, of which the model's are parts, as in contiguous_pytorch_params."""
    whole = torch.cat([p.detach().flatten() for p in views(parameters, flat)])
    for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    whole.grad = flat
    return [whole]


@pytest.mark.filterwarnings(SKIPPED)
@pytest.mark.parametrize("hold", [views, contiguous])
@pytest.mark.parametrize("bad", [[], [0], [3, 4]])
def test_a_loop_that_clears_its_own_buffer_goes_on_after_a_skip(hold, bad):
    torch.manual_seed(0)
    model, flat, data = nn.Linear(4, 1), torch.zeros(5), torch.randn(8, 4)
    guard = gk.attach(torch.optim.SGD(hold(list(model.parameters()), flat), lr=0.0), None)
    norms = []
    for step in range(8):
        flat.zero_()
        (model(data).square().mean() * (math.nan if step in bad else 1.0)).backward()
        guard.optimizer.step()
        assert guard.report.stepped == (step not in bad)
        norms.append(guard.report.norm)
        assert (flat == 0.0).all() == (step in bad)
    wanted = pytest.approx(float(flat.double().norm()), rel=1e-6)  # float32
    assert [norm for norm in norms if math.isfinite(norm)] == [wanted] * (8 - len(bad))


# -- too many in a row --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(SKIPPED)
@pytest.mark.parametrize("limit", [1, 3])
def test_exactly_as_many_skips_in_a_row_as_are_allowed(limit):
    _, guard, step = guarded(None, max_consecutive_skips=limit)
    for _ in range(limit):
        assert not step(NAN).stepped
    assert guard.state_dict()["consecutive_skips"] == limit
    with pytest.raises(
        gk.TooManySkipsError, match=f"more steps in a row than max_consecutive_skips={limit} had"
    ):
        step(NAN)


@pytest.mark.filterwarnings(SKIPPED)
def test_after_a_caught_error_the_count_starts_afresh():
    """Whoever catches it and goes on has the whole allowance again, and hears only of the skips since."""
    (parameter,), guard, step = guarded(None, max_consecutive_skips=2)
    for _ in range(2):
        step(NAN)
    with pytest.raises(gk.TooManySkipsError, match="step 3"):
        step(NAN)
    # The step that raised was none: neither counted as a step nor as a skip.
    assert (guard.step, guard.report.step, guard.state_dict()["consecutive_skips"]) == (2, 2, 0)
    for number in (3, 4):
        report = step(INF)
        assert (report.step, report.stepped) == (number, False)
    assert guard.state_dict()["consecutive_skips"] == 2
    with pytest.raises(gk.TooManySkipsError) as error:
        step(INF)
    assert str(error.value).count("is not finite") == 3
    assert "NaN" not in str(error.value)
    assert step(GOOD).stepped
    assert (guard.step, parameter.tolist()) == (5, [-3.0, -4.0])
    assert guard.state_dict()["consecutive_skips"] == 0


@pytest.mark.filterwarnings(SKIPPED)
def test_a_step_without_gradients_and_one_that_the_policy_skips_leave_the_count_as_it_is():
    """Neither shows that training has recovered, and neither is a sign that it has not."""
    policy = gp.Clip("global", gp.Constant(10.0), gp.SkipAbove())
    parameters, guard, step = guarded(policy, max_consecutive_skips=2)
    step(NAN)
    assert step([30.0, 40.0]).reason == "the policy asked to skip this step"
    parameters[0].grad = None
    guard.optimizer.step()
    assert guard.report.reason == "no parameter has a gradient"
    assert guard.state_dict()["consecutive_skips"] == 1
    step(NAN)
    with pytest.raises(gk.TooManySkipsError) as error:
        step(NAN)
    assert [f"step {number}:" in str(error.value) for number in range(1, 6)] == [
        True,
        False,
        False,
        True,
        True,
    ]


def test_the_warning_comes_once_and_says_that_nothing_has_changed():
    _, _, step = guarded(None)
    words = (
        r"^step 1: the gradient of '0' is not finite \(NaN\); the step was skipped, and parameters and optimizer "
        r"state are unchanged \(later skips are silent: see guard.report.reason\)$"
    )
    with pytest.warns(gk.errors.SkippedStepWarning, match=words):
        step(NAN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(GOOD)
        step(NAN)


# -- a policy that asks to skip, whatever the mode ------------------------------------------------------------------


ABOVE = gp.Clip("tensor", gp.Constant(10.0), gp.SkipAbove())


@pytest.mark.parametrize("bad", [NAN, INF])
def test_keep_steps_on_what_is_not_finite_although_the_policy_could_skip(bad):
    """A norm that is not finite is no norm above the bound: only the mode decides on it."""
    parameters, guard, step = guarded(ABOVE, count=2, nonfinite="keep", max_consecutive_skips=1)
    for _ in range(3):
        report = step(GOOD, bad)
        assert (report.stepped, report.reason) == (True, None)
    assert parameters[0].tolist() == [-9.0, -12.0]
    assert guard.state_dict()["consecutive_skips"] == 0


@pytest.mark.parametrize("other", [GOOD, NAN, INF])
def test_under_keep_a_skip_is_always_the_policys(other):
    """Beside a norm above the bound, one that is not finite is no reason: keep would have stepped on it."""
    parameters, guard, step = guarded(ABOVE, count=2, nonfinite="keep", max_consecutive_skips=1)
    for _ in range(3):
        report = step([30.0, 40.0], other)
        assert (report.stepped, report.reason) == (False, "the policy asked to skip this step")
        assert (report.clipped, report.coefficient) == (False, 1.0)
    assert [parameter.tolist() for parameter in parameters] == [[0.0, 0.0]] * 2
    assert [parameter.grad for parameter in parameters] == [None, None]
    assert guard.state_dict()["consecutive_skips"] == 0


@pytest.mark.parametrize("mode", ["skip", "raise", "keep"])
def test_a_skip_that_the_policy_asks_for_is_the_same_in_every_mode(mode):
    parameters, guard, step = guarded(ABOVE, count=2, nonfinite=mode)
    assert step(GOOD, GOOD).stepped
    assert step([30.0, 40.0], GOOD).reason == "the policy asked to skip this step"
    assert step([6.0, 8.0], GOOD).stepped  # at the bound is not above it
    assert parameters[0].tolist() == [-9.0, -12.0]
    assert (guard.step, guard.state_dict()["consecutive_skips"]) == (3, 0)


def test_a_gradient_that_is_not_finite_comes_before_what_the_policy_asks():
    _, guard, step = guarded(ABOVE, count=2)
    with pytest.warns(gk.errors.SkippedStepWarning, match="'1' is not finite"):
        report = step([30.0, 40.0], NAN)
    assert report.reason == "step 1: the gradient of '1' is not finite (NaN)"
    assert guard.state_dict()["consecutive_skips"] == 1


@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
@pytest.mark.filterwarnings(SKIPPED)
def test_a_skipped_outlier_is_learned_and_a_broken_one_is_not(nonfinite):
    policy = gp.Clip("tensor", gp.QuantileClip(0.5).parts.bound, gp.SkipAbove())
    _, guard, step = guarded(policy, count=2, nonfinite=nonfinite)
    step(GOOD, GOOD)
    step([30.0, 40.0], GOOD)
    learned = guard.state_dict()["states"]["main"]["quantile"].tolist()
    assert not guard.report.stepped
    assert learned[0] > 5.0
    step([300.0, 400.0], NAN)
    assert guard.state_dict()["states"]["main"]["quantile"].tolist() == learned


# -- tiny norms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("switch", ["on", "off"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (1e-30, torch.float32),  # its square is none that float32 has
        (1e-40, torch.float32),
        (1e-30, torch.bfloat16),
        (6e-8, torch.float16),
        (1e-200, torch.float64),
        (1e-310, torch.float64),
        (1e30, torch.float32),
        (1e200, torch.float64),
    ],
)
@pytest.mark.parametrize("size", [4, 8192])
def test_a_tiny_or_huge_norm_is_a_norm_with_and_without_native_kernels(value, dtype, size, switch, found):
    found.setenv("GRADKEEL_NATIVE", switch)
    parameter = nn.Parameter(torch.zeros(size, dtype=dtype))
    parameter.grad = torch.full_like(parameter, value)
    true = parameter.grad[0].double().item() * math.sqrt(size)
    guard = gk.attach(torch.optim.SGD([parameter], lr=1.0), gk.ClipByNorm(true / 2 if true > 1e-300 else 1.0))
    guard.optimizer.step()
    # Blocks of 4096 are summed in float32, with an error that grows with the root of their size at most.
    assert guard.report.norm == pytest.approx(true, rel=1e-5)
    assert guard.report.stepped
    if true > 1e-300:
        assert guard.report.clipped
        half = torch.tensor(true / 2 / math.sqrt(size), dtype=torch.float64).to(dtype)
        # One rounding; below the smallest normal number its place is fixed.
        kind = torch.finfo(dtype)
        torch.testing.assert_close(
            parameter.grad[0], half, rtol=2 * kind.eps, atol=kind.smallest_normal * kind.eps
        )
