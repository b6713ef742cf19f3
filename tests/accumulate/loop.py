"""One parameter under an accumulator, whose gradients are the batches themselves, and the loop around it."""

import torch
from torch import nn

import gradkeel as gk


class Loop:
    """SGD with learning rate 1 on one parameter of zeros: it ends at minus the sum of the windows' mean gradients."""

    def __init__(self, steps=2, *, policy=None, nonfinite="skip", dtype=torch.float32, size=2, **options):
        self.weight = nn.Parameter(torch.zeros(size, dtype=dtype))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.guard = gk.attach(self.optimizer, policy, nonfinite=nonfinite)
        self.accumulate = gk.Accumulator(self.guard, steps, **options)

    def backward(self, micro, **options):
        """The micro-batch's gradient is ``batch[0]``, its weight ``batch[1]``."""
        gradient, amount = micro.batch
        loss = (self.weight * torch.as_tensor(gradient, dtype=self.weight.dtype)).sum()
        micro.backward(loss, weight=amount, **options)

    def run(self, batches, *, zero_grad=True, **options):
        """Go through all of the batches and step at each window's end."""
        for micro in self.accumulate(batches):
            with micro:
                self.backward(micro, **options)
            if micro.closes_window:
                self.optimizer.step()
                if zero_grad:
                    self.optimizer.zero_grad()

    def leave_open(self, batches):
        """Go through these batches without a step, and leave the window as it is after them."""
        micros = self.accumulate([*batches, None])
        for _ in batches:
            with next(micros) as micro:
                self.backward(micro)

    @property
    def moved(self):
        """What SGD has taken off so far: the sum of the windows' gradients."""
        return [-entry for entry in self.weight.tolist()]
