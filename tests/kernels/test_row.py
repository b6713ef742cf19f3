"""Many small tensors in one piece of memory, read back as they were."""

import math

import torch

from gradkeel.kernels.row import packed, read


def test_every_tensor_comes_back_bit_by_bit():
    tensors = [
        torch.randn(3, 2, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.tensor(False),
        torch.tensor([-(2**62), 5]),
        torch.tensor([math.nan, math.inf, -0.0, 5e-324], dtype=torch.float64),
        torch.tensor(0.1),
        torch.zeros(0, dtype=torch.float64),
        torch.randn(4, 4, dtype=torch.float64).t(),
        torch.ones((), dtype=torch.float64).expand(3),
    ]
    words, places = packed(tensors)
    assert words.shape == (sum(tensor.numel() for tensor in tensors),)
    kept = words.clone()
    for tensor, place in zip(tensors, places, strict=True):
        found = read(kept, place)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)
    assert math.copysign(1, read(kept, places[4])[2]) == -1


def test_what_is_read_is_a_view_of_the_row():
    words, places = packed([torch.zeros(2, dtype=torch.float64), torch.tensor([7]), torch.tensor(True)])
    held = [read(words, place) for place in places]
    words.zero_()
    assert held[1].tolist() == [0]
    assert not held[2]
