"""On a GPU: right numbers by every path, no host sync, and a step that can be captured in a CUDA graph.

`make test-simulated` runs them where there is none.
"""

import contextlib
import gc
import math
import weakref

import pytest
import torch

import gradkeel as gk
from gradkeel import doctor, norms
from gradkeel.kernels import graph as graphs
from gradkeel.kernels import triton_host
from gradkeel.norms import Decision, Needs
from gradkeel.record import Reader
from syncs import without_sync

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

POLICIES = [
    None,
    gk.ClipByGlobalNorm(1e9),
    gk.ClipByGlobalNorm(1e-3),
    gk.ClipByNorm(1e-2),
    gk.ClipByValue(1e-3),
    gk.AdaptiveGradientClip(1e-3),
    gk.policies.AutoClip(),
    gk.policies.ZClip(),
    gk.policies.AdaGC(),
    gk.policies.parse("quantile:0.9").policy,
    gk.policies.parse("global-norm:1e-3+value:1e-4").policy,
]


@pytest.fixture(params=["foreach", "triton"], autouse=True)
def path(request, monkeypatch):
    """Which kernels do the work."""
    if request.param == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv(triton_host.VARIABLE, "on" if request.param == "triton" else "off")
    triton_host.kernels.cache_clear()
    yield request.param
    monkeypatch.undo()
    triton_host.kernels.cache_clear()


def training(policy, device, dtype=torch.float32, fused=True, **arguments):
    """Parameters, their optimizer and guard; and a function that sets this step's gradients."""
    shapes = [(3, 5), (40_000,), (8, 32, 3, 3), (1,), ()]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, device="cpu") for shape in shapes]
    gradients = [torch.randn(shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes]
    parameters = [torch.nn.Parameter(value.to(device, dtype)) for value in drawn]
    # What torch asks for before a step may be captured; a fused kernel computes the same with it.
    capturable = fused and device == "cuda"
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused, capturable=capturable)
    guard = gk.attach(optimizer, policy, **arguments)

    def backward():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

    return parameters, optimizer, guard, backward


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_clips_as_the_cpu_does(policy, fused, dtype):
    results = []
    for device in ("cpu", "cuda"):
        parameters, optimizer, guard, backward = training(policy, device, dtype, fused)
        for _ in range(3):
            backward()
            optimizer.step()
        results.append(
            ([p.grad.cpu().double() for p in parameters], guard.report.norm, guard.report.coefficient)
        )
    (ours, norm, coefficient), (theirs, gpu_norm, gpu_coefficient) = results
    # The native CPU kernels add up to 1,024 entries of 16 bits in float32, which was off by 1.5e-8 here; the rest are
    # float64 sums in another order.
    assert gpu_norm == pytest.approx(norm, rel=1e-9 if dtype == torch.float32 else 1e-6)
    # AGC's bound is a share of the weights' norms, and the two optimizers' kernels round differently: weights of
    # float32 were off by 4.6e-7 after three steps, those of 16 bits by an ulp.
    assert gpu_coefficient == pytest.approx(coefficient, rel=2e-6 if dtype == torch.float32 else 2.0**-8)
    for one, other in zip(ours, theirs, strict=True):
        # one rounding of the gradient's dtype, and the coefficient's own error
        rtol = 2e-6 if dtype == torch.float32 else 2.0 * torch.finfo(dtype).eps
        torch.testing.assert_close(one, other, rtol=rtol, atol=1e-12)


