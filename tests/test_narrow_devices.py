"""Devices without float64, such as Apple's, are never asked for it: seen on fake tensors, which say they are there."""

import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gradkeel as gk
from fake_cuda import fake_mode, inverted
from gradkeel.measure import wide_dtype
from policy_rows import ROWS

POLICIES = [pytest.param(None, id="none"), *(pytest.param(row.policy, id=row.id) for row in ROWS)]
DTYPES = [torch.float32, torch.bfloat16]


class Narrow(TorchDispatchMode):
    """Refuses float64, as the device would; what the host asks of a number is answered with 1."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) == "aten._local_scalar_dense.default":
            return 1
        found = function(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and one.device.type == "mps":
                assert one.dtype != torch.float64, f"{function} made float64"
        return found


@pytest.fixture(scope="module", autouse=True)
def _fake():
    with fake_mode() as mode, mode:
        yield


def parameters_of(dtype):
    parameters = [
        torch.nn.Parameter(torch.empty(shape, device="mps", dtype=dtype)) for shape in [(64, 64), (64,), ()]
    ]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return parameters


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_the_functions(dtype, norm_type):
    parameters = parameters_of(dtype)
    with Narrow():
        gk.clip_grad_norm_(parameters, 1.0, norm_type)
        gk.clip_grad_value_(parameters, 1.0)
        total = gk.get_total_norm([parameter.grad for parameter in parameters], norm_type)
        gk.clip_grads_with_norm_(parameters, 1.0, total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_guarded_steps(policy, dtype, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__invert__", inverted)  # torch's own asks for the device's context
    parameters = parameters_of(dtype)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    guard = gk.attach(optimizer, policy)
    with Narrow():
        for _ in range(2):
            guard.log(loss=parameters[0].grad.sum())
            optimizer.step()
            for selection in guard.report.selections:
                selection.clipped_total(), selection.outcome.coefficients(), selection.outcome.bound()


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.float64), (False, torch.float32)])
def test_an_xpu_is_asked(has_it, expected, monkeypatch):
    properties = types.SimpleNamespace(has_fp64=has_it)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties)
    assert wide_dtype(torch.device("xpu", 0)) == expected
