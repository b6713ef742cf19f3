"""Local smoothness along a training step, and the probe that measures it during a run.

``(L0, L1)``-smoothness bounds the Hessian by the gradient: ``||H(x)|| <= L0 + L1 * ||g(x)||``. Where it holds, the
best step is the shorter the larger the gradient is, and clipping is the rule that follows.

Source: Zhang, He, Sra, Jadbabaie, "Why gradient clipping accelerates training: a theoretical justification for
adaptivity", ICLR 2020.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradkeel.errors import check_kind
from gradkeel.explain.smoothness.fit import SmoothnessFit, fit_smoothness
from gradkeel.explain.undisturbed import undisturbed
from gradkeel.ranks.total import measure_total

Loss = Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class LocalSmoothness:
    """Local smoothness along one step; plain numbers on the host.

    Attributes:
        smoothness: ``L_hat``, the largest of ``ratios``; inf or NaN where the gradient leaves the finite numbers.
        norm: norm of the gradient where the step starts.
        length: norm of the step.
        loss: the loss where the step starts.
        ratios: ``||g(x + t d) - g(x)|| / (t ||d||)`` for each t, in ascending order of t.
        resolution: how large rounding in the parameters' dtype alone may make a ratio on so short a step.
        step: number of the optimizer step, where a probe measured it; else None.
    """

    smoothness: float
    norm: float
    length: float
    loss: float
    ratios: tuple[float, ...]
    resolution: float
    step: int | None = None

    @property
    def resolved(self) -> bool:
        """Whether the value is finite and at least ten times what rounding alone may give."""
        return math.isfinite(self.smoothness) and self.smoothness >= 10 * self.resolution


def local_smoothness(
    loss: Loss,
    model: nn.Module | Iterable[Tensor],
    step: Sequence[Tensor],
    *,
    points: int = 4,
    repeatable: bool = True,
) -> LocalSmoothness:
    """Measure how fast the gradient changes along ``step`` from where the model stands.

    ``L_hat = max over t in {1/K, 2/K, ..., 1} of ||g(x + t d) - g(x)|| / (t ||d||)``, all gradients on one batch, with
    the same randomness at every point. Afterwards parameters, buffers, ``.grad`` and the random states of Python,
    NumPy and torch (CPU and the parameters' devices) are bit by bit what they were, after an exception too.

    Costs K + 1 gradients, two copies of the parameters and one gradient of memory, and syncs the host. It
    looks at the local process only.

    Args:
        loss: called without arguments; returns the scalar loss of ONE fixed batch. A closure that draws a new batch at
            each call measures the difference of batches instead.
        model: the module, or the parameters themselves where there are no buffers to keep.
        step: the displacement d: one tensor for each parameter that requires a gradient, in the model's order.
        points: K, the number of points on the step, at least 1.
        repeatable: whether to evaluate the loss once more at x and refuse a closure that gives another value.

    Raises:
        ValueError: for a step that does not fit the parameters or has no length, ``points`` below 1, or a loss that is
            no scalar or not repeatable.

    Example:
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> local_smoothness(lambda: 1.5 * (x * x).sum(), [x], [torch.tensor([0.1, 0.0])]).smoothness
        3.0
    """
    module = model if isinstance(model, nn.Module) else None
    tensors = model.parameters() if isinstance(model, nn.Module) else model
    parameters = [tensor for tensor in tensors if tensor.requires_grad]
    at_least_one("local_smoothness", "points", points)
    _check_step(parameters, step)
    start = [parameter.detach().clone() for parameter in parameters]
    end = [x + d.to(x) for x, d in zip(start, step, strict=True)]
    return along(loss, parameters, module, start, end, points=points, repeatable=repeatable)


def along(
    loss: Loss,
    parameters: Sequence[Tensor],
    module: nn.Module | None,
    start: Sequence[Tensor],
    end: Sequence[Tensor],
    *,
    points: int,
    repeatable: bool,
    step: int | None = None,
) -> LocalSmoothness:
    """Local smoothness from ``start`` to ``end``, wherever the parameters stand now; they return there."""
    with undisturbed(parameters, module) as restart:

        def stand(where: Sequence[Tensor]) -> None:
            for parameter, value in zip(parameters, where, strict=True):
                parameter.data.copy_(value)
            restart()

        stand(start)
        value, at_start = _gradient(loss, parameters)
        ratios = []
        for k in range(1, points + 1):
            where = [torch.lerp(x, y, k / points) for x, y in zip(start, end, strict=True)]
            stand(where)
            # Divided by the distance really moved: in low precision x + t d is rounded.
            moved = _distance(start, where)
            ratios.append(_distance(at_start, _gradient(loss, parameters)[1]) / moved if moved else math.nan)
        if repeatable:
            stand(start)
            _check_repeatable(float(value), float(_call(loss).detach()))
    norm, length = _norm(at_start), _distance(start, end)
    epsilon = max(torch.finfo(parameter.dtype).eps for parameter in parameters)
    return LocalSmoothness(
        smoothness=max(ratios) if all(map(math.isfinite, ratios)) else math.nan,
        norm=norm,
        length=length,
        loss=float(value),
        ratios=tuple(ratios),
        resolution=epsilon * norm * points / length if length else math.inf,
        step=step,
    )


class SmoothnessProbe:
    """Measures local smoothness along the steps that an optimizer really makes, at an interval.

    It hooks into ``optimizer.step()``: copies the parameters before, and after it measures `local_smoothness` from
    the copy to where they are now. It works beside a guard, whose clipped step is then the one measured, and leaves
    training bit by bit as it is without it. A skipped step is not measured.

    A measurement costs K + 1 gradients of ``loss``, two more copies of the parameters, and syncs the host; the other
    steps cost nothing.

    Args:
        optimizer: the optimizer whose steps are measured.
        loss: returns the scalar loss of ONE batch, always the same one, or the one that this step was made with.
        model: the module whose buffers the measurement must leave alone; None where it has none.
        every: measure the first of so many steps.
        points: K of `local_smoothness`.

    Raises:
        ValueError: for ``every`` or ``points`` below 1.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> probe = SmoothnessProbe(optimizer, lambda: nn.functional.mse_loss(model(x), y), model=model)
        >>> nn.functional.mse_loss(model(x), y).backward()
        >>> optimizer.step()
        >>> len(probe.measurements)
        1
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        model: nn.Module | None = None,
        every: int = 1,
        points: int = 4,
    ) -> None:
        rule = "optimizer must be a torch.optim.Optimizer"
        check_kind(optimizer, torch.optim.Optimizer, "SmoothnessProbe(optimizer=...)", rule)
        self.loss = loss
        self._optimizer = optimizer
        self.every = at_least_one("SmoothnessProbe", "every", every)
        self.points = at_least_one("SmoothnessProbe", "points", points)
        self._module = model
        self._measurements: list[LocalSmoothness] = []
        self._steps = 0
        self._start: tuple[list[Tensor], list[Tensor]] | None = None
        self._hooks = (
            # Disabled here and not by a decorator, which would import torch's compiler along with gradkeel.
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after)),
        )

    @property
    def measurements(self) -> tuple[LocalSmoothness, ...]:
        """What was measured so far, in the order of the steps."""
        return tuple(self._measurements)

    def fit(self) -> SmoothnessFit:
        """Fit (L0, L1) to the measurements that stand out of rounding noise; see `fit_smoothness`.

        Other optimizers than plain SGD get the correlation and no (L0, L1), and ``related`` is False.
        """
        chosen = [m for m in self._measurements if m.resolved]
        fit = fit_smoothness([m.norm for m in chosen], [m.smoothness for m in chosen])
        optimizer = self._optimizer
        if type(optimizer) is torch.optim.SGD and not any(g["momentum"] for g in optimizer.param_groups):
            return fit
        return fit.without_constants(
            f"no (L0, L1) is fitted under {type(optimizer).__name__}, which is not plain SGD: its steps do not "
            "follow the gradient, so a bound on the gradient's norm does not bound them"
        )

    def detach(self) -> None:
        """Take the hooks off the optimizer; the measurements stay."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._steps += 1
        self._start = None
        if (self._steps - 1) % self.every == 0:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            self._start = parameters, [p.detach().clone() for p in parameters]

    def _after(self, *_: Any) -> None:
        if self._start is None:
            return
        (parameters, start), self._start = self._start, None
        end = [p.detach().clone() for p in parameters]
        if all(torch.equal(x, y) for x, y in zip(start, end, strict=True)):
            return
        measured = along(
            self.loss,
            parameters,
            self._module,
            start,
            end,
            points=self.points,
            repeatable=not self._measurements,
            step=self._steps,
        )
        self._measurements.append(measured)


def at_least_one(owner: str, argument: str, value: int) -> int:
    """``value``, if it is an integer of at least 1; else an error that names the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}({argument}={value!r}): {argument} must be an integer of at least 1")
    return value


