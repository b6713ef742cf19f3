"""A task of one's own, in a file of one's own.

gradkeel compare examples.own_task:make_task

Fits sin(3x) with a small network and momentum, with and without clipping.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradkeel.compare import Task

Pair = tuple[Tensor, Tensor]


class Sine(Task):
    """What `gradkeel compare` needs to know; every attribute has a default and an option on the command line."""

    name = "sine"
    policies = ("none", "global-norm:1.0", "value:0.1")
    learning_rates = (0.1, 0.4)
    steps = 100
    seeds = 3
    batch_size = 32

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))

    def optimizer(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)

    def batches(self, seed: int) -> Iterator[Pair]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            x = 2 * torch.rand(self.batch_size, 1, generator=generator) - 1
            yield x, torch.sin(3 * x)

    def loss(self, model: nn.Module, batch: Pair) -> Tensor:
        x, y = batch
        return F.mse_loss(model(x), y)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        x = torch.linspace(-1, 1, 200).unsqueeze(1)
        return float(self.loss(model, (x, torch.sin(3 * x))))


def make_task() -> Task:
    """What the command line names."""
    return Sine()
