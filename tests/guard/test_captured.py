"""What is captured of a step, without a GPU: on fake CUDA tensors, whose shapes are true and whose numbers are not.

The graphs are played: a capture runs its body once, and a replay leaves what the capture left. test_cuda.py has the
numbers.
"""

import pytest
import torch

import gradkeel as gk
from fake_cuda import fake_mode, without_device
from gradkeel.guard.captured import Captured, RowState
from gradkeel.guard.given import Given, Route
from gradkeel.policies.base import is_own
from policy_rows import ROWS

POLICIES = [
    pytest.param(None, id="none"),
    *(pytest.param(row.policy, id=row.id) for row in ROWS if is_own(row.policy)),
]


class Played:
    """Stands for `graph.Graph`."""

    def __init__(self, body):
        self.result = body()

    def replay(self):
        return self.result


@pytest.fixture(scope="module")
def fake():
    with fake_mode() as mode:
        yield mode


@pytest.fixture(autouse=True)
def _without_device(monkeypatch):
    without_device(monkeypatch)

    def copy_(self, source, non_blocking=False):  # torch's own asks for the device's context
        return torch.ops.aten.copy_.default(self, source, non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)


@pytest.fixture(autouse=True)
def _in(fake, _without_device):
    with fake, torch.no_grad():
        yield


def guarded(policy):
    parameters = [torch.nn.Parameter(torch.empty(shape, device="cuda")) for shape in ((4, 3), (3,), ())]
    optimizer = torch.optim.SGD(parameters, lr=0.1, fused=True)
    guard = gk.attach(optimizer, policy)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return optimizer, guard


@pytest.mark.parametrize("route", Route)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_leaves_a_row_of_its_own(policy, route):
    optimizer, guard = guarded(policy)
    roster = guard._roster
    given = Given(3, 1.0, None, None, tolerant=False, route=route)
    before = {label: state for label, state in roster.filled({}).items() if state}
    captured = Captured(optimizer, roster, before, given, Played)
    first = captured.replay(given, before)
    captured.apply(first, [p.grad for p in guard.parameters])
    second = captured.replay(Given(4, 1.0, None, None, tolerant=False, route=route), first.states)
    (main, *_) = second.reports()
    assert main.measured.step == 4
    assert main.measured.norms.shape == (3,)
    assert main.measured.total.shape == ()
    assert main.measured.norms is not first.reports()[0].measured.norms
    assert (second.may_step.dtype, second.may_step.shape) == (torch.bool, ())
    assert second.verdict.shape == (3,)
    assert (second.found_inf is None) == (route is Route.HOST)
    assert second.kernel_scale is None or route is Route.FOLDED
    assert second.states.keys() == before.keys()
    for label, state in second.states.items():
        assert isinstance(state, RowState)
        assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
            k: (v.shape, v.dtype) for k, v in before[label].items()
        }


def test_a_factor_for_all_is_folded_and_nothing_else_is_captured_for_it():
    optimizer, guard = guarded(gk.ClipByGlobalNorm(1.0))
    given = Given(3, 1.0, None, None, tolerant=False, route=Route.FOLDED)
    captured = Captured(optimizer, guard._roster, {}, given, Played)
    row = captured.replay(given, {})
    assert (row.kernel_scale.dtype, row.kernel_scale.shape) == (torch.float32, ())
    assert captured._apply is None


def test_writing_after_a_clamp_shows_in_the_versions():
    optimizer, guard = guarded(gk.ClipByValue(1.0))
    given = Given(3, 1.0, None, None, tolerant=False, route=Route.HOST)
    captured = Captured(optimizer, guard._roster, {}, given, Played)
    versions = [parameter.grad._version for parameter in guard.parameters]
    captured.apply(captured.replay(given, {}), [p.grad for p in guard.parameters])
    assert all(p.grad._version > old for p, old in zip(guard.parameters, versions, strict=True))
