"""R11 to R13: what noise does to clipping, and what unequal micro-batches do to naive formulas."""

import math
import statistics

import torch
from torch import Tensor, nn

import gradkeel as gk
from gradkeel.noise_scale import NoiseScale

from experiments.theory.descent import clipped_step
from experiments.theory.experiment import Outcome, experiment

SIZES = (1, 2, 5, 24)
WINDOWS = 20_000


def skewed_end(bound: float | None) -> tuple[float, float]:
    """Mean end of SGD on x^2 / 2 with gradient noise Exp(1) - 1, and its standard error, over 2000 runs."""
    generator = torch.Generator().manual_seed(0)
    x, rate = torch.zeros(2000, dtype=torch.float64), torch.tensor(0.02, dtype=torch.float64)
    limit = torch.tensor(math.inf if bound is None else bound, dtype=torch.float64)
    for _ in range(1000):
        noise = torch.empty_like(x).exponential_(generator=generator) - 1
        gradient = x + noise
        x = x - clipped_step(gradient.abs(), rate, limit) * gradient
    return float(x.mean()), float(x.std() / math.sqrt(len(x)))


def where_clipped_noise_balances(bound: float) -> float:
    """The root x of ``E clip(x + xi, -bound, bound) = 0`` for xi = Exp(1) - 1, by bisection.

    ``E clip(Y) = -c + integral of P(Y > y) from -c to c``, and ``P(x + xi > y) = min(1, exp(-(y - x + 1)))``.
    """

    def mean(x: float) -> float:
        edge = min(max(x - 1, -bound), bound)  # below it every Y lies above
        return -bound + (edge + bound) + math.exp(x - 1 - edge) - math.exp(x - 1 - bound)

    low, high = -2.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) < 0 else (low, middle)
    return low


def regression_error(policy: gk.policies.Policy | None, seed: int) -> float:
    """Error of the weights of a linear regression, averaged over the second half of 1000 SGD steps, 1% outliers."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    truth, model = torch.randn(5, generator=generator), nn.Linear(5, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    guard, errors = gk.attach(optimizer, policy, model=model), []
    for k in range(1000):
        inputs = torch.randn(5, generator=generator)
        target = inputs @ truth + 0.1 * torch.randn((), generator=generator)
        if torch.rand((), generator=generator) < 0.01:
            target = target + 100 * torch.randn((), generator=generator)
        optimizer.zero_grad()
        (0.5 * (model(inputs) - target) ** 2).sum().backward()
        optimizer.step()
        if k >= 500:
            errors.append(float(torch.linalg.vector_norm(model.weight.detach()[0] - truth)))
    guard.detach()
    return statistics.mean(errors)


@experiment(
    "R11",
    "Under noise clipping is biased, and robust",
    "bias shows under skewed noise; robustness shows under 1% outliers",
)
def bias_and_robustness() -> Outcome:
    """Bias: more than 10 standard errors from 0, within 5% of theory. Robustness: a fifth of the error, every seed."""
    (free, free_error), (held, held_error) = skewed_end(None), skewed_end(0.5)
    expected = where_clipped_noise_balances(0.5)
    biased = abs(free) < 4 * free_error and abs(held) > 10 * held_error and abs(held / expected - 1) < 0.05
    pairs = [
        (regression_error(None, seed), regression_error(gk.ClipByGlobalNorm(1.0), seed)) for seed in range(3)
    ]
    ratio = max(clipped / unclipped for unclipped, clipped in pairs)
    return Outcome(
        f"skewed noise: SGD ends at {free:+.3f} ± {free_error:.3f} from the minimum, clipped at {held:+.3f} ± "
        f"{held_error:.3f} (theory {expected:+.3f}); outliers: clipped has at most {ratio:.2f} of the error",
        biased and ratio < 0.2,
    )


def window_sums(count: int) -> Tensor:
    """[count, 4, 30] summed micro-batch gradients of ``SIZES`` items; an item's gradient is N(0.1, 1) in 30 entries."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor(SIZES, dtype=torch.float64)[:, None]
    return 0.1 * sizes + sizes.sqrt() * torch.randn(
        count, len(SIZES), 30, dtype=torch.float64, generator=generator
    )


