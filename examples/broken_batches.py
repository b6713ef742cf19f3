"""A task in which one batch in forty is broken: which policies keep it from doing harm?

gradkeel compare examples.broken_batches:make_task --policy none --policy global-norm:1.0 --policy zclip
"""

import torch
from torch import nn

from gradkeel.compare import Task


class BrokenBatches(Task):
    """Regression by a small network; now and then a batch comes with targets that are 1000 times too large."""

    name = "broken-batches"
    policies = ("none", "global-norm:1.0", "zclip", "robust", "skip-step")
    learning_rates = (0.03, 0.1)
    steps = 600
    batch_size = 32

    def model(self) -> nn.Module:
        """Ten inputs, one output."""
        return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 1))

    def batches(self, seed: int):
        """Endless batches; the first hundred are sound."""
        generator = torch.Generator().manual_seed(seed)
        for step in range(10**9):
            inputs = torch.randn(self.batch_size, 10, generator=generator)
            targets = self.targets(inputs)
            if torch.rand((), generator=generator) < 1 / 40 and step >= 100:
                targets = 1000 * targets
            yield inputs, targets

    def targets(self, inputs: torch.Tensor) -> torch.Tensor:
        """What is to be learned."""
        return torch.sin(inputs[:, :1]) + 0.5 * inputs[:, 1:2] * inputs[:, 2:3]

    def loss(self, model: nn.Module, batch) -> torch.Tensor:
        """Mean squared error."""
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets)

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        """Mean squared error on sound data."""
        inputs = torch.randn(2000, 10, generator=torch.Generator().manual_seed(12345))
        return float(self.loss(model, (inputs, self.targets(inputs))))


def make_task() -> Task:
    """What ``gradkeel compare examples.broken_batches:make_task`` calls."""
    return BrokenBatches()
