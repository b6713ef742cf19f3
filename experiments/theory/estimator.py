"""R4, R7 and R8: whether the estimator measures what it should, and says nothing where there is nothing."""

import functools

import torch
from torch import Tensor, nn

from gradkeel.explain.smoothness.fit import fit_smoothness
from gradkeel.explain.smoothness.probe import LocalSmoothness, SmoothnessProbe, local_smoothness

from experiments.theory.digits import Digits, digits
from experiments.theory.experiment import Outcome, experiment

BATCH = 32
STEPS = 300
EVERY = 5


@experiment("R4", "The estimator on a quadratic with known A", "relative error < 1e-6")
def known_quadratic() -> Outcome:
    """``x A x / 2`` in float64, along 20 random steps and along the direction of largest curvature."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(50, 50, dtype=torch.float64, generator=generator)
    matrix = root @ root.T / 50
    x = torch.randn(50, dtype=torch.float64, generator=generator).requires_grad_()
    largest, vectors = torch.linalg.eigh(matrix)
    steps = [0.1 * torch.randn(50, dtype=torch.float64, generator=generator) for _ in range(20)] + [
        vectors[:, -1]
    ]
    worst = 0.0
    for step in steps:
        measured = local_smoothness(lambda: 0.5 * x @ matrix @ x, [x], [step]).smoothness
        known = float(torch.linalg.vector_norm(matrix @ step) / torch.linalg.vector_norm(step))
        worst = max(worst, abs(measured / known - 1))
    along_largest = abs(measured / float(largest[-1]) - 1)
    return Outcome(
        f"worst of {len(steps)} steps {max(worst, along_largest):.1e}", max(worst, along_largest) < 1e-6
    )


def _convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _loss(model: nn.Module, data: Digits, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(data.images[rows]), data.labels[rows])


def _correlation(measured: list[LocalSmoothness]) -> float:
    return fit_smoothness([m.norm for m in measured], [m.smoothness for m in measured]).correlation


@experiment(
    "R7",
    "Smoothness must be measured on one fixed batch",
    "correlation: fixed batch > 0.7, fresh batches < 0.3",
)
def fixed_batch() -> Outcome:
    """A small convolutional net on digits, SGD with lr 0.1: the same steps measured both ways."""
    data = digits()
    torch.manual_seed(0)
    model = _convolutional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training, fresh = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    fixed_measured, fresh_measured = [], []

    def draw(generator: torch.Generator) -> Tensor:
        return torch.randint(len(data.labels), (BATCH,), generator=generator)

    for k in range(STEPS):
        rows = draw(training)
        optimizer.zero_grad()
        _loss(model, data, rows).backward()
        if k % EVERY == 0:
            step = [-0.1 * p.grad for p in model.parameters() if p.grad is not None]
            fixed_measured.append(local_smoothness(functools.partial(_loss, model, data, rows), model, step))
            fresh_measured.append(
                local_smoothness(lambda: _loss(model, data, draw(fresh)), model, step, repeatable=False)
            )
        optimizer.step()
    fixed, other = _correlation(fixed_measured), _correlation(fresh_measured)
    return Outcome(f"fixed batch r = {fixed:.2f}, fresh batches r = {other:.2f}", fixed > 0.7 and other < 0.3)


@experiment(
    "R8",
    "Negative control: image training without a relation",
    'reports "no (L0, L1) relation", and gives no bound',
)
def negative_control() -> Outcome:
    """A tanh network on digits, SGD with lr 0.1 and no clipping."""
    data = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(0, dtype=torch.int64)
    probe = SmoothnessProbe(optimizer, lambda: _loss(model, data, rows), model=model, every=EVERY)
    for _ in range(STEPS):
        rows = torch.randint(len(data.labels), (BATCH,), generator=generator)
        optimizer.zero_grad()
        _loss(model, data, rows).backward()
        optimizer.step()
    fit = probe.fit()
    series = {
        "norm": [m.norm for m in probe.measurements],
        "smoothness": [m.smoothness for m in probe.measurements],
        "step": [float(m.step or 0) for m in probe.measurements],
    }
    silent = not fit.related and fit.safe_bound(0.1) is None and fit.max_step is None
    return Outcome(
        f"“{fit.reason}”; bound: {fit.safe_bound(0.1)}",
        silent and "no (L0, L1) relation" in fit.reason,
        series,
    )
