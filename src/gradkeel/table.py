"""`gradients(model)`: what every parameter's gradient is right now, without attaching anything."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradkeel.errors import check_kind
from gradkeel.language import aligned, say, shown
from gradkeel.ranks.total import measure_total
from gradkeel.tensors import is_quantized

_HEAD = (say("parameter"), say("shape"), say("weight norm"), say("gradient norm"))


@dataclass(frozen=True, slots=True)
class GradientRow:
    """One parameter.

    Attributes:
        name: as ``model.named_parameters()`` gives it.
        shape: the parameter's shape.
        weight_norm: 2-norm of the parameter; NaN where it is quantized.
        gradient_norm: 2-norm of its gradient; None where it has none.
    """

    name: str
    shape: tuple[int, ...]
    weight_norm: float
    gradient_norm: float | None


@dataclass(frozen=True, slots=True)
class GradientTable:
    """The parameters of a model and their gradients; prints as a table, and is read by name or by iterating."""

    rows: tuple[GradientRow, ...]

    def __iter__(self) -> Iterator[GradientRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> GradientRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no parameter {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def to_pandas(self) -> Any:
        """A pandas DataFrame with the rows' attributes as columns; pandas must be installed."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

    def _cells(self) -> list[tuple[str, str, str, str]]:
        return [
            (
                row.name,
                "x".join(map(str, row.shape)) or shown(say("scalar")),
                f"{row.weight_norm:.6g}",
                "None" if row.gradient_norm is None else f"{row.gradient_norm:.6g}",
            )
            for row in self.rows
        ]

    def __repr__(self) -> str:
        return "\n".join(aligned([_HEAD, *self._cells()], words=2))

    def _repr_html_(self) -> str:
        from html import escape  # seldom needed, and slow to import

        head = f"<tr>{''.join(f'<th>{shown(name)}</th>' for name in _HEAD)}</tr>"
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self._cells()
        )
        return f"<table>{head}{rows}</table>"


@torch.no_grad()
def gradients(model: nn.Module) -> GradientTable:
    """Name, shape, weight norm and gradient norm of every parameter, before or after ``backward()``.

    Norms are 2-norms, summed in float64. Reads each weight and gradient once and syncs the host.

    Args:
        model: any module; a parameter that is tied under several names is listed once.

    Example:
        >>> print(gk.gradients(torch.nn.Linear(1, 1)))
    """
    check_kind(
        model,
        nn.Module,
        "gradients(model=...)",
        "model must be a torch.nn.Module, whose parameters are listed",
    )

    def norm(tensor: Tensor) -> float:
        return math.nan if is_quantized(tensor) else float(measure_total([tensor], 2.0, tensor.device))

    rows = (
        GradientRow(name, tuple(p.shape), norm(p), None if p.grad is None else norm(p.grad))
        for name, p in model.named_parameters()
    )
    return GradientTable(tuple(rows))
