"""A guarded step: what is read and written, what is skipped, what is committed, what the guard remembers."""

import io
import math
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradkeel as gk
from gradkeel.kernels import native
from gradkeel.norms import Decision, Needs
from gradkeel.policies import Policy
from optimizers import contents, is_same


def parameters_of(*gradients, dtype=torch.float32):
    """Parameters of zeros with these gradients; None for one without."""
    given = [None if g is None else torch.as_tensor(g, dtype=dtype) for g in gradients]
    parameters = [nn.Parameter(torch.zeros_like(g) if g is not None else torch.zeros(2)) for g in given]
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient
    return parameters


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1.0)


def give(parameters, *gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else torch.tensor(gradient, dtype=parameter.dtype)


@dataclass(frozen=True)
class Counting(Policy):
    """Remembers how many steps it has decided on and how many of them were made real, and may ask to skip."""

    skip: bool = False

    @property
    def needs(self):
        return Needs()

    @property
    def spec(self):
        return "counting"

    def init(self, norms):
        return {"seen": torch.zeros_like(norms.total), "last": torch.zeros_like(norms.total)}

    def decide(self, norms, state):
        skip = torch.tensor(self.skip)
        return Decision(skip=skip), {"seen": state["seen"] + 1, "last": norms.total}


# -- reading and writing --------------------------------------------------------------------------------------


class Gradients(TorchDispatchMode):
    """Counts, by operator, how often gradients are read and written."""

    def __init__(self, parameters):
        super().__init__()
        self.memory = {p.grad.untyped_storage().data_ptr() for p in parameters}
        self.read, self.written = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for argument, declared in zip(args, function._schema.arguments, strict=False):
            for tensor in argument if isinstance(argument, list | tuple) else [argument]:
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self.memory:
                    written = declared.alias_info is not None and declared.alias_info.is_write
                    (self.written if written else self.read).append(str(function))
        return function(*args, **(kwargs or {}))


VIEWS = {
    "aten.detach.default",
    "aten.view.default",
    "aten.alias.default",
    "aten.slice.Tensor",
    "aten.t.default",
}


def traffic(policy, *, fused, large=False):
    parameters = parameters_of([3.0, 4.0], [[1.0, 2.0]])
    if large:  # longer than a block
        parameters += parameters_of(torch.ones(3 * 4096 + 5))
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused, foreach=not fused)
    gk.attach(optimizer, policy)
    mode = Gradients(parameters)
    steps = []

    def at_the_optimizers_own_step(optimizer, args, kwargs):
        steps.append((list(mode.read), list(mode.written)))

    optimizer.register_step_pre_hook(at_the_optimizers_own_step)
    # The mode sees torch's operations; the native kernels work on the memory behind them.
    with mode, pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "kernels", lambda: None)
        optimizer.step()
    (read, written), *_ = steps
    return [name for name in read if name not in VIEWS], written


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("policy", ["none", "global-norm:1e6", "norm:1e6", "value:1e6"])
def test_an_inactive_clip_writes_nothing(policy, fused):
    _, written = traffic(policy, fused=fused, large=True)
    assert written == []


@pytest.mark.parametrize("policy", ["none", "global-norm:1e6", "norm:1e6", "global-norm:1.0"])
def test_each_gradient_is_read_once(policy):
    read, _ = traffic(policy, fused=False)
    assert len(read) == 2  # one multi-tensor call over two gradients
    assert len(set(read)) == 1


def test_an_active_clip_writes_each_gradient_once():
    _, written = traffic("global-norm:1.0", fused=False)
    assert len(written) == 2
    assert len(set(written)) == 1


def test_an_active_clip_writes_nothing_where_it_is_folded():
    _, written = traffic("global-norm:1.0", fused=True)
    assert written == []


