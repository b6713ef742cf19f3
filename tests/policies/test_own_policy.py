"""A policy of one's own: what its decisions must look like, and that nothing is modified where they do not."""

import dataclasses
import math

import pytest
import torch

import gradkeel as gk
from gradkeel.kernels import native
from gradkeel.norms import Decision, Needs
from gradkeel.policies import Chain, ClipByGlobalNorm, ClipByNorm, ClipByValue, PerGroup, Policy, Warmup


@dataclasses.dataclass(frozen=True, eq=False)
class Own(Policy):
    given: dict
    unit_dim: int | None = None

    @property
    def needs(self):
        return Needs(unit_dim=self.unit_dim)

    @property
    def spec(self):
        raise TypeError

    def init(self, norms):
        return {}

    def decide(self, norms, state):
        return Decision(**self.given), state


def prepared(policy):
    """A guarded optimizer of a weight of 4 rows and a bias, 5 units, with gradients."""
    model = torch.nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, policy)
    model(torch.ones(2, 3)).sum().backward()
    return optimizer, guard


def tensors(guard):
    return [tensor.detach().clone() for p in guard.parameters for tensor in (p, p.grad)]


@pytest.fixture(params=["native", "torch"], autouse=True)
def _kernels(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip(native.unavailable())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "None"),
        (Decision(), "Decision"),
        ((None, {}), r"\(None, dict\)"),
        ((Decision(), None), r"\(Decision, None\)"),
        ((Decision(), {}, {}), r"\(Decision, dict, dict\)"),
    ],
)
def test_what_is_no_decision_and_a_state_is_named(given, words):
    class Odd(Own):
        def decide(self, norms, state):
            return given

    optimizer, guard = prepared(Odd({}))
    before = tensors(guard)
    with pytest.raises(TypeError, match=rf"Odd\(.*\): decide\(\) returned {words}; it must be \(Decision"):
        optimizer.step()
    for one, other in zip(before, tensors(guard), strict=True):
        assert torch.equal(one, other)


MISFITS = [
    (
        {"coefficients": [0.5] * 3},
        r"Own\(.*\(coefficients=...\) of list of shape \[3\]; .* a list of length 2",
    ),
    ({"coefficients": [0.5]}, r"coefficients=...\) of list of shape \[1\]"),
    ({"coefficients": torch.ones(1)}, r"coefficients=...\) of Tensor .*\[1\].*shape \[\] or \[2\]"),
    ({"coefficients": torch.ones(3)}, r"coefficients=...\) of Tensor of shape \[3\]"),
    ({"coefficients": torch.ones(2, 1)}, r"coefficients=...\) of Tensor of shape \[2, 1\]"),
    ({"coefficients": 1}, r"coefficients=...\) of 1; it must be a float"),
    ({"unit_coefficients": torch.ones(4)}, r"unit_coefficients=...\).*\[4\]; it must be .* \[5\]"),
    ({"unit_coefficients": torch.ones(())}, r"unit_coefficients=...\).*\[\]; it must be .* \[5\]"),
    ({"skip": torch.tensor([True, False])}, r"skip=...\) of Tensor of shape \[2\]; .* shape \[\]"),
    ({"skip": [True]}, r"skip=...\) of list of shape \[1\]; it must be a bool"),
    ({"clamp": 0.5}, r"clamp=...\) of 0.5; it must be \(lowest, highest\): two numbers"),
    ({"clamp": (-1.0, 0.0, 1.0)}, r"clamp=...\) of \(-1.0, 0.0, 1.0\); it must be"),
    ({"clamp": [1.0, -1.0]}, r"clamp=...\) of \(1.0, -1.0\); .* lowest not above highest"),
    ({"clamp": (-1.0, math.nan)}, r"clamp=...\) of \(-1.0, nan\); .* two numbers"),
    ({"clamp": (math.inf, math.inf)}, r"clamp=...\) of \(inf, inf\); .* two numbers"),
    ({"clamp": (None, 1.0)}, r"clamp=...\) of \(None, 1.0\); .* two numbers"),
    ({"clamp": ("-1", "1")}, r"clamp=...\) of \('-1', '1'\); .* two numbers"),
    ({"clamp": torch.tensor([-1.0, 1.0])}, r"clamp=...\) of Tensor of shape \[2\]; .* two numbers"),
]


@pytest.mark.parametrize(("given", "words"), MISFITS)
@pytest.mark.parametrize("within", ["alone", "Chain", "Warmup", "PerGroup"])
def test_a_decision_of_another_shape_is_named_before_anything_is_modified(given, words, within):
    own = Own(given, unit_dim=0)
    policies = {
        "alone": lambda: own,
        "Chain": lambda: Chain(ClipByGlobalNorm(0.1), own),
        "Warmup": lambda: Warmup(3, own, ClipByGlobalNorm(0.1)),
        "PerGroup": lambda: PerGroup(own),
    }
    optimizer, guard = prepared(policies[within]())
    before = tensors(guard)
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert guard.step == 0
    assert all(map(torch.equal, before, tensors(guard)))


def test_coefficients_of_units_need_units():
    optimizer, _ = prepared(Own({"unit_coefficients": torch.ones(5)}))
    with pytest.raises(ValueError, match="it must be None, for its needs have no unit_dim"):
        optimizer.step()


CLAMP = Own({"clamp": (-0.5, 0.5)})


