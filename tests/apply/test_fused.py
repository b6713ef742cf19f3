"""What may be folded into which optimizer's kernel."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn, optim

import gradkeel as gk
import reference
from gradkeel.apply import fused
from gradkeel.apply.fused import can_fold, can_skip_on_device, kernel_scale, reads_grad_scale
from optimizers import BY_NAME, CASES, FUSED

CPU = torch.device("cpu")


def made(case):
    model, _ = case.problem()
    return case.make(list(model.parameters()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_fused_kernels_are_given_a_scale(case):
    optimizer = made(case)
    parameters = optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    assert can_fold(optimizer, parameters) == case.name.endswith("-fused")


@pytest.mark.parametrize("kind", FUSED, ids=lambda kind: kind.__name__)
def test_the_kernel_divides_by_the_scale(kind):
    """What the list of kernels claims, of each kernel: torch may change one."""
    case = BY_NAME[f"{kind.__name__}-fused"]
    folded, plain = made(case), made(case)
    for optimizer, factor in [(folded, 4.0), (plain, 1.0)]:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.full_like(parameter, factor)
    folded.grad_scale = kernel_scale(0.25, CPU)
    folded.step()
    plain.step()
    # a power of two: bit-identical
    for ours, theirs in zip(*(o.param_groups[0]["params"] for o in (folded, plain)), strict=True):
        assert torch.equal(ours, theirs)


def test_not_where_a_group_is_not_fused():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    groups = [{"params": [first], "fused": True}, {"params": [second], "fused": False}]
    optimizer = optim.AdamW(groups, lr=0.1)
    assert not reads_grad_scale(optimizer, CPU)
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    first.grad, second.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    optimizer.step()
    assert guard.report.norm == 5.0
    assert second.grad[1].item() == pytest.approx(0.8)


def test_not_for_subclasses_whose_kernels_are_unknown():
    class Own(optim.SGD):
        pass

    assert not reads_grad_scale(Own([nn.Parameter(torch.ones(2))], lr=0.1, fused=True), CPU)


def test_not_on_devices_whose_kernels_pass_it_over():
    optimizer = optim.AdamW([nn.Parameter(torch.ones(2))], lr=0.1, fused=True)
    assert reads_grad_scale(optimizer, CPU)
    assert not reads_grad_scale(optimizer, torch.device("mps"))
    assert not can_skip_on_device(optimizer, torch.device("mps"), optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_not_for_other_dtypes_than_float32(dtype):
    parameter = nn.Parameter(torch.zeros(8, dtype=dtype))
    optimizer = optim.AdamW([parameter], lr=0.1, fused=True)
    parameter.grad = torch.full_like(parameter, 2.0)
    assert not can_fold(optimizer, [parameter])
    guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
    optimizer.step()
    assert reference.norm([parameter.grad]) == pytest.approx(1.0, rel=torch.finfo(dtype).eps)
    assert guard.report.clipped


@pytest.mark.parametrize("spec", ["norm:1.0", "value:1.0", "agc:0.01"])
def test_not_where_tensors_or_entries_have_their_own_coefficients(spec):
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, 2))]
    optimizer = optim.SGD(parameters, lr=0.1, fused=True)
    gk.attach(optimizer, spec)
    seen = []
    optimizer.register_step_pre_hook(
        lambda optimizer, args, kwargs: seen.append(hasattr(optimizer, "grad_scale"))
    )
    for parameter, size in zip(parameters, (3.0, 30.0), strict=True):
        parameter.grad = torch.full_like(parameter, size)
    optimizer.step()
    assert seen == [False]


def test_not_where_a_group_has_its_own_policy_or_something_is_excluded():
    for extra in ({"clip": "norm:0.1"}, {"clip": None}):
        first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        groups = [{"params": [first]}, {"params": [second], **extra}]
        optimizer = optim.SGD(groups, lr=1.0, fused=True)
        gk.attach(optimizer, gk.ClipByGlobalNorm(1.0))
        first.grad, second.grad = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])
        optimizer.step()
        assert first.tolist() == pytest.approx([-0.6, -0.8])
        assert second.norm().item() == pytest.approx(0.1 if extra["clip"] else 5.0)


def test_never_a_skip_on_the_device_on_cpu():
    optimizer = made(BY_NAME["AdamW-fused"])
    assert not can_skip_on_device(optimizer, CPU, optimizer.param_groups[0]["params"])


@pytest.fixture
def arrivals(monkeypatch):
    """As if the Triton kernels scaled; what the device knows arrives when the test says so."""
    there = []

    class Late:
        def __init__(self, device):
            self.number = len(there)
            there.append(False)

        def is_there(self):
            return there[self.number]

    monkeypatch.setattr(fused.triton_host, "kernels", lambda device: SimpleNamespace(fault=None))
    monkeypatch.setattr(fused, "Arrival", Late)
    return there


def test_folding_pays_once_most_steps_are_known_to_be_scaled(arrivals):
    folding = fused.Folding()
    for _ in range(3):
        assert not folding.pays(torch.tensor(0.5))  # nothing is known yet
    arrivals[0] = True
    assert folding.pays(torch.tensor(1.0))  # one of one
    for _ in range(fused.Folding.REMEMBERED + 4):
        arrivals[:] = [True] * len(arrivals)
        folding.pays(torch.tensor(1.0))
    assert not folding.pays(torch.tensor(0.5))  # the scaled ones are forgotten


def test_folding_pays_always_where_the_other_way_writes_all_gradients():
    assert fused.Folding().pays(torch.tensor(1.0))


def test_folding_does_not_pay_where_half_of_the_steps_are_scaled(arrivals):
    folding = fused.Folding()
    for step in range(20):
        folding.pays(torch.tensor(0.5 if step % 2 else 1.0))
    arrivals[:] = [True] * len(arrivals)
    assert not folding.pays(torch.tensor(0.5))


def test_a_skip_on_the_device_waits_for_the_state_of_every_parameter(monkeypatch):
    meta = torch.device("meta")
    monkeypatch.setattr(fused, "HONOURING", ("meta",))
    parameters = [nn.Parameter(torch.zeros(2, device=meta)) for _ in range(2)]
    optimizer = optim.AdamW(parameters, lr=0.1)
    optimizer.param_groups[0]["fused"] = True  # torch refuses it on this device
    for parameter in parameters:
        parameter.grad = torch.zeros(2, device=meta)
    assert not can_skip_on_device(optimizer, meta, parameters)
    for parameter in parameters:
        optimizer.state[parameter]["step"] = torch.zeros(())
    assert can_skip_on_device(optimizer, meta, parameters)
    assert can_skip_on_device(optimizer, meta, parameters)  # from what is remembered
    del optimizer.state[parameters[1]]
    assert not can_skip_on_device(optimizer, meta, parameters)
    parameters[1].grad = None
    assert can_skip_on_device(optimizer, meta, parameters)
    optimizer.param_groups[0]["fused"] = False
    assert not can_skip_on_device(optimizer, meta, parameters)