def test_only_the_tensors_above_their_bound_are_written():
    parameters = parameters_of([3.0, 4.0], [0.3, 0.4])
    optimizer = sgd(parameters)
    gk.attach(optimizer, gk.ClipByNorm(1.0))
    versions = [p.grad._version for p in parameters]
    optimizer.step()
    assert [p.grad._version - before for p, before in zip(parameters, versions, strict=True)] == [1, 0]


# -- numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("global-norm:1.0", (0.0089884, 0.9999596)),
        ("norm:1.0", (0.0089884, 0.9999596)),
        ("value:1.0", (0.8, 1.0)),
        ("value:-0.5,0.9", (0.8, 0.9)),
        ("global-norm:89.0036", (0.8, 89.0)),
        ("none", (0.8, 89.0)),
    ],
)
def test_the_classic_example(policy, wanted):
    (parameter,) = parameters_of([0.8, 89.0])
    guard = gk.attach(sgd([parameter]), policy)
    guard.optimizer.step()
    # the digits given
    assert parameter.grad.tolist() == pytest.approx(wanted, abs=5e-8, rel=1e-6)
    assert guard.report.norm == pytest.approx(89.0036, abs=5e-5)


@pytest.mark.parametrize("policy", ["global-norm:5.0", "norm:5.0", "value:4.0"])
def test_a_norm_at_the_bound_is_left_bit_identical(policy):
    (parameter,) = parameters_of([3.0, 4.0])
    guard = gk.attach(sgd([parameter]), policy)
    version = parameter.grad._version
    guard.optimizer.step()
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert parameter.grad._version == version
    assert not guard.report.clipped
    assert guard.report.coefficient == 1.0


def test_value_clip_maps_minus_four_to_minus_one():
    (parameter,) = parameters_of([-4.0, 3.0, 0.5])
    gk.attach(sgd([parameter]), gk.ClipByValue(1.0)).optimizer.step()
    assert parameter.grad.tolist() == [-1.0, 1.0, 0.5]


def test_the_blow_up_of_the_tutorial():
    net = nn.Linear(1, 1)
    with torch.no_grad():
        net.weight.fill_(1.0)
        net.bias.fill_(0.0)
    guard = gk.attach(torch.optim.SGD(net.named_parameters(), lr=0.1), None)
    (net(torch.tensor([[10.0]])) - 4.0).square().sum().backward()
    guard.optimizer.step()
    assert guard.report.norms == {"weight": 120.0, "bias": 12.0}


def test_mixed_dtypes_make_one_norm():
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
    parameters = [nn.Parameter(torch.zeros(4, dtype=dtype)) for dtype in dtypes]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 3.0)
    guard = gk.attach(sgd(parameters), gk.ClipByGlobalNorm(1.0))
    guard.optimizer.step()
    assert guard.report.norm == pytest.approx(3.0 * 20**0.5, rel=1e-12)
    for parameter in parameters:
        # one rounding to the dtype
        eps = torch.finfo(parameter.dtype).eps
        assert parameter.grad[0].real.item() == pytest.approx(1 / 20**0.5, rel=eps)


def test_scalars_empty_tensors_and_missing_gradients():
    parameters = parameters_of(3.0, torch.zeros(0, 5), None, [4.0])
    guard = gk.attach(sgd(parameters), gk.ClipByGlobalNorm(1.0))
    guard.optimizer.step()
    assert guard.report.norm == pytest.approx(5.0)
    assert parameters[0].grad.item() == pytest.approx(0.6)
    assert parameters[2].grad is None
    assert guard.report.norms == {"0": 3.0, "1": 0.0, "3": 4.0}


def test_an_optimizer_of_nothing_but_frozen_parameters_steps_in_peace():
    parameters = [nn.Parameter(torch.ones(2), requires_grad=False)]
    guard = gk.attach(sgd(parameters), gk.ClipByGlobalNorm(1.0))
    guard.optimizer.step()
    assert (guard.report.stepped, guard.report.reason) == (False, "no parameter has a gradient")
    assert guard.report.norm == 0.0


