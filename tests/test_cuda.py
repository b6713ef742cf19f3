"""On a real GPU: right numbers by every path, no host sync, and a step that can be captured in a CUDA graph."""

import pytest
import torch

import gradkeel as gk
from gradkeel import doctor
from gradkeel.kernels import triton_host

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
]


@pytest.fixture(params=["foreach", "triton"], autouse=True)
def path(request, monkeypatch):
    """Which kernels do the work."""
    if request.param == "triton":
        pytest.importorskip("triton")
        monkeypatch.setenv(triton_host.VARIABLE, "on")
    triton_host.kernels.cache_clear()
    yield request.param
    triton_host.kernels.cache_clear()


def training(policy, device, dtype=torch.float32, fused=True):
    """Parameters, their optimizer and guard; and a function that sets this step's gradients."""
    shapes = [(3, 5), (70_000,), (64, 32, 3, 3), (1,), ()]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    parameters = [torch.nn.Parameter(value.to(device, dtype)) for value in drawn]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    guard = gk.attach(optimizer, policy)

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
    assert gpu_norm == pytest.approx(
        norm, rel=1e-9
    )  # float64 sums in another order, of rounded parameters' gradients
    assert gpu_coefficient == pytest.approx(coefficient, rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        # one rounding of the gradient's dtype
        torch.testing.assert_close(one, other, rtol=2.0 * torch.finfo(dtype).eps, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_host_sync(policy):
    _, optimizer, guard, backward = training(policy, "cuda")
    for _ in range(3):  # states are created, constants are made
        backward()
        optimizer.step()
    backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.report.stepped


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_step_can_be_captured(policy):
    parameters, optimizer, guard, backward = training(policy, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        backward()
        for _ in range(3):
            optimizer.step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            optimizer.step()
    before = [parameter.detach().clone() for parameter in parameters]
    graph.replay()
    torch.cuda.synchronize()
    assert all(not torch.equal(old, new) for old, new in zip(before, parameters, strict=True))
    assert guard.report.norm > 0


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
