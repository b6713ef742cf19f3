"""How many operations a step launches on an accelerator does not depend on how many tensors there are.

Counted without one: on fake CUDA tensors, whose operations are seen and not run. A foreach operation counts once. Those
of torch.optim are among them, and do not grow either.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradkeel as gk
from fake_cuda import fake_mode, without_device
from policy_rows import ROWS

FEW, SOME, MANY = 4, 10, 300
DTYPES = [torch.float32, torch.bfloat16]
NO_LAUNCH = (
    "view", "unbind", "select", "slice", "alias", "detach", "expand", "reshape", "squeeze", "as_strided", "t.default",
    "transpose", "permute", "split", "lift_fresh", "prim.device", "empty", "device.default", "is_pinned",
)  # fmt: skip


POLICIES = [pytest.param(None, id="none"), *(pytest.param(row.policy, id=row.id) for row in ROWS)]


class Counting(TorchDispatchMode):
    """Counts operations that are no views; what the host asks of a number is answered with 1."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name == "aten._local_scalar_dense.default":
            return 1
        if not any(word in name for word in NO_LAUNCH):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def fake():
    with fake_mode() as mode:
        yield mode


@pytest.fixture(autouse=True)
def _without_device(monkeypatch):
    without_device(monkeypatch)


def parameters_of(count, dtype):
    parameters = []
    for i in range(count):
        shape = (64, 64) if i % 2 else (64,)
        parameters.append(torch.nn.Parameter(torch.empty(shape, device="cuda", dtype=dtype)))
        parameters[-1].grad = torch.empty(shape, device="cuda", dtype=dtype)
    return parameters


def launched(call):
    with Counting() as counting:
        call()
    return counting.found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "call",
    [
        lambda parameters: gk.clip_grad_norm_(parameters, 1.0),
        lambda parameters: gk.clip_grad_norm_(parameters, 1.0, norm_type=float("inf")),
        lambda parameters: gk.clip_grad_value_(parameters, 1.0),
        lambda parameters: gk.get_total_norm([p.grad for p in parameters]),
        lambda parameters: gk.clip_grads_with_norm_(parameters, 1.0, torch.ones((), device="cuda")),
    ],
    ids=["clip_grad_norm_", "inf-norm", "clip_grad_value_", "get_total_norm", "clip_grads_with_norm_"],
)
def test_drop_ins(call, dtype, fake):
    with fake:
        few, many = (launched(functools.partial(call, parameters_of(count, dtype))) for count in (FEW, MANY))
    assert few
    assert len(many) == len(few), set(many)


@functools.cache
def trained(count, dtype, fused):
    """An optimizer, which has made a step and so has state, and its parameters' gradients."""
    parameters = parameters_of(count, dtype)
    groups = [{"params": parameters[: count // 2]}, {"params": parameters[count // 2 :]}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, fused=fused, foreach=not fused)
    optimizer.step()
    return optimizer, parameters, [parameter.grad for parameter in parameters]


def step(policy, count, dtype, fused):
    """What a guarded step launches, from the second on: in the first one constants are made."""
    with Counting() as counting:
        optimizer, parameters, gradients = trained(count, dtype, fused)
        guard = gk.attach(optimizer, policy)
        try:
            for _ in range(2):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient  # a step that was skipped has cleared it
                counting.found.clear()
                optimizer.step()
            assert guard.step == 2
        finally:
            guard.detach()
    return counting.found


def assert_same(policy, dtype, fused, counts):
    few, many = (step(policy, count, dtype, fused) for count in counts)
    assert few
    assert len(many) == len(few), {name: (few.count(name), many.count(name)) for name in {*few, *many}}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_guarded_step(policy, dtype, fused, fake):
    with fake:
        assert_same(policy, dtype, fused, (FEW, SOME))  # a fake tensor is slow, so that there are not more


@pytest.mark.parametrize("policy", ["global-norm:1.0", "agc"])
def test_a_guarded_step_of_many_tensors(policy, fake):
    with fake:
        assert_same(policy, torch.bfloat16, True, (FEW, MANY))
