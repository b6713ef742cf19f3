"""A benchmark clips parameters of a model's shapes, whose gradients can be written anew."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from gradkeel.bench.stopwatch import Contender
from gradkeel.language import say

Shapes = Sequence[tuple[int, ...]]

READ = say("one read of the gradients")
"""The limit: no clip can be faster than to look at every gradient once."""


def _gpt2(layers: int, width: int) -> list[tuple[int, ...]]:
    block: list[tuple[int, ...]] = [
        (width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,),
        (width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,),
    ]  # fmt: skip
    return [(50257, width), (1024, width), *(block * layers), (width,), (width,)]


def _resnet50() -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, inputs, 1, 1), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            shapes += [(4 * width, width, 1, 1), (4 * width,), (4 * width,)]
            if block == 0:
                shapes += [(4 * width, inputs, 1, 1), (4 * width,), (4 * width,)]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


SHAPES: Mapping[str, Shapes] = {
    "gpt2-small": _gpt2(12, 768),
    "gpt2-xl": _gpt2(48, 1600),
    "resnet50": _resnet50(),
    "tiny-tensors": [(2100,)] * 2000,
}
"""Shapes of parameters by name: 124M in 148 tensors, 1.6G in 580, 26M in 161, and 4.2M in 2,000."""


class Gradients:
    """Parameters with gradients of normally distributed entries, of standard deviation ``scale``.

    `refill` writes the ``true`` gradients anew, in place; ``norm`` is their global 2-norm, in float64.
    """

    def __init__(
        self,
        shapes: Shapes,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scale: float = 1.0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def drawn(shape: tuple[int, ...], scale: float) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).mul_(scale).to(dtype)

        self.true = [drawn(shape, scale) for shape in shapes]
        self.parameters = [nn.Parameter(drawn(shape, 0.02)) for shape in shapes]
        self.refill()
        self.norm = sum(float(square(gradient)) for gradient in self.true) ** 0.5
        self.device = torch.device(device)

    @property
    def entries(self) -> int:
        """All gradients together have so many entries."""
        return sum(gradient.numel() for gradient in self.true)

    @torch.no_grad()
    def refill(self) -> None:
        """Write the gradients anew, as a backward pass does."""
        for parameter, gradient in zip(self.parameters, self.true, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
        torch._foreach_copy_(self.left(), self.true)

    def left(self) -> list[Tensor]:
        """Return the gradients that the parameters have."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def error(self, bound: float) -> float:
        """Return the relative error of the gradients, were they to be clipped to the global norm ``bound``."""
        return relative_error(self.left(), self.true, min(1.0, bound / self.norm))

    def read(self) -> Contender:
        """Find the largest int32 of as many bytes in one piece, which runs at the memory's speed: the limit."""
        size = self.entries * self.true[0].element_size()
        # Not zeros, for these may take no memory.
        block = torch.ones(-(-size // 4), dtype=torch.int32, device=self.device)
        return Contender(READ, block.max)


def square(tensor: Tensor) -> Tensor:
    """Return [] the sum of squares in float64."""
    return tensor.double().square().sum()


def relative_error(left: Sequence[Tensor], true: Sequence[Tensor], coefficient: float = 1.0) -> float:
    """``||left - c true|| / ||c true||`` in float64; inf where there are fewer tensors than there should be."""
    if len(left) != len(true):
        return float("inf")
    pairs = zip(left, true, strict=True)
    differences = sum(float(square(own.double() - coefficient * its.double())) for own, its in pairs)
    return (differences / sum(float(square(coefficient * its)) for its in true)) ** 0.5