# -- what is not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "kind"), [(math.nan, "NaN"), (math.inf, "inf"), (-math.inf, "inf")])
@pytest.mark.parametrize(
    "policy", ["global-norm:1.0", "norm:1.0", "value:1.0", "global-norm:1.0,norm_type=inf", "none"]
)
def test_a_skip_names_the_parameter_and_the_kind(policy, bad, kind):
    parameters = parameters_of([1.0, 2.0], [bad, 1.0])
    guard = gk.attach(sgd(parameters), policy)
    with pytest.warns(
        gk.errors.SkippedStepWarning, match=rf"step 1: the gradient of '1' is not finite \({kind}\)"
    ):
        guard.optimizer.step()
    assert guard.report.reason == f"step 1: the gradient of '1' is not finite ({kind})"
    assert [p.tolist() for p in parameters] == [[0.0, 0.0], [0.0, 0.0]]
    assert [p.grad for p in parameters] == [None, None]
    assert not guard.report.clipped
    assert guard.report.coefficient == 1.0


def test_skips_after_the_first_are_silent():
    (parameter,) = parameters_of([math.nan, 0.0])
    guard = gk.attach(sgd([parameter]), "none")
    with pytest.warns(gk.errors.SkippedStepWarning):
        guard.optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        give([parameter], [math.inf, 0.0])
        guard.optimizer.step()
    assert guard.report.reason == "step 2: the gradient of '0' is not finite (inf)"


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_too_many_skips_in_a_row_raise_with_their_history():
    (parameter,) = parameters_of([0.0, 0.0])
    guard = gk.attach(sgd([parameter]), "none", max_consecutive_skips=2)
    # a good step in between starts the count afresh
    for bad in (math.nan, math.inf, 1.0, math.nan, math.inf):
        give([parameter], [bad, 0.0])
        guard.optimizer.step()
    before = parameter.clone()
    give([parameter], [math.nan, 0.0])
    with pytest.raises(gk.TooManySkipsError) as error:
        guard.optimizer.step()
    assert "more steps in a row than max_consecutive_skips=2" in str(error.value)
    for line in ("step 4: the gradient of '0' is not finite (NaN)", "step 5: the", "(inf)", "step 6: the"):
        assert line in str(error.value)
    assert "step 2" not in str(error.value)
    assert torch.equal(parameter, before)


def test_raise_modifies_nothing():
    parameters = parameters_of([30.0, 40.0], [math.inf, 1.0])
    guard = gk.attach(sgd(parameters), gk.ClipByGlobalNorm(1.0), nonfinite="raise")
    with pytest.raises(
        gk.NonFiniteGradientError, match=r"the gradient of '1' is not finite \(inf\); nothing has"
    ):
        guard.optimizer.step()
    assert [p.tolist() for p in parameters] == [[0.0, 0.0], [0.0, 0.0]]
    assert [p.grad.tolist() for p in parameters] == [[30.0, 40.0], [math.inf, 1.0]]
    give(parameters, [3.0, 4.0], [0.0, 0.0])
    guard.optimizer.step()
    assert guard.report.step == 1
    assert guard.report.stepped


def test_keep_steps_and_clips_what_is_finite():
    parameters = parameters_of([30.0, 40.0], [math.nan, 1.0])
    guard = gk.attach(sgd(parameters), gk.ClipByNorm(1.0), nonfinite="keep")
    guard.optimizer.step()
    assert parameters[0].tolist() == pytest.approx([-0.6, -0.8])
    assert [math.isnan(x) for x in parameters[1].tolist()] == [True, False]
    assert guard.report.stepped
    assert guard.report.reason is None