def is_captured(guard):
    graphs = guard._replays._graphs
    return graphs is not None and any(entry.captured is not None for entry in graphs._entries)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_a_replayed_step_gives_the_bits_of_a_launched_one(policy, fused, path, monkeypatch):
    results = []
    for is_replayed in (True, False):
        parameters, optimizer, guard, backward = training(policy, "cuda", fused=fused)
        if not is_replayed:
            monkeypatch.setattr(guard._replays, "find", lambda *given: (None, None))
        monkeypatch.setattr(guard._folding, "is_worth", lambda device: False)
        reports = []
        for i in range(8):
            backward()
            for parameter in parameters:
                parameter.grad *= 1.5**i
            optimizer.step()
            reports.append(guard.report)
        captured = is_captured(guard)
        assert captured == (is_replayed and path == "triton")
        numbers = [(r.norm, r.norms, r.coefficient, r.clipped, r.clipped_norm, r.stepped) for r in reports]
        results.append((parameters, numbers, guard.state_dict()["states"]))
    (ours, numbers, states), (theirs, their_numbers, their_states) = results
    assert all(map(torch.equal, ours, theirs))
    assert numbers == their_numbers
    assert states.keys() == their_states.keys()
    for label, state in states.items():
        assert all(torch.equal(value, their_states[label][key]) for key, value in state.items())


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_left_alone_by_a_clamp_has_the_norm_that_it_had(fused):
    parameters, optimizer, guard, _ = training("global-norm:1e9+value:1e9", "cuda", fused=fused)
    for _ in range(5):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert guard.report.clipped_norm == pytest.approx(guard.report.norm, rel=1e-12)


def test_a_step_whose_gradients_moved_is_replayed_on_the_new_ones(path):
    parameters, optimizer, guard, _ = training(gk.ClipByGlobalNorm(1.0), "cuda")
    for i in range(10):
        optimizer.zero_grad()
        for parameter in reversed(parameters) if i % 2 else parameters:
            parameter.grad = torch.randn_like(parameter) * 10
        if i >= 8:
            parameters[1].grad = None
        norm = torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm()
        optimizer.step()
        assert guard.report.norm == pytest.approx(float(norm), rel=1e-12)
        after = torch.stack([p.grad.double().norm() for p in parameters if p.grad is not None]).norm()
        # folded into the optimizer's kernel, or applied: a fused kernel writes the scaled gradients too
        assert float(after) == pytest.approx(1.0, rel=1e-6)


def test_a_graph_that_others_have_pushed_out_is_captured_anew(path):
    """Its pool went with it."""
    parameters, optimizer, guard, backward = training(gk.ClipByGlobalNorm(1e-3), "cuda")
    for absent in [None] * 4 + [0, 1, 2, 3] + [None] * 4:
        backward()
        if absent is not None:
            parameters[absent].grad = None
        optimizer.step()
        assert guard.report.clipped_norm == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("times", [1, 2])
def test_a_capture_that_fails_is_tried_once_more(times, path, monkeypatch):
    """Then steps are launched, and it is said why."""
    if path == "foreach":
        pytest.skip("nothing is captured")
    failed, own = [], graphs.Graph.__init__

    def failing(*arguments):
        if len(failed) < times:
            failed.append(torch.cuda.current_stream())
            raise torch.OutOfMemoryError("nothing left")
        own(*arguments)

    monkeypatch.setattr(graphs.Graph, "__init__", failing)
    _, optimizer, guard, backward = training(gk.ClipByGlobalNorm(1e-3), "cuda")
    says = pytest.warns(gk.errors.GradkeelWarning, match="nothing left")
    with says if times == 2 else contextlib.nullcontext():
        for _ in range(8):
            backward()
            optimizer.step()
            assert guard.report.clipped_norm == pytest.approx(1e-3, rel=1e-6)
    assert len(failed) == times


@pytest.mark.parametrize(
    "policy",
    [
        gk.policies.parse("warmup:4/global-norm:1e-3/global-norm:1e9").policy,
        gk.policies.Clip("global", gk.policies.Schedule(lambda step: 1e-3 * step), gk.policies.Hard()),
    ],
)
def test_a_policy_that_looks_at_the_number_of_the_step(policy, path):
    """Compared with, a graph holds as long as it comes out alike; computed with, the step is launched: in silence."""
    _, optimizer, guard, backward = training(policy, "cuda")
    for step in range(1, 10):
        backward()
        optimizer.step()
        bound = (1e-3 if step <= 4 else 1e9) if "Warmup" in repr(policy) else 1e-3 * step
        assert guard.report.clipped_norm == pytest.approx(min(bound, guard.report.norm), rel=1e-6)