def naive_scale(sums: Tensor) -> float:
    """The textbook formula, which takes every micro-batch to have the mean size."""
    sizes = torch.tensor(SIZES, dtype=torch.float64)
    means = sums / sizes[:, None]
    spread = means.var(1).sum(1).mean()
    signal = (means.mean(1) ** 2).sum(1).mean() - spread / len(SIZES)
    return float(spread * sizes.mean() / signal)


@experiment(
    "R12", "The gradient noise scale from unequal micro-batches", "within 3%; the naive formula off by > 20%"
)
def noise_scale() -> Outcome:
    """Micro-batches of 1, 2, 5, 24 items whose gradients have tr(Sigma) = 30 and |G|^2 = 0.3: the answer is 100."""
    sums = window_sums(WINDOWS)
    parts = torch.linalg.vector_norm(sums, dim=2)
    running = torch.linalg.vector_norm(sums.cumsum(1), dim=2)
    apart = grown = NoiseScale()
    for part_norms, sum_norms in zip(parts.tolist(), running.tolist(), strict=True):
        apart = apart.add(SIZES, part_norms=part_norms, total_norm=sum_norms[-1])
        grown = grown.add_running(SIZES, sum_norms=sum_norms)
    naive = naive_scale(sums)
    values = apart.value or math.nan, grown.value or math.nan
    return Outcome(
        f"known 100; from the parts {values[0]:.1f}, from the running sums {values[1]:.1f}, naive {naive:.1f}",
        all(abs(value / 100 - 1) < 0.03 for value in values) and abs(naive / 100 - 1) > 0.2,
    )


def displacement(how: str, policy: gk.policies.Policy | None) -> Tensor:
    """[all parameters] what one SGD step on 53 items does, in float64: "full", "exact" or "mean of means"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    inputs = torch.randn(53, 6, dtype=torch.float64)
    # The first three items are unlike the others, as a short sequence often is.
    targets = inputs.sum(1, keepdim=True) + torch.where(torch.arange(53) < 3, 5.0, 0.0)[:, None]
    parts = [slice(0, 3), slice(3, 53)]
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, policy, model=model)

    def loss(rows: slice, reduction: str) -> Tensor:
        return nn.functional.mse_loss(model(inputs[rows]), targets[rows], reduction=reduction)

    if how == "exact":
        for micro in gk.Accumulator(guard, steps=2)(parts):
            with micro:
                micro.backward(loss(micro.batch, "sum"), weight=micro.batch.stop - micro.batch.start)
    elif how == "mean of means":
        for rows in parts:
            (loss(rows, "mean") / len(parts)).backward()
    else:
        loss(slice(0, 53), "mean").backward()
    optimizer.step()
    guard.detach()
    return nn.utils.parameters_to_vector(model.parameters()).detach() - before


@experiment(
    "R13", "Accumulated micro-batches equal the full batch", "float64 < 1e-12; mean-of-means off by > 10%"
)
def accumulation() -> Outcome:
    """Micro-batches of 3 and 50 items through the accumulator, unclipped and clipped to a norm of 0.1."""
    exact, means = [], []
    for policy in (None, gk.ClipByGlobalNorm(0.1)):
        full = displacement("full", policy)
        size = torch.linalg.vector_norm(full)
        exact.append(float(torch.linalg.vector_norm(displacement("exact", policy) - full) / size))
        means.append(float(torch.linalg.vector_norm(displacement("mean of means", policy) - full) / size))
    return Outcome(
        f"exact {max(exact):.1e}; mean of means off by {means[0]:.0%} unclipped, {means[1]:.0%} clipped",
        max(exact) < 1e-12 and min(means) > 0.1,
    )