# -- a policy's state -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("nonfinite", ["skip", "keep"])
def test_only_finite_steps_enter_a_policys_state(nonfinite):
    (parameter,) = parameters_of([3.0, 4.0])
    guard = gk.attach(sgd([parameter]), Counting(), nonfinite=nonfinite)
    guard.optimizer.step()
    before = guard.state_dict()["states"]["main"]
    assert {key: value.item() for key, value in before.items()} == {"seen": 1.0, "last": 5.0}
    for bad in (math.nan, math.inf, -math.inf):
        give([parameter], [bad, 1.0])
        guard.optimizer.step()
    assert is_same(guard.state_dict()["states"]["main"], before)
    give([parameter], None)
    guard.optimizer.step()
    assert is_same(guard.state_dict()["states"]["main"], before)


def test_a_nonfinite_excluded_gradient_leaves_the_main_policys_state_alone():
    parameters = parameters_of([3.0, 4.0], [math.nan])
    guard = gk.attach(sgd(parameters), Counting(), exclude=parameters[1])
    before = guard.state_dict()["states"]
    with pytest.warns(gk.errors.SkippedStepWarning):
        guard.optimizer.step()
    assert guard.state_dict()["states"] == before


def test_a_step_that_raises_commits_nothing():
    (parameter,) = parameters_of([3.0, 4.0])
    optimizer = sgd([parameter])
    guard = gk.attach(optimizer, Counting())

    def refuse(optimizer, args, kwargs):
        raise OSError("no")

    handle = optimizer.register_step_pre_hook(refuse)
    with pytest.raises(OSError, match="no"):
        optimizer.step()
    assert (guard.step, guard.report.step, guard.state_dict()["states"]["main"]["seen"]) == (0, 0, 0)
    handle.remove()
    optimizer.step()
    assert (guard.step, guard.report.step) == (1, 1)
    assert guard.state_dict()["states"]["main"]["seen"] == 1


def test_a_policy_may_ask_to_skip():
    (parameter,) = parameters_of([3.0, 4.0])
    guard = gk.attach(sgd([parameter]), Counting(skip=True), max_consecutive_skips=1)
    for _ in range(3):  # asked for, so neither warned of nor counted
        give([parameter], [3.0, 4.0])
        guard.optimizer.step()
    assert (guard.report.stepped, guard.report.reason) == (False, "the policy asked to skip this step")
    assert parameter.tolist() == [0.0, 0.0]
    assert guard.state_dict()["states"]["main"]["seen"] == 3


# -- what outlives a step -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_state_dict_round_trip_with_weights_only():
    def run(steps, guard, parameter):
        for step in steps:
            give([parameter], [math.nan if step in (4, 5) else float(step), 4.0])
            guard.optimizer.step()

    (parameter,), (other,) = parameters_of([0.0, 0.0]), parameters_of([0.0, 0.0])
    guard = gk.attach(sgd([parameter]), "zclip:warmup=2", max_consecutive_skips=3)
    run(range(6), guard, parameter)
    file = io.BytesIO()
    torch.save({"guard": guard.state_dict(), "parameter": parameter.detach()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    fresh = gk.attach(sgd([other]), "zclip:warmup=2", max_consecutive_skips=3)
    fresh.load_state_dict(saved["guard"])
    other.data.copy_(saved["parameter"])
    assert is_same(fresh.state_dict(), guard.state_dict())
    run(range(6, 9), guard, parameter)
    run(range(6, 9), fresh, other)
    assert torch.equal(parameter, other)
    assert is_same(fresh.state_dict(), guard.state_dict())
    assert fresh.step == 9


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_skips_in_a_row_are_counted_across_a_checkpoint():
    (parameter,) = parameters_of([math.nan, 0.0])
    guard = gk.attach(sgd([parameter]), "none", max_consecutive_skips=1)
    guard.optimizer.step()
    fresh = gk.attach(sgd([parameter]), "none", max_consecutive_skips=1)
    fresh.load_state_dict(guard.state_dict())
    give([parameter], [math.nan, 0.0])
    with pytest.raises(gk.TooManySkipsError):
        fresh.optimizer.step()


def test_a_state_is_a_copy():
    (parameter,) = parameters_of([3.0, 4.0])
    guard = gk.attach(sgd([parameter]), Counting())
    guard.optimizer.step()
    state = guard.state_dict()["states"]["main"]
    state["seen"].fill_(7.0)
    assert guard.state_dict()["states"]["main"]["seen"] == 1.0


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), Counting())
    guard.optimizer.step()
    before = guard.state_dict()
    other = gk.attach(sgd(parameters_of([3.0, 4.0])), gk.ClipByNorm(1.0)).state_dict()
    for state, words in [(other, "state belongs to the policies"), ({**before, "version": 99}, "version 99")]:
        with pytest.raises(gk.CheckpointError, match=words):
            guard.load_state_dict(state)
    assert is_same(guard.state_dict(), before)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_parameter_in_anothers_place_is_followed(in_place):
    """Accelerate puts sharded parameters in the place of whole ones; the groups stay as long as they were."""
    old, kept = parameters_of([3.0, 4.0], [0.0])
    guard = gk.attach(sgd([old, kept]), gk.ClipByGlobalNorm(1.0))
    (new,) = parameters_of([30.0, 40.0])
    group = guard.optimizer.param_groups[0]
    if in_place:
        group["params"][0] = new
    else:
        group["params"] = [new, kept]
    guard.optimizer.step()
    assert (guard.report.norm, guard.report.stepped) == (50.0, True)
    assert new.grad.tolist() == pytest.approx([0.6, 0.8])
    assert old.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("later", [gk.ClipByNorm(1), gk.ClipByNorm(0.5), gk.ClipByGlobalNorm(1.0), None])