def test_a_policy_of_the_users_is_launched(path):
    class Own(gk.policies.ClipByGlobalNorm):
        calls = 0

        def decide(self, norms, state):
            Own.calls += 1
            return super().decide(norms, state)

    _, optimizer, guard, backward = training(Own(1.0), "cuda")
    for _ in range(6):
        backward()
        optimizer.step()
    assert Own.calls == 6
    assert not is_captured(guard)


@pytest.mark.parametrize("given", [list, torch.tensor, lambda values: values[0]])
@pytest.mark.parametrize(
    "made", [lambda own: own, lambda own: gk.policies.Chain(own, gk.ClipByNorm(1.0)),
             lambda own: gk.policies.Chain(gk.ClipByNorm(1.0), own), gk.policies.PerGroup],
)  # fmt: skip
def test_numbers_of_a_policy_of_the_users_may_be_on_the_host(given, made):
    class Own(gk.ClipByGlobalNorm):
        def decide(self, norms, state):
            half = given([0.5] * len(norms.names))
            return Decision(coefficients=half, bound=half), state

    results = []
    for device in ("cpu", "cuda"):
        parameters, optimizer, guard, backward = training(made(Own(1.0)), device)
        for _ in range(3):
            backward()
            optimizer.step()
        results.append(([p.grad.cpu() for p in parameters], guard.report.clipped_norm))
    (ours, norm), (theirs, gpu_norm) = results
    assert gpu_norm == pytest.approx(norm, rel=1e-9)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-12)


def scaled_steps(optimizer, parameters, clip=None):
    """Ten steps under a loss scale, one of which overflows; ``clip`` is called on unscaled gradients."""
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=4)
    for step in range(10):
        optimizer.zero_grad()
        loss = sum((parameter * (step + 1)).square().sum() for parameter in parameters)
        scaler.scale(loss * (math.inf if step == 5 else 1.0)).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip(parameters)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale()


@pytest.mark.parametrize(
    ("spec", "clip"),
    [
        ("global-norm:1.0", lambda parameters: torch.nn.utils.clip_grad_norm_(parameters, 1.0)),
        ("value:0.01", lambda parameters: torch.nn.utils.clip_grad_value_(parameters, 0.01)),
        ("zclip", None),
    ],
)
def test_under_a_loss_scale_as_torch_does_it_by_hand(spec, clip, path):
    results = []
    for is_guarded in (True, False):
        parameters, _, guard, _ = training(None, "cuda")
        guard.detach()
        optimizer = torch.optim.AdamW(parameters, lr=0.01, fused=True)
        if is_guarded:
            guard = gk.attach(optimizer, spec)
            scale = scaled_steps(optimizer, parameters)
            assert guard.step == 10
            assert is_captured(guard) == (path == "triton")
        elif clip is not None:
            assert scaled_steps(optimizer, parameters, clip) == scale
        results.append([parameter.detach() for parameter in parameters])
    if clip is not None:
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_windows_are_divided_in_the_graph(path):
    parameters, optimizer, guard, _ = training(gk.ClipByGlobalNorm(1e9), "cuda")
    accumulate = gk.Accumulator(guard, 3)
    for _ in range(6):
        optimizer.zero_grad()
        drawn = [torch.randn_like(parameter) for parameter in parameters]
        for micro in accumulate([1.0, 2.0, 3.0]):
            with micro:
                loss = sum((p * g).sum() for p, g in zip(parameters, drawn, strict=True)) * micro.batch
                micro.backward(loss, weight=micro.batch)
            if micro.closes_window:
                optimizer.step()
        true = torch.stack([g.double().norm() for g in drawn]).norm()  # 6 of them, divided by 6
        assert guard.report.norm == pytest.approx(float(true), rel=1e-6)
    assert is_captured(guard) == (path == "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm_type", [1.0, 2.0])
