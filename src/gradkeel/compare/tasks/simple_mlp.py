"""The small regression of the Paddle tutorial on gradient accumulation: four micro-batches make the whole data set."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkeel.compare.task import Task

Pair = tuple[Tensor, Tensor]


class SimpleMLP(Task):
    """10 -> 50 -> 1 with ReLU on 64 random samples, in batches of 16; mean squared error; SGD.

    Four batches are the whole data set, so that a step on four accumulated batches is one of full-batch training.
    """

    name = "simple-mlp"
    policies = ("none", "global-norm:0.2")
    learning_rates = (0.1,)
    steps = 40
    seeds = 5
    batch_size = 16

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._inputs = torch.randn(64, 10, generator=generator)
        self._targets = torch.randn(64, 1, generator=generator)

    def model(self) -> nn.Module:
        """One hidden layer, torch's default initialization."""
        return nn.Sequential(nn.Linear(10, 50), nn.ReLU(), nn.Linear(50, 1))

    def batches(self, seed: int) -> Iterator[Pair]:
        """Inputs [batch_size, 10] and targets [batch_size, 1]: every sample once an epoch, reshuffled for the next."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            for chosen in torch.randperm(64, generator=generator).split(self.batch_size):
                yield self._inputs[chosen], self._targets[chosen]

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        inputs, targets = batch
        return F.mse_loss(model(inputs), targets)

    def weight(self, batch: Pair) -> float:
        return float(len(batch[0]))


class SimpleMLPAdam(SimpleMLP):
    """The same with Adam, as the tutorial has it: a constant factor on the gradients hardly shows under Adam."""

    name = "simple-mlp-adam"
    learning_rates = (0.001,)

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=lr)
