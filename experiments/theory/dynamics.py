"""R20 and R21: gradients through depth, and the cliff of a recurrent loss surface."""

import math
import statistics

import torch
from torch import Tensor, nn

import gradkeel as gk

from experiments.theory.experiment import Outcome, experiment

DEPTHS = (4, 8, 16, 32, 64)
GAINS = (0.5, 1.0, 1.5)
WIDTH = 64

CLIFF_START = (5.0, -2.0)
CLIFF_LR = 0.003
CLIFF_BOUND = 4.0
CLIFF_STEPS = 300


def first_layer_norm(depth: int, gain: float, activation: type[nn.Module] | None, seed: int) -> float:
    """Norm of the first layer's gradient in a chain of square orthogonal layers, each scaled by ``gain``."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for _ in range(depth):
        layer = nn.Linear(WIDTH, WIDTH, bias=False)
        nn.init.orthogonal_(layer.weight, gain)
        model.append(layer)
        if activation is not None:
            model.append(activation())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gk.attach(optimizer, None, model=model)
    (model(torch.randn(16, WIDTH)) @ torch.randn(WIDTH)).mean().backward()
    optimizer.step()
    norm = guard.report.norms["0.weight"]
    guard.detach()
    return norm


def growth(norms: list[float]) -> float:
    """Growth of the logarithm per layer: slope of the least-squares line over depth."""
    depth_mean, logs = statistics.mean(DEPTHS), [math.log(norm) for norm in norms]
    above = sum((d - depth_mean) * y for d, y in zip(DEPTHS, logs, strict=True))
    return above / sum((d - depth_mean) ** 2 for d in DEPTHS)


@experiment(
    "R20",
    "Gradients vanish and explode geometrically with depth",
    "falls, stays, grows at gain 0.5, 1, 1.5; linear chain: slope = log gain",
)
def depth() -> Outcome:
    """The first layer's gradient norm over depths 4 to 64, mean of three seeds' logarithms, linear and tanh."""
    series: dict[str, list[float]] = {"depth": list(map(float, DEPTHS))}
    slopes = {}
    for name, activation in (("linear", None), ("tanh", nn.Tanh)):
        for gain in GAINS:
            norms = [
                statistics.geometric_mean(first_layer_norm(d, gain, activation, seed) for seed in range(3))
                for d in DEPTHS
            ]
            series[f"{name} {gain:g}"] = norms
            slopes[name, gain] = growth(norms)
    # Random inputs and read-outs scatter the five norms by some 5%, over a range of 60 layers.
    exact = all(abs(slopes["linear", gain] - math.log(gain)) < 0.005 for gain in GAINS)
    ordered = all(
        slopes[name, 0.5] < -0.05 < slopes[name, 1.0] < 0.05 < slopes[name, 1.5]
        for name in ("linear", "tanh")
    )
    shown = "; ".join(
        f"{name} " + ", ".join(f"{slopes[name, gain]:+.3f}" for gain in GAINS) for name in ("linear", "tanh")
    )
    return Outcome(f"growth of log norm per layer at gain 0.5, 1, 1.5: {shown}", exact and ordered, series)


def recurrent_loss(weight: Tensor, bias: Tensor, *, steps: int = 50) -> Tensor:
    """``(h_50 - 0.7)^2`` with ``h_{t+1} = w sigmoid(h_t) + b`` and h_0 = 0.5, elementwise.

    Source: Pascanu, Mikolov, Bengio, "On the difficulty of training recurrent neural networks", 2013, figure 6.
    """
    hidden = torch.full_like(weight, 0.5)
    for _ in range(steps):
        hidden = weight * torch.sigmoid(hidden) + bias
    return (hidden - 0.7) ** 2


def walk(policy: gk.policies.Policy | None) -> dict[str, list[float]]:
    """Gradient descent on the surface from ``CLIFF_START``: w, b, loss and raw gradient norm at each step."""
    weight, bias = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in CLIFF_START)
    optimizer = torch.optim.SGD([weight, bias], lr=CLIFF_LR)
    guard = gk.attach(optimizer, policy)
    path: dict[str, list[float]] = {"w": [], "b": [], "loss": [], "norm": []}
    for _ in range(CLIFF_STEPS):
        optimizer.zero_grad()
        loss = recurrent_loss(weight, bias)
        path["w"].append(float(weight.detach()))
        path["b"].append(float(bias.detach()))
        path["loss"].append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        path["norm"].append(guard.report.norm)
    guard.detach()
    return path


def surface(name: str, w: tuple[float, float], b: tuple[float, float]) -> dict[str, list[float]]:
    """The loss on a grid over ranges of w and b, row by row, and the grid's two axes."""
    across, up = (torch.linspace(*ends, 200, dtype=torch.float64) for ends in (w, b))
    loss = recurrent_loss(across.repeat(len(up), 1), up[:, None].repeat(1, len(across)))
    return {f"{name} w": across.tolist(), f"{name} b": up.tolist(), f"{name} loss": loss.flatten().tolist()}


@experiment("R21", "The cliff of a recurrent loss surface", "unclipped is thrown out, clipped descends")
def cliff() -> Outcome:
    """300 steps with the same learning rate; thrown out: a step that multiplies the first loss by 10."""
    free, held = walk(None), walk(gk.ClipByGlobalNorm(CLIFF_BOUND))
    highest, end = max(free["loss"]), statistics.median(free["loss"][-10:])
    clipped_highest, clipped_end = max(held["loss"]), statistics.median(held["loss"][-10:])
    start = held["loss"][0]
    series = {
        f"{name} {key}": values
        for name, path in (("free", free), ("clipped", held))
        for key, values in path.items()
    }
    series |= surface("near", (4.3, 5.3), (-2.65, -1.85)) | surface("far", (2, 15), (-5, 14))
    return Outcome(
        f"from loss {start:.2f}: unclipped meets a gradient of {max(free['norm']):.0f}, is thrown to loss "
        f"{highest:.0f}, and ends at {end:.2f}; clipped never exceeds {clipped_highest:.2f}, "
        f"and ends at {clipped_end:.2f}",
        highest > 10 * start and clipped_highest < 2 * start and clipped_end < 0.1 * start,
        series,
    )