def test_the_function_clips_other_gradients_by_other_bounds_in_each_call(dtype, norm_type):
    parameters = [
        torch.nn.Parameter(torch.zeros(shape, device="cuda", dtype=dtype))
        for shape in ((70_000,), (3, 5), ())
    ]
    for i in range(6):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        if i == 5:
            parameters[1].grad[0, 0] = math.nan
        held = [parameter.grad.double().clone() for parameter in parameters]
        true = torch.cat([gradient.flatten() for gradient in held]).norm(norm_type)
        bound = float(true) / (i + 1) if i < 5 else 1.0
        found = gk.clip_grad_norm_(parameters, bound, norm_type)
        assert float(found) == pytest.approx(float(true), rel=1e-6, nan_ok=True)
        factor = min(1.0, bound / (float(true) + 1e-6)) if i < 5 else 1.0
        for parameter, gradient in zip(parameters, held, strict=True):
            rtol = max(4 * torch.finfo(dtype).eps, 1e-14)  # float64 sums in another order
            torch.testing.assert_close(
                parameter.grad.double(), gradient * factor, rtol=rtol, atol=0, equal_nan=True
            )


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_host_sync(policy):
    _, optimizer, guard, backward = training(policy, "cuda")
    for _ in range(3):  # states are created, constants are made
        backward()
        optimizer.step()
    backward()
    with without_sync():
        optimizer.step()
    assert guard.report.stepped


