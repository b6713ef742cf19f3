"""Three linear layers that explode within four steps, unless every parameter's gradient is clipped."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkeel.compare.task import Task


class ExplodingLinear(Task):
    """The network of the Paddle tutorial on gradient clipping: 1 -> 32 -> 32 -> 1, no activations.

    Weights and biases are standard normal, the first layer's weights 2 more; y = x + 3 on 1,000 points
    x ~ N(0, 1), mean squared error, SGD. The policies are the tutorial's modes: no clipping, every parameter, weights
    only (what its text says), and biases only (what its code with ``is_clip=False`` does).
    """

    name = "exploding-linear"
    policies = ("none", "norm:1.0", "norm:1.0,exclude=*.bias", "norm:1.0,exclude=*.weight")
    learning_rates = (0.01,)
    steps = 100
    seeds = 5
    batch_size = 16
    target_loss = 2.0

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._train = torch.randn(1000, 1, generator=generator)
        self._validation = torch.randn(1000, 1, generator=generator)

    def model(self) -> nn.Module:
        """Three linear layers whose initialization is too large."""
        first = nn.Linear(1, 32)
        model = nn.Sequential(first, nn.Linear(32, 32), nn.Linear(32, 1))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            first.weight.add_(2.0)
        return model

    def batches(self, seed: int) -> Iterator[Tensor]:
        """[batch_size, 1] inputs, drawn without replacement; a rest that fills no batch is left out of its epoch."""
        generator = torch.Generator().manual_seed(seed)
        size = min(self.batch_size, len(self._train))
        while True:
            order = torch.randperm(len(self._train), generator=generator)
            for start in range(0, len(order) - size + 1, size):
                yield self._train[order[start : start + size]]

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        """[] mean squared error against x + 3."""
        return F.mse_loss(model(batch), batch + 3)

    def weight(self, batch: Tensor) -> float:
        return float(len(batch))

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        """Mean squared error on 1,000 other points."""
        return float(self.loss(model, self._validation))
