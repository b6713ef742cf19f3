"""Many small minimization problems descended at once, with the coefficients that the policies' forms give."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gradkeel.explain.smoothness.fit import theorem_3
from gradkeel.policies import Hard


@dataclass(frozen=True, slots=True)
class Problems:
    """k functions of d variables, each (L0, L1)-smooth, in float64.

    Attributes:
        value: from [k, d] points to [k] values.
        gradient: from [k, d] points to [k, d] gradients.
        start: [k, d] where each begins.
        l0: [k] L0 of each.
        l1: [k] L1 of each.
    """

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    start: Tensor
    l0: Tensor
    l1: Tensor


def cosh_problems(scale: Tensor, rate: Tensor, start: Tensor) -> Problems:
    """``2 s cosh(l x) / l^2``: ``f'' = 2 s cosh(l x) <= 2 s + l |f'|``, so L0 = 2 s and L1 = l; all arguments [k]."""
    height, slope, column = 2 * scale / rate**2, (2 * scale / rate)[:, None], rate[:, None]
    return Problems(
        value=lambda x: height * torch.cosh(rate * x[:, 0]),
        gradient=lambda x: slope * torch.sinh(column * x),
        start=start[:, None],
        l0=2 * scale,
        l1=rate,
    )


def quartic_problems(weights: Tensor, turn: Tensor, l1: Tensor, start: Tensor) -> Problems:
    """``sum_i w_i (x Q)_i^4`` with [k, d] weights and [k, d, d] rotations Q, or [d, d] one for all.

    ``||H|| = max 12 w y^2`` and ``||g|| >= 4 w |y|^3``, and ``12 w y^2 - 4 w L1 |y|^3`` is largest at y = 2 / L1: any
    L1 will do, with ``L0 = 16 max(w) / L1^2``. For x^4 and L1 = 1 that is (16, 1).
    """

    def turned(x: Tensor, by: Tensor) -> Tensor:
        return x @ by if by.dim() == 2 else (x[:, None, :] @ by)[:, 0]

    def gradient(x: Tensor) -> Tensor:
        y = turned(x, turn)
        return turned(4 * weights * y * y * y, turn.mT)

    return Problems(
        value=lambda x: (weights * turned(x, turn) ** 4).sum(1),
        gradient=gradient,
        start=start,
        l0=16 * weights.amax(1) / l1**2,
        l1=l1,
    )


def clipped_step(norms: Tensor, lr: Tensor, bound: Tensor) -> Tensor:
    """[k] step sizes ``h = lr * min(1, bound / ||g||)``, by the hard form."""
    return lr * Hard().coefficient(norms, bound)


def theorem_3_steps(problems: Problems) -> Callable[[Tensor], Tensor]:
    """From [k] gradient norms to [k] step sizes, with the learning rate and bound of the paper's Theorem 3."""
    chosen = [theorem_3(l0, l1) for l0, l1 in zip(problems.l0.tolist(), problems.l1.tolist(), strict=True)]
    lr = torch.tensor([lr for lr, _ in chosen], dtype=torch.float64)
    bound = torch.tensor([policy.max_norm for _, policy in chosen], dtype=torch.float64)
    return lambda norms: clipped_step(norms, lr, bound)


def iterations(
    problems: Problems, step: Callable[[Tensor], Tensor], accuracy: float, *, limit: int, first: bool = False
) -> Tensor:
    """[k] how many steps each takes until ``||g|| <= accuracy``; inf for those that do not within ``limit``.

    Args:
        problems: k of them.
        step: from [k] gradient norms to [k] step sizes.
        accuracy: the gradient norm to reach.
        limit: when to give up.
        first: stop as soon as one has arrived, and leave the others at inf.
    """
    x = problems.start
    count = torch.full((len(x),), torch.inf, dtype=x.dtype)
    for k in range(limit + 1):
        gradient = problems.gradient(x)
        norms = torch.linalg.vector_norm(gradient, dim=1)
        arrived = norms <= accuracy
        if arrived.any():
            count[arrived & torch.isinf(count)] = k
            if first or torch.isfinite(count).all():
                break
        x = x - step(norms)[:, None] * gradient
    return count


def best_fixed_step(
    problems: Callable[[int], Problems], rates: Tensor, accuracy: float, *, limit: int
) -> float:
    """The fewest iterations that any of the fixed ``rates`` takes on a problem; ``problems(k)`` gives k copies."""
    copies = problems(len(rates))
    return float(iterations(copies, lambda _: rates, accuracy, limit=limit, first=True).amin())


def log_slope(x: Tensor, y: Tensor) -> float:
    """Slope of the least-squares line through ``log y`` over ``log x``."""
    u, v = x.log() - x.log().mean(), y.log() - y.log().mean()
    return float((u * v).sum() / (u * u).sum())