def test_a_policy_that_remembers_nothing_may_change_on_resuming(later):
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), gk.ClipByNorm(1.0))
    guard.optimizer.step()
    resumed = gk.attach(sgd(parameters_of([3.0, 4.0])), later)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.step == 1


@pytest.mark.parametrize(
    ("before", "later"), [("zclip", "zclip:z=3"), ("zclip", "norm:1.0"), ("norm:1.0", "zclip")]
)
def test_a_policy_that_remembers_may_not(before, later):
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), before)
    guard.optimizer.step()
    resumed = gk.attach(sgd(parameters_of([3.0, 4.0])), later)
    with pytest.raises(gk.CheckpointError, match="or do not load it"):
        resumed.load_state_dict(guard.state_dict())


def test_a_state_of_other_parameters_is_refused():
    state = gk.attach(sgd(parameters_of([3.0, 4.0], [1.0])), gk.policies.parse("adagc").policy)
    state.optimizer.step()
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), gk.policies.parse("adagc").policy)
    with pytest.raises(gk.CheckpointError, match="parameters"):
        guard.load_state_dict(state.state_dict())


@pytest.mark.parametrize(
    ("policy", "key"), [("autoclip:window=4,warmup=2", "history"), ("zclip", "log_mean")]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_state_that_is_not_finite_where_it_must_be_is_refused(policy, key, bad):
    """Coefficients that followed from it were NaN, and then the parameters."""
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), policy)
    guard.optimizer.step()
    saved = guard.state_dict()
    assert saved["states"]["main"]["held"].isinf().all()  # no bound yet, which is as it should be
    fresh = gk.attach(sgd(parameters_of([3.0, 4.0])), policy)
    before = fresh.state_dict()
    saved["states"]["main"][key].view(-1)[0] = bad
    with pytest.raises(gk.CheckpointError, match=f"'main' holds '{key}' with a NaN or inf.*begin anew"):
        fresh.load_state_dict(saved)
    assert is_same(fresh.state_dict(), before)
    saved["states"]["main"][key].view(-1)[0] = 1.0
    fresh.load_state_dict(saved)


class Ratio(Counting):
    """What it remembers is the user's own business, and may come to be what is no number."""

    def decide(self, norms, state):
        decision, after = super().decide(norms, state)
        return decision, {**after, "last": norms.total / state["last"]}


