"""A skip that the host knows of runs no step, of no optimizer: everything stays bit-identical, buffers included."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

import gradkeel as gk
from optimizers import contents, is_same

pytestmark = pytest.mark.filterwarnings("ignore::gradkeel.errors.SkippedStepWarning")


class ZeroFilling(Optimizer):
    """As a widely copied Muon: a parameter without a gradient is given one of zeros; momentum goes on."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr, "momentum": 0.9})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                state = self.state[parameter]
                buffer = state.setdefault("buffer", torch.zeros_like(parameter))
                buffer.mul_(group["momentum"]).add_(parameter.grad)
                parameter.data.add_(buffer, alpha=-group["lr"])
        return loss


class Counting(ZeroFilling):
    """As Schedule-Free and most optimizers from outside torch: counts in its groups, and in itself."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, lr)
        self.total = 0

    def step(self, closure=None):
        self.total += 1
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


class Sam(Optimizer):
    """Sharpness-aware minimization by closure, which stands at perturbed weights when it is called."""

    def __init__(self, parameters, lr=0.1, rho=0.5):
        self.base = None
        super().__init__(parameters, {"lr": lr, "rho": rho})
        self.base = SGD(self.param_groups, lr=lr, momentum=0.9)

    @torch.no_grad()
    def first_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old"] = parameter.data.clone()
                parameter.data.add_(group["rho"])

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = self.state[parameter]["old"]
        self.base.step()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            loss = closure()
        self.second_step()
        return loss


class Wandering(Optimizer):
    """As line searches do: moves, looks, moves on; each evaluation is another place."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure()
        for _ in range(2):
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.data.add_(parameter.grad, alpha=-0.1)
                    self.state[parameter].setdefault("trace", []).append(parameter.detach().clone())
            with torch.enable_grad():
                closure()
        return loss


def problem():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def inputs(step):
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(step))


def closure_of(model, optimizer, step, spoiled_at=None):
    """A closure whose evaluation of the number ``spoiled_at`` is NaN."""
    evaluations = iter(range(100))

    def closure():
        optimizer.zero_grad()
        loss = model(inputs(step)).square().mean()
        if next(evaluations) == spoiled_at:
            loss = loss * math.nan
        loss.backward()
        return loss

    return closure


def everything(model, optimizer):
    own = {name: value for name, value in vars(optimizer).items() if name in ("total", "count")}
    inner = [contents(model, o) for o in vars(optimizer).values() if isinstance(o, Optimizer)]
    return copy.deepcopy((contents(model, optimizer), own, inner))


KINDS = [ZeroFilling, Counting]


@pytest.mark.parametrize("good_steps", [0, 2])
@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_that_count_in_groups_or_turn_none_into_zeros(kind, by_closure, good_steps):
    model = problem()
    optimizer = kind(model.parameters())
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    for step in range(good_steps + 1):
        before = everything(model, optimizer)
        closure = closure_of(model, optimizer, step, 0 if step == good_steps else None)
        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert not guard.report.stepped
    assert is_same(everything(model, optimizer), before)


@pytest.mark.parametrize("good_steps", [0, 1, 3])
@pytest.mark.parametrize(("kind", "spoiled_at"), [(Sam, 0), (Wandering, 0), (Wandering, 1), (Wandering, 2)])
def test_what_moves_weights_around_a_closure_is_put_back(kind, spoiled_at, good_steps):
    model = problem()
    optimizer = kind(model.parameters())
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    for step in range(good_steps):
        optimizer.step(closure_of(model, optimizer, step))
        assert guard.report.stepped
    before = everything(model, optimizer)
    loss = optimizer.step(closure_of(model, optimizer, good_steps, spoiled_at))
    assert (guard.step, guard.report.stepped) == (good_steps + 1, False)
    assert is_same(everything(model, optimizer), before)
    assert loss.requires_grad
    assert loss.isnan() == (
        spoiled_at == 0
    )  # the value that the step returns by itself: its first evaluation's
    optimizer.step(closure_of(model, optimizer, good_steps + 1))
    assert guard.report.stepped


