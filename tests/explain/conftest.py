"""Real training of small networks, with a fault planted in it: the study that `explain` must pass."""

import random
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import gradkeel as gk
from gradkeel.errors import TooManySkipsError

FAULTS = ("weights", "batch", "learning rate", "overflow")


@dataclass(frozen=True)
class Planted:
    """A run with its record, and what was done to it: ``fault`` is None for a healthy one."""

    path: object
    fault: str | None
    step: int | None
    layer: str | None
    words: str


class Recurrent(nn.Module):
    def __init__(self, cell, inputs, width, outputs):
        super().__init__()
        self.cell = cell(inputs, width, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, x):
        return self.head(self.cell(x.unsqueeze(-1).expand(-1, -1, self.cell.input_size))[0][:, -1])


def choose_network(rng, inputs, outputs):
    kind = rng.choice(["mlp", "mlp", "mlp", "rnn", "lstm"])
    width = rng.choice([16, 32, 64])
    if kind != "mlp":
        return Recurrent(nn.RNN if kind == "rnn" else nn.LSTM, 2, width, outputs), kind
    activation = rng.choice([nn.ReLU, nn.Tanh, nn.GELU])
    depth = rng.randint(2, 6)
    sizes = [inputs, *[width] * (depth - 1), outputs]
    layers = []
    for i in range(depth):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        if i < depth - 1:
            layers.append(activation())
            if rng.random() < 0.2:
                layers.append(nn.LayerNorm(sizes[i + 1]))
    return nn.Sequential(*layers), f"mlp {activation.__name__} {depth}"


def choose_optimizer(rng, model):
    make = rng.choice(
        [
            lambda p: torch.optim.SGD(p, lr=rng.choice([0.003, 0.01, 0.03])),
            lambda p: torch.optim.SGD(p, lr=rng.choice([0.001, 0.003]), momentum=0.9),
            lambda p: torch.optim.Adam(p, lr=rng.choice([3e-4, 1e-3])),
            lambda p: torch.optim.AdamW(p, lr=rng.choice([3e-4, 1e-3, 3e-3])),
        ]
    )
    return make(model.parameters())


def plant(path, seed, fault):
    """Train a small network, chosen by ``seed``, with ``fault`` planted at a random step after the 50th."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    inputs, outputs = rng.choice([8, 16]), rng.choice([1, 10])
    model, kind = choose_network(rng, inputs, outputs)
    optimizer = choose_optimizer(rng, model)
    policy = rng.choice([None, "global-norm:1.0", "global-norm:1.0", "norm:1.0"])
    guard = gk.attach(optimizer, policy, model=model, nonfinite="skip" if policy else "keep", record=path)
    matrices = [name for name, p in model.named_parameters() if p.dim() == 2]
    layer = rng.choice(matrices) if fault == "weights" else None
    steps, batch = rng.randint(150, 320), rng.choice([8, 16, 32])
    step = rng.randint(50, steps - 30)
    adam = "Adam" in type(optimizer).__name__
    factor = {
        "weights": rng.choice([10, 30, 100]),
        "batch": 1000,
        "learning rate": 1000 if adam else 10_000,
    }.get(fault)
    teacher = torch.randn(inputs, outputs)
    run = _Run(model, optimizer, guard, teacher, batch, scaled=fault == "overflow" and rng.random() < 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(1, steps + 1):
            if not run.step(fault if i == step else None, layer, factor):
                break
    guard.detach()
    words = f"{kind} {type(optimizer).__name__} {optimizer.defaults['lr']} {policy} batch {batch} x{factor} {outputs=}"
    return Planted(path, fault, step if fault else None, layer, words)


class _Run:
    def __init__(self, model, optimizer, guard, teacher, batch, scaled):
        self.model, self.optimizer, self.guard, self.teacher, self.batch = (
            model,
            optimizer,
            guard,
            teacher,
            batch,
        )
        self.unbounded = any(isinstance(m, nn.ReLU | nn.GELU) for m in model.modules())
        self.unbounded &= not any(isinstance(m, nn.LayerNorm) for m in model.modules())
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)

    def step(self, fault, layer, factor):
        x = torch.randn(self.batch, self.teacher.shape[0])
        y = x @ self.teacher + 0.3 * torch.randn(self.batch, self.teacher.shape[1])
        if fault == "batch" and self.unbounded:
            x = x * factor
        elif fault == "batch" and y.shape[1] == 1:
            y = y * factor
        if fault == "weights":
            with torch.no_grad():
                self.model.get_parameter(layer).mul_(factor)
        if fault == "learning rate":
            for group in self.optimizer.param_groups:
                group["lr"] *= factor
        output = self.model(x)
        if self.teacher.shape[1] == 1:
            loss = nn.functional.mse_loss(output, y)
        else:
            loss = nn.functional.cross_entropy(output, y.argmax(dim=1))
        if not torch.isfinite(loss):
            return False
        if fault == "batch" and not self.unbounded and y.shape[1] > 1:
            loss = (
                loss * factor
            )  # as by a corrupted sample weight: inputs alone cannot harm a saturating network
        self.guard.log(loss=loss)
        if fault == "overflow":
            loss = loss * 1e38 * 1e6  # leaves float32's range
        self.scaler.scale(loss).backward()
        try:
            self.scaler.step(self.optimizer)
        except TooManySkipsError:
            return False
        self.scaler.update()
        self.optimizer.zero_grad()
        return True


@pytest.fixture(scope="session")
def plant_fault():
    return plant