@pytest.mark.parametrize("policy", [Ratio(), gk.policies.Chain(Ratio(), gk.ClipByNorm(1.0))])
def test_what_a_policy_of_ones_own_remembers_is_taken_back_as_it_was(policy):
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), policy)
    guard.optimizer.step()
    saved = guard.state_dict()
    assert any(value.isinf() for value in saved["states"]["main"].values())
    fresh = gk.attach(sgd(parameters_of([3.0, 4.0])), policy)
    fresh.load_state_dict(saved)
    assert is_same(fresh.state_dict(), saved)


@pytest.mark.parametrize("kind", [int, np.int64, np.array, torch.tensor])
def test_numbers_of_a_checkpoint_may_have_become_arrays_or_tensors(kind):
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), "zclip")
    guard.optimizer.step()
    state = guard.state_dict()
    guard.load_state_dict({**state, "step": kind(7), "consecutive_skips": kind(0)})
    assert (guard.step, type(guard.step)) == (7, int)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_state_of_other_groups_is_refused_and_nothing_is_changed(groups):
    policy = gk.policies.QuantileClip(scope="group")

    def guarded(count):
        parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(6)]
        size = 6 // count
        optimizer = torch.optim.SGD([{"params": parameters[i : i + size]} for i in range(0, 6, size)], lr=0.1)
        guard = gk.attach(optimizer, policy)
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        optimizer.step()
        return guard

    saved, other = guarded(2).state_dict(), guarded(groups)
    before = other.state_dict()
    words = (
        rf"'main' holds 'quantile' of the shape \[2\], and this guard's has \[{groups}\]; attach to the same"
    )
    with pytest.raises(gk.CheckpointError, match=words):
        other.load_state_dict(saved)
    assert (
        other.state_dict()["states"]["main"]["quantile"].tolist()
        == before["states"]["main"]["quantile"].tolist()
    )
    guarded(2).load_state_dict(saved)


def test_what_was_logged_stays_what_it_was_when_the_tensor_changes_before_the_step():
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None)
    loss = model(torch.ones(3)).sum()
    loss.backward()
    running = loss.detach().clone()
    guard.log(running=running)
    running.zero_()
    optimizer.step()
    assert guard.report.scalars["running"] == loss


def test_logged_numbers_are_the_coming_steps():
    (parameter,) = parameters_of([3.0, 4.0])
    guard = gk.attach(sgd([parameter]), None)
    loss = parameter.sum()
    guard.log(loss=loss, lr=0.1)
    guard.optimizer.step()
    assert guard.report.scalars["lr"] == 0.1
    assert not guard.report.scalars["loss"].requires_grad
    give([parameter], [3.0, 4.0])
    guard.optimizer.step()
    assert guard.report.scalars == {}


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0), torch.tensor(1j)])
def test_what_is_no_number_is_not_logged(value):
    guard = gk.attach(sgd(parameters_of([3.0, 4.0])), "skip-step")
    with pytest.raises(ValueError, match=r"guard\.log\(loss=\.\.\.\): wants one real number.*mean"):
        guard.log(loss=value)
    for other in ("low", None, [1.0]):
        with pytest.raises(
            TypeError, match=r"guard\.log\(loss=.*\): wants one real number, not (str|NoneType|list)"
        ):
            guard.log(loss=other)
    guard.log(loss=torch.ones(1, 1))
    guard.optimizer.step()
    assert guard.report.stepped


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("policy", ["global-norm:0.1", "agc", "adagc"])
def test_quantized_weights_may_lie_beside_their_adapters(dtype, policy, tmp_path):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            base = (8 * torch.randn(4, 4)).round()
            self.base = nn.Parameter(base.to(dtype), requires_grad=False)
            self.adapter = nn.Linear(4, 4)

        def forward(self, inputs):
            return inputs @ self.base.float() / 8 + self.adapter(inputs)

    def trained(path, *, whole):
        torch.manual_seed(0)
        model = Adapted()
        optimizer = torch.optim.AdamW(model.parameters() if whole else model.adapter.parameters(), lr=0.1)
        guard = gk.attach(optimizer, policy, model=model, record=path)
        for _ in range(3):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        guard.detach()
        assert gk.explain.explain(path).steps == 3
        return list(model.adapter.parameters())

    # Units are read by other operations where some tensor is not for the kernels: float32's rounding.
    beside, alone = trained(tmp_path / "a.keel", whole=True), trained(tmp_path / "b.keel", whole=False)
    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)


