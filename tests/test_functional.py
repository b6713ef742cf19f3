"""torch's four functions: torch's signatures and numbers, and right where torch's are not."""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import utils

import gradkeel as gk
import reference

NORM_TYPES = [2.0, 1.0, 3.0, 0.5, math.inf, -math.inf, -1.0]
SHAPES = [(), (1,), (7,), (3, 4), (2, 3, 5), (1, 0, 2), (4097,), (3, 4096)]


def parameters_of(*gradients):
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def gradients_of(parameters):
    return [parameter.grad for parameter in parameters]


@st.composite
def gradients(draw, dtypes=(torch.float32, torch.float64), shapes=tuple(SHAPES), powers=(-6, 6)):
    """One to five gradients of different sizes, dtypes and magnitudes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return [
        (
            10.0 ** draw(st.integers(*powers)) * torch.randn(shape, generator=generator, dtype=torch.float64)
        ).to(dtype)
        for shape, dtype in draw(
            st.lists(st.tuples(st.sampled_from(shapes), st.sampled_from(dtypes)), min_size=1, max_size=5)
        )
    ]


FULL = tuple(shape for shape in SHAPES if math.prod(shape))  # torch has no inf-norm of an empty tensor


# -- parity ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]
)
def test_signatures_are_torchs(name):
    theirs, ours = (inspect.signature(getattr(module, name)) for module in (utils, gk))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]


@given(
    gradients(shapes=FULL),
    st.sampled_from(NORM_TYPES),
    st.floats(1e-4, 1e4),
    st.sampled_from([None, True, False]),
)
def test_clip_grad_norm_is_torchs(given_gradients, norm_type, share, foreach):
    theirs, ours = parameters_of(*given_gradients), parameters_of(*given_gradients)
    bound = share * reference.norm(given_gradients, norm_type)
    wanted = utils.clip_grad_norm_(theirs, bound, norm_type, foreach=foreach)
    got = gk.clip_grad_norm_(ours, bound, norm_type, foreach=foreach)
    # torch's own rounding, in float32 and over up to 12,288 entries; ours is a few 1e-8 from float64.
    torch.testing.assert_close(got.double(), wanted.double(), rtol=5e-6, atol=0)
    torch.testing.assert_close(gradients_of(ours), gradients_of(theirs), rtol=5e-6, atol=0)
    if bound > float(wanted) + 1e-6:
        assert all(map(torch.equal, gradients_of(ours), given_gradients))


@given(gradients(), st.sampled_from(NORM_TYPES), st.floats(1e-4, 1e4))
def test_clip_grad_norm_is_its_float64_twin(given_gradients, norm_type, share):
    parameters = parameters_of(*given_gradients)
    total = reference.norm(given_gradients, norm_type)
    bound = max(share * total, 1e-30)
    norm = gk.clip_grad_norm_(parameters, bound, norm_type)
    # where there is no native kernel: float32 sums of up to 4096 powers, then float64; then one rounding
    assert float(norm) == pytest.approx(total, rel=5e-6)
    wanted = reference.clip_by_global_norm(given_gradients, bound, norm_type, eps=1e-6)
    torch.testing.assert_close(gradients_of(parameters), wanted, rtol=6e-6, atol=1e-44)


@given(gradients((torch.bfloat16, torch.float16), FULL, powers=(-3, 3)), st.floats(1e-3, 1e3))
def test_low_precision_gradients_have_norms_of_single_precision(given_gradients, share):
    total = reference.norm(given_gradients)
    parameters = parameters_of(*given_gradients)
    norm = gk.clip_grad_norm_(parameters, max(share * total, 1e-30))
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(total, rel=2e-6)
    wanted = reference.clip_by_global_norm(given_gradients, max(share * total, 1e-30), eps=1e-6)
    for got, want in zip(gradients_of(parameters), wanted, strict=True):
        # the same real number, rounded once, may fall on either side
        torch.testing.assert_close(got, want, rtol=torch.finfo(got.dtype).eps, atol=1e-7)


@given(gradients(), st.floats(1e-6, 1e6), st.sampled_from([None, True, False]))
def test_clip_grad_value_is_torchs(given_gradients, bound, foreach):
    theirs, ours = parameters_of(*given_gradients), parameters_of(*given_gradients)
    utils.clip_grad_value_(theirs, bound, foreach=False)
    gk.clip_grad_value_(ours, bound, foreach=foreach)
    assert all(map(torch.equal, gradients_of(ours), gradients_of(theirs)))
    assert all(map(torch.equal, gradients_of(ours), reference.clip_by_value(given_gradients, -bound, bound)))


@given(gradients(shapes=FULL), st.sampled_from(NORM_TYPES))
def test_get_total_norm_is_torchs(given_gradients, norm_type):
    theirs, ours = (
        utils.get_total_norm(given_gradients, norm_type),
        gk.get_total_norm(given_gradients, norm_type),
    )
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=5e-6, atol=0)
    assert float(ours) == pytest.approx(reference.norm(given_gradients, norm_type), rel=5e-6)


@given(gradients(shapes=FULL), st.floats(1e-3, 1e3))
def test_the_two_halves_make_the_whole(given_gradients, bound):
    whole, halves, theirs = (parameters_of(*given_gradients) for _ in range(3))
    gk.clip_grad_norm_(whole, bound)
    gk.clip_grads_with_norm_(halves, bound, gk.get_total_norm(gradients_of(halves)))
    utils.clip_grads_with_norm_(theirs, bound, utils.get_total_norm(gradients_of(theirs)))
    # The norm is rounded to float32 on its way, and each product once: 6e-8 for the one, 1.2e-7 apart in the other.
    torch.testing.assert_close(gradients_of(whole), gradients_of(halves), rtol=3e-7, atol=0)
    torch.testing.assert_close(gradients_of(theirs), gradients_of(halves), rtol=5e-6, atol=0)


def test_the_zero_norm_counts_entries():
    assert gk.get_total_norm([torch.tensor([1.0, 0.0, 2.0]), torch.tensor([5.0])], 0) == 3


def test_a_norm_type_may_be_a_word():
    (parameter,) = parameters_of(torch.tensor([3.0, -4.0]))
    assert gk.clip_grad_norm_([parameter], 100.0, "inf") == 4.0
    assert gk.get_total_norm([torch.tensor([3.0, -4.0])], "inf") == 4.0


@pytest.mark.parametrize(
    "bound", [1, True, "1.0", np.float32(1.0), np.float64(1.0), np.int64(1), torch.tensor(1.0)]
)
def test_a_bound_may_be_whatever_torch_takes(bound):
    (parameter,) = parameters_of(torch.tensor([3.0, 4.0]))
    gk.clip_grad_norm_([parameter], bound)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    gk.clip_grad_value_([parameter], bound)


def test_what_is_returned():
    assert gk.clip_grad_norm_([], 1.0).item() == 0.0
    assert gk.clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0).dtype == torch.float32
    for dtype, wanted in [(torch.float64, torch.float64), (torch.float16, torch.float32)]:
        norm = gk.clip_grad_norm_(parameters_of(torch.ones(4, dtype=dtype)), 10.0)
        assert (norm.dtype, norm.shape, norm.item()) == (wanted, (), 2.0)
    assert gk.clip_grad_value_([], 1.0) is None
    assert gk.clip_grads_with_norm_([], 1.0, torch.tensor(1.0)) is None
    assert gk.get_total_norm([]) == 0.0


def test_one_tensor_may_stand_for_a_list():
    (parameter,) = parameters_of(torch.tensor([3.0, 4.0]))
    assert gk.get_total_norm(parameter.grad) == 5.0
    assert gk.clip_grad_norm_(parameter, 10.0) == 5.0
    gk.clip_grads_with_norm_(parameter, 1.0, torch.tensor(5.0))
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)
    gk.clip_grad_value_(parameter, 0.7)
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.7], rel=1e-6)


def test_the_blow_up_of_the_tutorial():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.unused = nn.Linear(1, 1), nn.Linear(2, 2)
            nn.init.ones_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    net = Net()
    (net.linear(torch.tensor([[10.0]])) - 4.0).square().sum().backward()
    assert (net.linear.weight.grad.item(), net.linear.bias.grad.item()) == (120.0, 12.0)
    gk.clip_grad_value_(net.linear.weight, 1.1)
    assert net.linear.weight.grad.item() == pytest.approx(1.1, rel=1e-7)
    assert net.linear.bias.grad.item() == 12.0
    gk.clip_grad_value_(net.parameters(), 1.1)
    gk.clip_grad_norm_(net.parameters(), 1.0)
    assert net.unused.weight.grad is None


# -- where torch is wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gradient", "true"),
    [
        (torch.full((100,), 1e20), 1e21),
        (torch.full((100,), 1e-30), 1e-29),
        (torch.full((1000,), 3000.0, dtype=torch.float16), 94868.3298),
        (torch.full((10000,), 3e38), 3e40),
        (torch.full((1000,), 1.0, dtype=torch.bfloat16), 31.6227766),
        (torch.full((100,), 1e200, dtype=torch.float64), 1e201),
        (torch.full((100,), 1e-200, dtype=torch.float64), 1e-199),
    ],
)
def test_a_finite_gradient_has_a_finite_norm(gradient, true):
    (parameter,) = parameters_of(gradient)
    # the entries as the dtype has them
    true = math.sqrt(gradient.numel()) * gradient[0].double().item()
    norm = gk.clip_grad_norm_([parameter], true / 2)
    assert norm.double().item() == pytest.approx(true, rel=2e-6)
    # torch's epsilon of 1e-6 is all there is beside a norm of 1e-29
    halved = true / 2 / (true + 1e-6)
    assert parameter.grad[0].double().item() == pytest.approx(
        gradient[0].double().item() * halved, rel=4e-3 if gradient.dtype == torch.bfloat16 else 1e-3
    )


@pytest.mark.parametrize("switch", ["on", "off"])
@pytest.mark.parametrize(
    ("tensors", "norm_type", "total", "dtype"),
    [
        ([torch.full((100,), 1e-30)], 2.0, 1e-29, torch.float32),
        ([torch.full((4,), 1e-40)], 2.0, 2e-40, torch.float32),
        ([torch.full((50,), 1e-30), torch.full((5, 10), 1e-30)], 2.0, 1e-29, torch.float32),
        ([torch.full((8192,), 1e-30)], 2.0, 8192**0.5 * 1e-30, torch.float32),
        ([torch.full((4,), 1e-30, dtype=torch.bfloat16)], 3.0, 4 ** (1 / 3) * 1e-30, torch.float32),
        ([torch.full((100,), 1e-200, dtype=torch.float64)], 2.0, 1e-199, torch.float64),
        ([torch.full((100,), 1e-200, dtype=torch.float64), torch.zeros(2)], 2.0, 1e-199, torch.float64),
        # The harmonic sum of two of the smallest numbers is half of one, which float32 does not have.
        ([torch.full((2,), 2.0**-149)], -1.0, 2.0**-150, torch.float64),
        ([torch.full((100,), 3e38)], 2.0, 3e39, torch.float64),
        ([torch.full((4,), 2e200, dtype=torch.float64)] * 4, -2.0, 5e199, torch.float64),
        ([torch.full((4,), 2e-200, dtype=torch.float64), torch.ones(2)], -2.0, 1e-200, torch.float64),
        ([torch.zeros(3)], 2.0, 0.0, torch.float32),
    ],
)
def test_a_total_norm_neither_underflows_nor_overflows(tensors, norm_type, total, dtype, switch, found):
    found.setenv("GRADKEEL_NATIVE", switch)
    norm = gk.get_total_norm(tensors, norm_type)
    assert norm.dtype == dtype
    # the entries as float32 (2^-24) has them; bfloat16's 8 digits, and denormal ones' 17
    assert norm.item() == pytest.approx(total, rel=4e-3 if tensors[0].dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("empty", [torch.zeros(0), torch.zeros(3, 0, dtype=torch.float64)])
@pytest.mark.parametrize("norm_type", [-1.0, -2.0, -math.inf])
def test_an_empty_tensor_has_no_smallest_entry(norm_type, empty):
    full = torch.tensor([2.0, -4.0])
    wanted = reference.norm([full], norm_type)
    for tensors in ([full, empty], [empty, full], [empty, full, empty]):
        assert gk.get_total_norm(tensors, norm_type).item() == pytest.approx(wanted, rel=1e-6)  # float32
    assert gk.get_total_norm([empty], norm_type) == 0.0
    parameters = parameters_of(empty, full)
    assert gk.clip_grad_norm_(parameters, wanted / 2, norm_type).item() == pytest.approx(wanted, rel=1e-6)
    assert parameters[1].grad.tolist() == pytest.approx([1.0, -2.0], rel=1e-5)  # torch's epsilon of 1e-6
    # A zero entry makes such a norm zero, and an empty tensor does not undo that.
    assert gk.get_total_norm([torch.tensor([0.0, 3.0]), empty], norm_type) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_nonfinite_norm_leaves_gradients_alone(bad):
    parameters = parameters_of(torch.tensor([1.0, bad]), torch.tensor([3.0]))
    norm = gk.clip_grad_norm_(parameters, 1.0)
    assert str(norm.item()) == str(bad)
    assert torch.equal(parameters[1].grad, torch.tensor([3.0]))
    assert parameters[0].grad[0] == 1.0
    gk.clip_grads_with_norm_(parameters, 1.0, norm)
    assert torch.equal(parameters[1].grad, torch.tensor([3.0]))


def test_error_if_nonfinite_modifies_nothing():
    parameters = parameters_of(torch.tensor([30.0, math.inf]), torch.tensor([40.0]))
    with pytest.raises(RuntimeError, match=r"The total norm of order 2.0 for gradients .* is non-finite"):
        gk.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
    with pytest.raises(gk.NonFiniteGradientError):
        gk.get_total_norm(gradients_of(parameters), error_if_nonfinite=True)
    assert [p.grad.tolist() for p in parameters] == [[30.0, math.inf], [40.0]]
    gk.clip_grad_norm_(parameters[1:], 1.0, error_if_nonfinite=True)


def test_a_parameter_given_twice_counts_once():
    (parameter,) = parameters_of(torch.tensor([3.0, 4.0]))
    assert gk.clip_grad_norm_([parameter, parameter], 1.0) == 5.0
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


def test_sparse_and_complex_gradients():
    sparse = torch.sparse_coo_tensor([[0, 0, 2]], [1.0, 2.0, 4.0], (4,), check_invariants=True)
    (parameter,) = parameters_of(torch.zeros(4))
    parameter.grad = sparse
    assert gk.clip_grad_norm_([parameter], 1.0) == 5.0
    assert parameter.grad.to_dense().tolist() == pytest.approx([0.6, 0, 0.8, 0], rel=1e-6)
    gk.clip_grad_value_([parameter], 0.7)
    assert parameter.grad.to_dense().tolist() == pytest.approx([0.6, 0, 0.7, 0], rel=1e-6)
    (parameter,) = parameters_of(torch.tensor([3.0 - 4.0j]))
    assert gk.clip_grad_norm_([parameter], 100.0) == 5.0
    gk.clip_grad_value_([parameter], 1.0)
    assert parameter.grad.item() == 1.0 - 1.0j


# -- bounds and inputs --------------------------------------------------------------------------------------------


def test_a_bound_of_zero_gives_zero_and_an_infinite_one_only_measures():
    (parameter,) = parameters_of(torch.tensor([3.0, 4.0]))
    assert gk.clip_grad_norm_([parameter], math.inf) == 5.0
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert gk.clip_grad_norm_([parameter], 0.0) == 5.0
    assert parameter.grad.tolist() == [0.0, 0.0]


def test_zero_gradients_stay_zero():
    (parameter,) = parameters_of(torch.zeros(3))
    assert gk.clip_grad_norm_([parameter], 1.0) == 0.0
    assert parameter.grad.tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("bound", "kind"),
    [
        (-1.0, ValueError),
        (math.nan, ValueError),
        ("-1", ValueError),
        ("one", ValueError),
        (None, TypeError),
        (torch.ones(2), TypeError),
        (1j, TypeError),
    ],
)
@pytest.mark.parametrize(
    "clip",
    [
        gk.clip_grad_norm_,
        gk.clip_grad_value_,
        lambda p, bound: gk.clip_grads_with_norm_(p, bound, torch.tensor(5.0)),
    ],
)
def test_a_bound_that_is_none_is_an_error(clip, bound, kind):
    (parameter,) = parameters_of(torch.tensor([3.0, 4.0]))
    with pytest.raises(kind, match="must be a"):
        clip([parameter], bound)
    assert parameter.grad.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("clip", [gk.clip_grad_norm_, gk.clip_grad_value_])
def test_gradients_in_place_of_parameters_are_an_error(clip):
    with pytest.raises(TypeError, match="they look like gradients; pass the parameters themselves"):
        clip([torch.ones(2)], 1.0)


def test_parameters_in_place_of_gradients_are_an_error():
    net = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="whose norm is that of the weights"):
        gk.get_total_norm(net.parameters())
    assert gk.get_total_norm([p.detach() for p in net.parameters()]) > 0


@pytest.mark.parametrize("clip", [gk.clip_grad_norm_, gk.clip_grad_value_])
def test_an_exhausted_generator_warns(clip):
    parameters = nn.Linear(2, 2).parameters()
    clip(parameters, 1.0)
    with pytest.warns(
        UserWarning, match="^`parameters` is an empty generator, no gradient clipping will occur.$"
    ):
        clip(parameters, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip([], 1.0)


def test_what_is_no_tensor_is_an_error():
    with pytest.raises(TypeError, match="parameters must be tensors, not str"):
        gk.clip_grad_norm_(["weight"], 1.0)
    with pytest.raises(TypeError, match="tensors, not dict"):
        gk.get_total_norm([{}])


def test_a_norm_type_that_is_none_is_an_error():
    with pytest.raises(ValueError, match="norm_type"):
        gk.clip_grad_norm_(parameters_of(torch.ones(2)), 1.0, math.nan)


def test_a_default_device_does_not_say_where_a_norm_is():
    (parameter,) = parameters_of(torch.full((4,), 3.0))
    total = torch.tensor(6.0)
    with torch.device("meta"):
        gk.functional.clip_grads_with_norm_(parameter, 3.0, total)
        norm = gk.functional.clip_grad_norm_(parameter, 10.0)
    assert norm.is_cpu
    assert float(norm) == pytest.approx(3.0)