def captured(optimizer, stream):
    """A graph of one step, captured on a stream on which steps were made before."""
    stream.synchronize()
    gc.collect()  # the end of another graph would break the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    return graph


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_step_can_be_captured(policy):
    parameters, optimizer, guard, backward = training(policy, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backward()
        for _ in range(3):
            optimizer.step()
        graph = captured(optimizer, stream)
    before = [parameter.detach().clone() for parameter in parameters]
    graph.replay()
    torch.cuda.synchronize()
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert guard.report.norm > 0


@pytest.mark.parametrize("spec", ["norm:0.01+agc:0.001", "block-rms:0.05"])
def test_a_graph_owns_the_constants_that_it_reads(spec, monkeypatch):
    """The caches that they come from may have dropped them when it is replayed."""
    monkeypatch.setattr(norms, "_IN_GRAPHS", {})
    _, optimizer, _, backward = training(spec, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backward()
        for _ in range(2):
            optimizer.step()
        norms._IN_GRAPHS.clear()
        graph = captured(optimizer, stream)
    assert norms._IN_GRAPHS
    assert all(constant.is_cuda for constant in norms._IN_GRAPHS.values())
    graph.replay()


@pytest.mark.parametrize(
    "spec", ["zclip:warmup=3", "autoclip:warmup=3,window=8", "zclip:warmup=3,scope=tensor"]
)
@pytest.mark.parametrize("first", [0, 5])
def test_a_policys_state_goes_on_in_the_users_graph(spec, first):
    """Steps that are replayed, and others between them, come to what ordinary ones come to."""
    results = []
    for is_captured in (False, True):
        parameters, optimizer, guard, backward = training(spec, "cuda")
        stream = torch.cuda.Stream()
        told = []
        with torch.cuda.stream(stream):
            backward()
            fresh = [parameter.grad.clone() for parameter in parameters]
            optimizer.step()  # makes the optimizer's state
            for _ in range(first):
                optimizer.step()
            graph = captured(optimizer, stream) if is_captured else None
            made = [torch.empty(1000, device="cuda") for _ in range(50)]  # where something was freed
            for i in range(12):
                for parameter, gradient in zip(parameters, fresh, strict=True):
                    torch.mul(gradient, 1.0 + i % 5, out=parameter.grad)
                if graph is None or i in (4, 5, 9):
                    optimizer.step()
                    if i in (4, 5, 9):
                        told += guard.report.norm, guard.report.coefficient
                else:
                    graph.replay()
        torch.cuda.synchronize()
        del made
        states = guard.state_dict()["states"]
        results.append((told, states, [parameter.detach().cpu() for parameter in parameters]))
    (told, states, left), (told_too, states_too, left_too) = results
    assert told_too == pytest.approx(told)
    for label, state in states.items():
        for key, value in state.items():
            torch.testing.assert_close(states_too[label][key], value, msg=f"{label}.{key}")
    torch.testing.assert_close(left_too, left)


class Remembers(gk.policies.Policy):
    """Of the user's own: what it remembers follows from the norms and what it has remembered."""

    needs, spec = Needs(), "remembers"

    def __init__(self, begins, follows):
        self.begins, self.follows = begins, follows

    def init(self, norms):
        return self.begins

    def decide(self, norms, state):
        return Decision(coefficients=torch.ones_like(norms.total)), self.follows(norms, state)


@pytest.mark.parametrize(
    "follows",
    [
        lambda norms, state: {"last": norms.total},
        lambda norms, state: {"low": norms.total, "high": norms.total},
        lambda norms, state: {"last": norms.total.expand(3)},
    ],
)
def test_a_graph_writes_to_no_tensor_but_the_guards(follows):
    """Whatever a policy of the user's remembers; and the memory is there as long as the graph may be."""
    parameters, optimizer, guard, backward = training(Remembers({}, follows), "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backward()
        optimizer.step()
        report, norm = guard.report, guard.report.norm
        graph = captured(optimizer, stream)
        for parameter in parameters:
            parameter.grad.mul_(7.0)
        graph.replay()
        stream.synchronize()
        assert report.norm == norm
        state = guard.state_dict()["states"]["main"]
        assert all(value.max().item() > 2 * norm for value in state.values())
        held = [weakref.ref(value) for value in guard._states["main"].values()]
        guard.detach()
        del guard, state
        gc.collect()
        assert all(one() is not None for one in held)


def test_a_state_of_another_shape_goes_on_beside_the_graph():
    def follows(norms, state):
        return {"norms": norms.norms, "last": norms.total} if norms.step < 5 else {"last": norms.total}

    _, optimizer, guard, backward = training(Remembers({}, follows), "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backward()
        for _ in range(2):
            optimizer.step()
        graph = captured(optimizer, stream)
        graph.replay()
        for _ in range(4):
            optimizer.step()
    assert guard.state_dict()["states"]["main"].keys() == {"last"}


@pytest.mark.parametrize("spec", ["norm:0.01", "value:0.001", "agc:0.001"])
def test_a_captured_step_clips_to_the_same_bits(spec):
    """Of policies whose coefficient is never folded into the optimizer: which steps fold depends on earlier ones."""
    results = []
    for is_captured in (False, True):
        parameters, _, guard, backward = training(None, "cuda")
        guard.detach()
        optimizer = torch.optim.SGD(parameters, lr=1.0, fused=True)
        gk.attach(optimizer, spec)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            backward()
            fresh = [parameter.grad.clone() for parameter in parameters]
            for _ in range(2):  # compiles, and makes constants
                optimizer.step()
                for parameter, gradient in zip(parameters, fresh, strict=True):
                    parameter.grad.copy_(gradient)
            run = captured(optimizer, stream).replay if is_captured else optimizer.step
            for _ in range(3):
                for parameter, gradient in zip(parameters, fresh, strict=True):
                    parameter.grad.copy_(gradient)
                run()
        torch.cuda.synchronize()
        results.append([parameter.detach().clone() for parameter in parameters])
    assert all(map(torch.equal, *results))


def test_steps_beside_a_captured_one_leave_its_addresses_alone():
    parameters, optimizer, guard, backward = training(gk.ClipByGlobalNorm(1e-3), "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        backward()
        for _ in range(3):
            optimizer.step()
        graph = captured(optimizer, stream)
        its_own = [parameter.grad for parameter in parameters]
        backward()  # other addresses
        others = [parameter.grad.clone() for parameter in parameters]
        optimizer.step()
        assert guard.report.clipped
        for gradient in its_own:
            gradient.fill_(1.0)
        kept = [parameter.grad.clone() for parameter in parameters]
        graph.replay()  # clips the gradients that were captured, and no others
        stream.synchronize()
        assert all(map(torch.equal, kept, [parameter.grad for parameter in parameters]))
        for parameter, gradient in zip(parameters, others, strict=True):
            parameter.grad.copy_(gradient)
        norm = guard.report.norm
        optimizer.step()
        assert guard.report.norm == norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_at_new_addresses_in_another_order_on_another_stream(dtype):
    parameters, optimizer, guard, _ = training(gk.ClipByGlobalNorm(0.1), "cuda", dtype)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    for round_ in range(8):
        stream = side if round_ % 2 else main
        stream.wait_stream(main if round_ % 2 else side)
        with torch.cuda.stream(stream):
            for parameter in parameters:
                parameter.grad = None
            for i in torch.randperm(len(parameters)).tolist():
                parameters[i].grad = torch.randn_like(parameters[i])
            if round_ == 5:
                parameters[1].grad = None
            held = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norm = torch.stack([gradient.double().norm() for gradient in held]).norm()
            optimizer.step()
            assert guard.report.norm == pytest.approx(float(norm), rel=1e-9)  # float64 sums in another order


def test_a_group_added_between_two_steps():
    parameters, optimizer, guard, backward = training(gk.ClipByGlobalNorm(1e-3), "cuda")
    for _ in range(2):
        backward()
        optimizer.step()
    more = torch.nn.Parameter(torch.ones(1000, device="cuda"))
    optimizer.add_param_group({"params": [more]})
    for _ in range(2):
        backward()
        more.grad = torch.ones_like(more)
        held = [parameter.grad.double() for parameter in (*parameters, more)]
        norm = torch.stack([gradient.norm() for gradient in held]).norm()
        optimizer.step()
        assert guard.report.norm == pytest.approx(float(norm), rel=1e-9)  # float64 sums in another order
        assert guard.report.stepped


def test_by_default_the_triton_kernels_are_found_right_here(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv(triton_host.VARIABLE)
    triton_host.kernels.cache_clear()
    assert triton_host.unavailable(torch.empty(0, device="cuda").device) is None


def test_a_step_that_is_not_finite_is_skipped_on_the_device():
    parameters, optimizer, guard, backward = training(gk.ClipByGlobalNorm(1.0), "cuda")
    for _ in range(2):
        backward()
        optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    backward()
    parameters[1].grad[7] = float("nan")
    optimizer.step()
    assert not guard.report.stepped
    assert "not finite" in guard.report.reason
    assert all(map(torch.equal, before, parameters))


def test_the_doctor_finds_it_right(path):
    route = doctor.accelerator_route()
    assert (route.device, route.path) == ("cuda", path)
    check = doctor.check(route)
    assert check.is_right, check


@pytest.mark.parametrize("places", [("cpu", "cuda"), ("cuda", "cpu")])
def test_tensors_that_are_offloaded_beside_others(places):
    """Norms are put together where the first of them is; those of the others are waited for."""
    parameters = [torch.nn.Parameter(torch.zeros(1000, device=place)) for place in places]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    held = [parameter.grad.double().cpu() for parameter in parameters]
    true = torch.cat(held).norm()
    norm = gk.get_total_norm([parameter.grad for parameter in parameters])
    assert float(norm) == pytest.approx(float(true), rel=1e-6)
    guard = gk.attach(torch.optim.SGD(parameters, lr=0.0), None)
    guard.optimizer.step()
    assert guard.report.norm == pytest.approx(
        float(true), rel=1e-7
    )  # short tensors on the CPU are added up in float32
    guard.detach()
    assert float(gk.clip_grad_norm_(parameters, 1.0)) == pytest.approx(float(true), rel=1e-6)
    for parameter, gradient in zip(parameters, held, strict=True):
        torch.testing.assert_close(parameter.grad.cpu().double(), gradient / true, rtol=1e-5, atol=0)


def test_under_a_default_device_a_step_is_captured_and_recorded_all_the_same(path, tmp_path):
    torch.set_default_device("cuda")
    try:
        _, optimizer, guard, backward = training(gk.policies.ZClip(), "cuda", record=tmp_path / "run.keel")
        for _ in range(6):
            backward()
            optimizer.step()
        norm = guard.report.norm
        assert is_captured(guard) == (path == "triton")
        guard.detach()
        with Reader(tmp_path / "run.keel") as run:
            assert run.totals().tolist()[-1] == norm
        assert gk.explain.explain(tmp_path / "run.keel").steps == 6
    finally:
        torch.set_default_device(None)