@pytest.mark.parametrize("kind", [Sam, Wandering])
def test_raise_puts_back_what_a_closure_has_moved(kind):
    model = problem()
    optimizer = kind(model.parameters())
    gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model, nonfinite="raise")
    optimizer.step(closure_of(model, optimizer, 0))
    before = everything(model, optimizer)
    with pytest.raises(gk.NonFiniteGradientError, match="nothing has been modified"):
        optimizer.step(closure_of(model, optimizer, 1, spoiled_at=0))
    assert is_same(everything(model, optimizer), before)


def test_an_optimizer_that_moves_for_the_first_time_late_is_not_passed_off_as_unchanged():
    class Rarely(Sam):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            if self.calls < 12:
                with torch.enable_grad():
                    loss = closure()
                self.base.step()
                return loss
            return super().step(closure)

        @torch.no_grad()
        def first_step(self):
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["old"] = parameter.clone()
                parameter.add_(0.5)

    model = problem()
    optimizer = Rarely(model.parameters())
    gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    for step in range(11):
        optimizer.step(closure_of(model, optimizer, step))
    with pytest.raises(gk.NonFiniteGradientError, match="had moved parameters before the closure"):
        optimizer.step(closure_of(model, optimizer, 2, spoiled_at=0))
    before = everything(model, optimizer)
    optimizer.step(closure_of(model, optimizer, 3, spoiled_at=0))  # from now on it is known
    assert is_same(contents(model, optimizer), before[0])


def test_a_clip_in_a_closure_is_what_the_step_is_made_on():
    model, by_hand = problem(), problem()
    optimizer, plain = Sam(model.parameters()), Sam(by_hand.parameters())
    gk.attach(optimizer, gk.ClipByGlobalNorm(0.01, eps=1e-6), model=model)
    for step in range(3):
        optimizer.step(closure_of(model, optimizer, step))

        inner = closure_of(by_hand, plain, step)

        def clipped(inner=inner):
            loss = inner()
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 0.01)
            return loss

        plain.step(clipped)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


# -- whoever calls step, and however ------------------------------------------------------------------------------


def skip_one(model, optimizer, guard, step=None):
    """A skip, and whether it left everything as it was."""
    before = everything(model, optimizer)
    closure_of(model, optimizer, 7, 0)()
    (step or optimizer.step)()
    assert not guard.report.stepped
    return is_same(everything(model, optimizer), before)


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_under_schedulers(scheduler_first):
    model = problem()
    optimizer = Counting(model.parameters())

    def schedule():
        return torch.optim.lr_scheduler.StepLR(optimizer, 1)

    if scheduler_first:
        schedulers = [schedule(), schedule()]
    guard = gk.attach(optimizer, None, model=model)
    if not scheduler_first:
        schedulers = [schedule(), schedule()]
    assert skip_one(model, optimizer, guard)
    for scheduler in schedulers:  # which do not say that no step was called
        scheduler.step()


def test_through_a_bound_method_taken_before():
    model = problem()
    optimizer = Counting(model.parameters())
    taken = optimizer.step
    guard = gk.attach(optimizer, None, model=model)
    assert skip_one(model, optimizer, guard, taken)
    assert skip_one(model, optimizer, guard, lambda: type(optimizer).step(optimizer))