@pytest.mark.parametrize(
    "policy",
    [
        Chain(CLAMP, ClipByGlobalNorm(0.1)),
        Chain(CLAMP, ClipByValue(0.1)),
        Warmup(3, Chain(CLAMP, ClipByGlobalNorm(0.1)), ClipByGlobalNorm(0.1)),
        PerGroup(CLAMP),
    ],
    ids=["first", "before another", "Warmup", "PerGroup"],
)
def test_a_clamp_is_refused_where_it_has_no_place(policy):
    """A chain would drop it before another stage, and PerGroup anywhere."""
    optimizer, guard = prepared(policy)
    before = tensors(guard)
    with pytest.raises(ValueError, match=r"clamp=...\) of \(-0.5, 0.5\); .* of all groups alike"):
        optimizer.step()
    assert guard.step == 0
    assert all(map(torch.equal, before, tensors(guard)))


@pytest.mark.parametrize("policy", [CLAMP, Chain(ClipByGlobalNorm(1e9), CLAMP), Warmup(3, CLAMP, None)])
def test_a_clamp_that_the_needs_do_not_tell_is_applied_where_it_has_its_place(policy):
    optimizer, guard = prepared(policy)
    optimizer.step()
    assert all(bool((p.grad == 0.5).all()) for p in guard.parameters)


@pytest.mark.parametrize(
    "given",
    [
        {"coefficients": 0.5},
        {"coefficients": [0.5, 0.5]},
        {"coefficients": torch.tensor(0.5)},
        {"coefficients": torch.tensor([0.5, 0.5])},
        {"unit_coefficients": torch.full((5,), 0.5)},
        {"coefficients": 0.5, "skip": False},
        {"coefficients": 0.5, "skip": torch.tensor(False)},
    ],
)
def test_every_shape_that_fits_is_applied(given):
    optimizer, guard = prepared(Own(given, unit_dim=0))
    before = [p.grad.clone() for p in guard.parameters]
    optimizer.step()
    assert guard.report.coefficient == 0.5
    assert all(torch.equal(p.grad, 0.5 * own) for p, own in zip(guard.parameters, before, strict=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Between(Own):
    """It hands norms of its own making to another policy."""

    @property
    def needs(self):
        return Needs()

    def decide(self, norms, state):
        for field, value in self.given.items():
            setattr(norms, field, value)
        assert isinstance(norms.known_total, float) == (native.kernels() is not None)
        return ClipByNorm(0.5).decide(norms, {})[0], state


@pytest.mark.parametrize("given", [torch.tensor([1.0, 2.0]), [1.0, 2.0]])
def test_norms_of_another_kind_are_read_as_what_they_are(given):
    optimizer, guard = prepared(Between({"norms": given}))
    before = [p.grad.clone() for p in guard.parameters]
    optimizer.step()
    for p, own, factor in zip(guard.parameters, before, (0.5, 0.25), strict=True):
        assert torch.equal(p.grad, factor * own)


class Clamps(Own):
    """It clamps entries, and its needs tell so."""

    @property
    def needs(self):
        return Needs(peaks=True)


@pytest.mark.parametrize("clamp", [(-0.5, 0.5), [-0.5, 0.5], (-math.inf, 0.5)])
@pytest.mark.parametrize("within", ["alone", "Chain", "Warmup"])
def test_a_clamp_that_the_needs_tell_is_applied_and_reported(clamp, within):
    own = Clamps({"clamp": clamp})
    policies = {"alone": own, "Chain": Chain(ClipByGlobalNorm(1e9), own), "Warmup": Warmup(3, own, None)}
    optimizer, guard = prepared(policies[within])
    optimizer.step()
    assert all(bool((p.grad == 0.5).all()) for p in guard.parameters)
    assert guard.report.clipped
    assert guard.report.clipped_norm < guard.report.norm


def test_what_clamps_has_no_place_where_groups_differ_or_before_another_stage():
    own = Clamps({"clamp": (-0.5, 0.5)})
    with pytest.raises(ValueError, match="'clip' key"):
        PerGroup(own, None)
    with pytest.raises(ValueError, match="put it last"):
        Chain(own, ClipByNorm(1.0))


class Reusing(Own):
    """It gives the same decision again and again, and writes to what is in it."""

    def decide(self, norms, state):
        factors = 1.0 / (1.0 + norms.norms)
        (given,) = self.given.values()
        coefficients = given.coefficients
        if isinstance(coefficients, list):
            coefficients[:] = factors.tolist()
        else:
            coefficients.copy_(factors if coefficients.dim() else factors.max())
        return given, state


class Fresh(Own):
    def decide(self, norms, state):
        return Reusing({"it": Decision(self.given["kind"]())}).decide(norms, state)


@pytest.mark.parametrize("within", [Chain, PerGroup, lambda *parts: Warmup(3, Chain(*parts), None)])
@pytest.mark.parametrize(
    "kind", [lambda: [1.0], lambda: torch.ones(1, dtype=torch.float64), lambda: torch.ones(())]
)
def test_a_decision_may_be_handed_out_again_within_a_step(within, kind):
    found = []
    for part in (Reusing({"it": Decision(kind())}), Fresh({"kind": kind})):
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2 if within is PerGroup else 1)]
        optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=1.0)
        gk.attach(optimizer, within(part, part))
        for i, weight in enumerate(weights):
            weight.grad = torch.tensor([3.0, 4.0]) * (1 + i)
        optimizer.step()
        found.append([weight.tolist() for weight in weights])
    assert found[0] == found[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Nothing(Own):
    def decide(self, norms, state):
        return None, state


@pytest.mark.parametrize("policy", [Warmup(2, Nothing({}), None), Warmup(2, None, Nothing({})), Nothing({})])
def test_none_is_no_decision_inside_of_others_either(policy):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    gk.attach(optimizer, policy)

    def steps():
        for _ in range(4):
            weight.grad = torch.ones(3)
            optimizer.step()

    with pytest.raises(TypeError, match=r"decide\(\) returned \(None"):
        steps()
