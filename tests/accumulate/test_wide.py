"""Sums in a wider dtype: the same by the native kernels, by torch's operations, and entry by entry."""

import pytest
import torch

from gradkeel.accumulate import wide
from gradkeel.kernels import native


@pytest.fixture(params=["native", "torch"])
def path(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(native, "kernels", lambda: None)
    elif native.kernels() is None:
        pytest.skip(native.unavailable())


def layouts(dtype):
    """Gradients that lie as their sums do, and in the end those that do not."""
    shapes = [(), (3,), (wide.CHUNK + 5,), (2 * wide.CHUNK,), (0, 2), (4, 5, 6)]
    return [
        *(torch.randn(shape).to(dtype) for shape in shapes),
        torch.randn(30, 20).to(dtype).t(),
        torch.randn(1).to(dtype).expand(7),
        torch.randn(9).to(dtype)[::2],
    ]


def added(sums, gradients):
    """What plain additions give, entry by entry; then ``add_`` does the same in place."""
    # Adding in the sum's dtype is one rounding, by whatever path.
    wanted = [total + gradient.to(total.dtype) for total, gradient in zip(sums, gradients, strict=True)]
    wide.add_(sums, gradients)
    return wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
def test_every_layout_adds_up(path, narrow, dtype):
    """One gradient a list, for one that the kernel cannot take sends its whole list another way; then all at once."""
    gradients = layouts(narrow)
    for gradient in gradients:
        total = torch.randn(gradient.shape, dtype=dtype)
        (wanted,) = added([total], [gradient])
        assert torch.equal(total, wanted)
    for some in (gradients[:6], gradients):
        sums = [torch.randn(gradient.shape, dtype=dtype) for gradient in some]
        assert all(map(torch.equal, added(sums, some), sums))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_sums_that_lie_otherwise_add_up(path, narrow):
    """A sum begins as the first gradient of its parameter, which may be transposed, and the next one not."""
    gradient = torch.randn(30, 20).to(narrow)
    for other in (gradient, gradient.t().contiguous().t()):
        total = torch.randn(20, 30).t()
        (wanted,) = added([total], [other])
        assert torch.equal(total, wanted)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_sums_that_are_narrow_themselves_add_up(path, narrow):
    total, gradient = torch.randn(50).to(narrow), torch.randn(50).to(narrow)
    (wanted,) = added([total], [gradient])
    assert torch.equal(total, wanted)


@pytest.mark.parametrize(
    ("total_is_negated", "gradient_is_negated"), [(False, True), (True, False), (True, True)]
)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float32])
def test_what_torch_keeps_negated_counts_as_it_is(path, narrow, total_is_negated, gradient_is_negated):
    total, gradient = torch.tensor([1.0, 7.0]), torch.tensor([2.0, 4.0]).to(narrow)
    if total_is_negated:
        total = total._neg_view()
    if gradient_is_negated:
        gradient = gradient._neg_view()
    (wanted,) = added([total], [gradient])
    assert torch.equal(total, wanted)


@pytest.mark.skipif(native.kernels() is None, reason="no native kernels here")
def test_the_native_kernel_takes_what_lies_alike(monkeypatch):
    """Otherwise the tests above would compare torch with itself."""
    lengths, add = [], native.Kernels.add

    def counted(kernels, to, of):
        lengths.append(len(to.tensors))
        add(kernels, to, of)

    monkeypatch.setattr(native.Kernels, "add", counted)
    gradients = layouts(torch.bfloat16)[:6]
    wide.add_([torch.zeros(gradient.shape) for gradient in gradients], gradients)
    assert lengths == [6]


def test_a_gradient_of_another_length_is_refused(path):
    with pytest.raises(RuntimeError, match="size"):
        wide.add_([torch.ones(3)], [torch.ones(5, dtype=torch.bfloat16)])


def test_a_gradient_that_comes_again_is_summed_and_cleared(path):
    parameters = [torch.nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16)) for _ in range(2)]
    sums = wide.WideSums(torch.float32)
    for _ in range(300):
        parameters[0].grad = torch.full((4, 3), 1.0 + 2.0**-7, dtype=torch.bfloat16)
        sums.take(parameters)
    assert parameters[0].grad is None
    assert list(sums.sums) == parameters[:1]
    assert torch.equal(sums.sums[parameters[0]], torch.full((4, 3), 300 * (1.0 + 2.0**-7)))