# -- recorders ------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
def test_recorders_hear_of_each_step_skipped_ones_included():
    class Recorder:
        def __init__(self):
            self.heard = []

        def record(self, report):
            self.heard.append((report.step, report.stepped, guard.step))

        def close(self):
            pass

    (parameter,) = parameters_of([3.0, 4.0])
    recorder = Recorder()
    guard = gk.attach(sgd([parameter]), None, record=recorder)
    for gradient in ([3.0, 4.0], [math.nan, 0.0], [3.0, 4.0]):
        give([parameter], gradient)
        guard.optimizer.step()
    assert recorder.heard == [(1, True, 1), (2, False, 2), (3, True, 3)]


@pytest.mark.parametrize("event", ["before_step", "record"])
def test_a_recorder_that_raises_is_dropped_and_training_goes_on(event):
    class Recorder:
        def record(self, report):
            pass

        def close(self):
            pass

    def fail(report):
        raise OSError("no space left")

    (parameter,) = parameters_of([3.0, 4.0])
    recorder = Recorder()
    setattr(recorder, event, fail)
    guard = gk.attach(sgd([parameter]), None, record=recorder)
    give([parameter], [3.0, 4.0])
    with pytest.warns(gk.errors.RecordWarning, match="step 1.*no space left.*training goes on"):
        guard.optimizer.step()
    guard.optimizer.step()
    assert (guard.step, guard.recorders) == (2, [])


# -- closures -------------------------------------------------------------------------------------------------


def test_a_closure_may_be_passed_by_name_or_by_place():
    for call in (lambda o, c: o.step(c), lambda o, c: o.step(closure=c), lambda o, c: o.step(None)):
        (parameter,) = parameters_of([0.0, 0.0])
        guard = gk.attach(sgd([parameter]), gk.ClipByNorm(1.0))

        def closure(parameter=parameter):
            give([parameter], [3.0, 4.0])
            return torch.tensor(7.0)

        if call(guard.optimizer, closure) is None:
            give([parameter], [3.0, 4.0])
            guard.optimizer.step()
        assert parameter.tolist() == pytest.approx([-0.6, -0.8])


@pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")
@pytest.mark.parametrize("bad_evaluation", [1, 2, 4])
def test_lbfgs_is_restored_when_a_later_closure_goes_bad(bad_evaluation):
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    inputs = torch.randn(8, 3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    evaluations = []

    def closure(bad=0):
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        evaluations.append(guard.step)
        if bad and len(evaluations) == bad:
            model.weight.grad.data[0, 0] = math.nan
        return loss

    optimizer.step(closure)
    before = contents(model, optimizer)
    evaluations.clear()
    optimizer.step(lambda: closure(bad_evaluation))
    assert is_same(contents(model, optimizer), before)
    assert guard.step == 2
    assert not guard.report.stepped
    assert "'weight'" in guard.report.reason
    evaluations.clear()
    optimizer.step(closure)
    assert guard.report.stepped
    assert not is_same(contents(model, optimizer), before)


def test_lbfgs_raises_from_a_later_closure_with_everything_restored():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    inputs = torch.randn(8, 3, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
    gk.attach(optimizer, None, nonfinite="raise")
    evaluations = []

    def closure():
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        evaluations.append(1)
        if len(evaluations) == 3:
            model.weight.grad.data[0, 0] = math.inf
        return loss

    before = contents(model, optimizer)
    with pytest.raises(gk.NonFiniteGradientError):
        optimizer.step(closure)
    assert is_same(contents(model, optimizer), before)


@pytest.mark.parametrize("by_name", [False, True])
def test_what_a_step_takes_in_the_closures_place_reaches_it(by_name):
    class Newton(torch.optim.Optimizer):  # as the first AdaHessian: optimizer.step(gradsH)
        def step(self, curvatures, closure=None):
            loss = None if closure is None else closure()
            with torch.no_grad():
                for parameter, curvature in zip(self.param_groups[0]["params"], curvatures, strict=True):
                    parameter.sub_(parameter.grad / curvature)
            return loss

    parameters = parameters_of([0.0, 0.0])
    guard = gk.attach(Newton(parameters, {}), gk.ClipByNorm(1.0))

    def closure():
        give(parameters, [3.0, 4.0])
        return 7.0

    if not by_name:
        closure()
    loss = guard.optimizer.step([torch.tensor(2.0)], **({"closure": closure} if by_name else {}))
    assert loss == (7.0 if by_name else None)
    assert parameters[0].tolist() == pytest.approx([-0.3, -0.4])


def test_an_optimizer_that_differentiates_after_its_closure_is_refused():
    class Searching(torch.optim.Optimizer):  # as torchmin's Minimizer: the closure calls no backward()
        def step(self, closure):
            loss = closure()
            loss.backward()

    (parameter,) = parameters_of(None)
    optimizer = Searching([parameter], {})
    guard = gk.attach(optimizer, gk.ClipByNorm(1.0))
    with pytest.raises(gk.AttachError, match=r"Searching\.step.*no gradient.*detach\(\)"):
        optimizer.step(lambda: (parameter - 1).square().sum())
    guard.detach()
    optimizer.step(lambda: (parameter - 1).square().sum())
    assert parameter.grad.tolist() == [-2.0, -2.0]


def test_a_closure_that_leaves_no_gradient_later_on_is_skipped_as_any_step_without_one():
    parameters = parameters_of(None)
    guard = gk.attach(sgd(parameters), gk.ClipByNorm(1.0))
    elsewhere = nn.Parameter(torch.ones(2))

    def closure(on):
        guard.optimizer.zero_grad()
        loss = on.square().sum()
        loss.backward()
        return loss

    for on, stepped in ((parameters[0], True), (elsewhere, False), (parameters[0], True)):
        guard.optimizer.step(lambda on=on: closure(on))
        assert guard.report.stepped is stepped


# -- mistakes that can be seen ----------------------------------------------------------------------------------


def test_a_step_inside_backward_is_refused():
    parameter = nn.Parameter(torch.ones(2))
    guard = gk.attach(sgd([parameter]), gk.ClipByNorm(1.0))
    parameter.register_post_accumulate_grad_hook(lambda p: guard.optimizer.step())
    with pytest.raises(gk.AttachError, match=r"called inside backward\(\)"):
        parameter.sum().backward()
    assert parameter.tolist() == [1.0, 1.0]


def test_gradients_that_replace_others_are_no_foreign_clip():
    parameter = nn.Parameter(torch.ones(2))
    guard = gk.attach(sgd([parameter]), gk.ClipByNorm(1.0))
    for _ in range(3):
        parameter.sum().backward()
        parameter.grad = parameter.grad * 0.5  # another tensor, perhaps at the same address
        guard.optimizer.step()
        parameter.grad = None


def test_accumulated_backwards_are_no_foreign_clip():
    parameter = nn.Parameter(torch.ones(2))
    guard = gk.attach(sgd([parameter]), gk.ClipByNorm(1.0))
    for set_to_none in (True, False):
        for _ in range(3):
            parameter.sum().backward()
        guard.optimizer.step()
        guard.optimizer.zero_grad(set_to_none=set_to_none)
    assert guard.step == 2
