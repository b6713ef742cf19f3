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


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
def test_every_layout_adds_up(path, narrow):
    gradients = [torch.randn(shape).to(narrow) for shape in [(), (3,), (wide.CHUNK + 5,), (0, 2), (4, 5, 6)]]
    gradients += [
        torch.randn(30, 20).to(narrow).t(),
        torch.randn(1).to(narrow).expand(7),
        torch.randn(9).to(narrow)[::2],
    ]
    # The last ones lie otherwise than their sums do.
    sums = [torch.randn(gradient.shape) for gradient in gradients]
    wanted = [total + gradient.float() for total, gradient in zip(sums, gradients, strict=True)]
    wide.add_(sums, gradients)
    assert all(map(torch.equal, sums, wanted))


def test_what_torch_keeps_negated_counts_as_it_is(path):
    gradient = torch.full((1,), 2.0)
    sums = [torch.ones(1), torch.ones(1)._neg_view()]
    wide.add_(sums, [gradient._neg_view(), gradient])
    assert [total.item() for total in sums] == [-1.0, 1.0]


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