def test_hooks_and_the_profilers_range_are_there_all_the_same():
    model = problem()
    optimizer = Counting(model.parameters())
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    guard = gk.attach(optimizer, None, model=model)
    optimizer.register_step_pre_hook(lambda *_: seen.append("second before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    everyone = register_optimizer_step_post_hook(lambda *_: seen.append("everyone's"))
    try:
        closure_of(model, optimizer, 0, 0)()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            optimizer.step()
    finally:
        everyone.remove()
    assert not guard.report.stepped
    assert seen == ["before", "second before", "after", "everyone's"]
    assert "Optimizer.step#Counting.step" in [event.key for event in profile.key_averages()]


@pytest.mark.parametrize("kind", [SGD, Counting])
def test_under_torch_compile(kind):
    model = problem()
    optimizer = kind(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step = torch.compile(optimizer.step, backend="eager")
        for number in range(2):
            closure_of(model, optimizer, number)()
            step()
            assert guard.report.stepped
        assert skip_one(model, optimizer, guard, step)
        closure_of(model, optimizer, 3)()
        before = [p.clone() for p in model.parameters()]
        step()
    assert guard.report.stepped
    assert not any(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))


def test_in_a_subclass_that_calls_its_parents_step():
    ZeroFilling([nn.Parameter(torch.zeros(1))])  # from now on torch hooks the parent's step too
    model, parent = problem(), problem()
    optimizer, other = Counting(model.parameters()), ZeroFilling(parent.parameters())
    guards = gk.attach(optimizer, None, model=model), gk.attach(other, None, model=parent)
    assert skip_one(model, optimizer, guards[0])
    assert skip_one(parent, other, guards[1])
    sam = [Sam(model.parameters())]

    class Sub(Sam):
        def step(self, closure=None):
            loss = super().step(closure)
            self.param_groups[0]["k"] = 1
            return loss

    sam.append(Sub(model.parameters()))
    for optimizer in sam:
        guard = gk.attach(optimizer, None, model=model)
        before = everything(model, optimizer)
        optimizer.step(closure_of(model, optimizer, 0, 0))
        assert not guard.report.stepped
        assert is_same(everything(model, optimizer), before)


def test_others_of_the_class_step_on_and_detach_restores_the_class():
    class Own(Counting):
        def step(self, closure=None):
            return super().step(closure)

    own = Own.step
    model, free = problem(), problem()
    optimizer, unguarded = Own(model.parameters()), Own(free.parameters())
    hooked = Own.step
    guard = gk.attach(optimizer, None, model=model)
    assert Own.step is hooked
    free(inputs(0)).sum().mul(math.nan).backward()
    unguarded.step()
    assert unguarded.total == 1
    copied = copy.copy(unguarded)
    copied.total = 0  # torch copies no attributes
    copied.step()
    assert copied.total == 1
    assert skip_one(model, optimizer, guard)
    guard.detach()
    guard.detach()
    assert Own.step is hooked
    assert hooked.__closure__[hooked.__code__.co_freevars.index("func")].cell_contents is own
    closure_of(model, optimizer, 0, 0)()
    optimizer.step()
    assert optimizer.total == 1


def test_a_class_is_restored_with_its_last_guard_only():
    model = problem()
    optimizers = [Counting(model.parameters()) for _ in range(2)]
    first, second = (gk.attach(optimizer, None, model=model) for optimizer in optimizers)
    first.detach()
    assert skip_one(model, optimizers[1], second)
    second.detach()


# -- what cannot be guarded so ------------------------------------------------------------------------------------


def test_a_loop_of_first_and_second_steps_is_refused_with_the_fix():
    model = problem()
    optimizer = Sam(model.parameters())
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    closure_of(model, optimizer, 0)()
    with pytest.raises(
        gk.AttachError, match=r"Sam.first_step\(\) moves parameters without optimizer.step\(\)"
    ):
        optimizer.first_step()
    optimizer.step(closure_of(model, optimizer, 0))
    assert guard.report.stepped
    guard.detach()
    optimizer.first_step()
    optimizer.second_step()


def test_the_fix_for_such_loops_works():
    model = problem()
    optimizer = Sam(model.parameters())
    guard = gk.attach(optimizer.base, gk.ClipByGlobalNorm(0.01), model=model)
    before = copy.deepcopy(list(model.parameters()))
    for spoiled_at in (0, None):
        closure_of(model, optimizer, 0)()
        optimizer.first_step()
        closure_of(model, optimizer, 0, spoiled_at)()
        optimizer.second_step()
        assert guard.report.stepped == (spoiled_at is None)
        assert is_same(list(model.parameters()), before) == (spoiled_at == 0)
    assert guard.report.clipped


def test_an_optimizer_that_torch_never_set_up_is_refused_with_the_inner_ones_name():
    class Shell(Optimizer):
        def __init__(self, inner):
            self.inner_optimizer = inner

        @property
        def param_groups(self):
            return self.inner_optimizer.param_groups

        def step(self, closure=None):
            return self.inner_optimizer.step(closure)

    inner = SGD(problem().parameters(), lr=0.1)
    with pytest.raises(gk.AttachError, match=r"attach\(optimizer=Shell\).*attach to its .inner_optimizer"):
        gk.attach(Shell(inner), None)


# -- a wrapper that is an optimizer itself ------------------------------------------------------------------------


class Lookahead(Optimizer):
    """Steps with another optimizer, and pulls the weights back every second time."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, {})
        self.count = 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.optimizer.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            fast = [p for group in self.param_groups for p in group["params"]]
            for slow, parameter in zip(self.slow, fast, strict=True):
                slow.add_(parameter - slow, alpha=0.5)
                parameter.copy_(slow)
        return loss


@pytest.mark.parametrize("by_closure", [False, True])
def test_a_wrapper_that_moves_weights_itself_is_guarded_and_not_what_it_holds(by_closure):
    model = problem()
    optimizer = Lookahead(SGD(model.parameters(), lr=0.1, momentum=0.9))
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    assert guard.optimizer is optimizer
    for step in range(6):
        before = everything(model, optimizer), copy.deepcopy(optimizer.slow)
        closure = closure_of(model, optimizer, step, 0 if step in (1, 4) else None)
        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert guard.report.stepped == (step not in (1, 4))
        assert is_same((everything(model, optimizer), optimizer.slow), before) == (step in (1, 4))


# -- buffers ------------------------------------------------------------------------------------------------------


def normed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    model.register_buffer("mask", torch.full((4,), -math.inf))
    return model


@pytest.mark.parametrize("good_steps", [0, 1, 3])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_buffers_of_the_model_are_put_back(bad, good_steps):
    model = normed()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    for step in range(good_steps):
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        model(torch.full((5, 3), bad)).square().mean().backward()
        optimizer.step()
        assert not guard.report.stepped
        assert is_same(dict(model.state_dict()), dict(before))
    assert model.eval()(inputs(0)).isfinite().all()


def test_buffers_take_in_a_whole_window_or_nothing_of_it():
    model = normed()
    optimizer = SGD(model.parameters(), lr=0.1)
    accumulate = gk.Accumulator(gk.attach(optimizer, None, model=model), steps=2)
    before = copy.deepcopy(model.state_dict())
    for micro in accumulate([1.0, math.nan]):
        with micro:
            micro.backward(model(inputs(0) * micro.batch).square().sum(), weight=5)
        if micro.closes_window:
            optimizer.step()
    assert is_same(dict(model.state_dict()), dict(before))


def test_weights_that_were_loaded_in_between_are_not_mixed_with_older_buffers():
    model = normed()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    saved = copy.deepcopy(model.state_dict())
    for step in range(3):
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(saved)
    model(inputs(4)).square().mean().mul(math.inf).backward()
    optimizer.step()
    assert not guard.report.stepped
    # One batch after what was loaded: older copies are none of it.
    assert model[1].num_batches_tracked == 1
    model(torch.full((5, 3), math.inf)).square().mean().backward()
    optimizer.step()
    assert model[1].num_batches_tracked == 1
    assert model[1].running_mean.isfinite().all()


def test_buffers_that_are_not_put_back_are_named():
    model = normed()
    optimizer = SGD(model.parameters(), lr=0.1)
    gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    model.load_state_dict(model.state_dict())  # as far as the guard can know: other weights
    model(torch.full((5, 3), math.nan)).square().mean().backward()
    with pytest.warns(gk.SkippedStepWarning, match=r"buffers '1.running_mean' and '1.running_var' .* NaN"):
        optimizer.step()


def test_a_wrapper_with_a_state_of_its_own_and_no_hooks_is_refused():
    class Bare(Lookahead):
        def __init__(self, optimizer):
            self.optimizer, self.state = optimizer, {}
            self.param_groups = optimizer.param_groups

    inner = SGD(problem().parameters(), lr=0.1)
    with pytest.raises(gk.AttachError, match=r"attach\(optimizer=Bare\).*attach to its .optimizer"):
        gk.attach(Bare(inner), None)
    gk.attach(inner, None)


def test_buffers_may_be_moved_replaced_and_taken_away():
    model = normed()
    optimizer = SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
    for step in range(4):
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            del model.mask
            model[1].running_mean = model[1].running_mean.clone()
        if step == 2:
            model[1].num_batches_tracked = None
    before = copy.deepcopy(model.state_dict())
    model(torch.full((5, 3), math.inf)).square().mean().backward()
    optimizer.step()
    assert not guard.report.stepped
    assert is_same(dict(model.state_dict()), dict(before))