def _call(loss: Loss) -> Tensor:
    with torch.enable_grad():
        value = loss()
    if not isinstance(value, Tensor) or value.numel() != 1:
        shown = (
            f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        )
        raise ValueError(f"loss() returned {shown}; it must return the scalar loss of one fixed batch")
    return value


def _gradient(loss: Loss, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    value = _call(loss)
    if not value.requires_grad:
        raise ValueError(
            "loss() does not depend on the parameters; call the model inside it, without no_grad()"
        )
    gradients = torch.autograd.grad(value.reshape(()), parameters, allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
    return value.detach(), filled


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(measure_total(list(tensors), 2.0, tensors[0].device))


def _distance(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    return _norm([b - a for a, b in zip(first, second, strict=True)])


def _check_step(parameters: Sequence[Tensor], step: Sequence[Tensor]) -> None:
    if not parameters:
        raise ValueError("local_smoothness: no parameter of the model requires a gradient")
    shapes = [list(parameter.shape) for parameter in parameters]
    given = [list(d.shape) for d in step]
    if len(given) != len(shapes):
        raise ValueError(
            "local_smoothness: step must have one tensor for each parameter that requires a gradient, in the model's "
            f"order: {len(shapes)}, not {len(given)}"
        )
    for i, (shape, size) in enumerate(zip(shapes, given, strict=True)):
        if shape != size:
            raise ValueError(f"local_smoothness: step[{i}] has shape {size}, and its parameter {shape}")
    if not _norm(step) > 0:
        raise ValueError(
            "local_smoothness: step has no length; give the displacement that the optimizer made"
        )


def _check_repeatable(first: float, second: float) -> None:
    # Kernels that add in another order at each call differ by some roundings; another batch by much more.
    if math.isfinite(first) and abs(first - second) > 1e-3 * abs(first):
        raise ValueError(
            f"loss() gave {first:.6g} and then {second:.6g} at the same parameters, so the change of the gradient "
            "would be that of the batch; use one fixed batch and torch's own random generators"
        )
