"""torch's four clipping functions with torch's signatures, and right where torch's are not."""

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn

from gradkeel.apply import clamp, scale, separate
from gradkeel.errors import NonFiniteGradientError, check_kind
from gradkeel.kernels.graph import Entry, Graph, Graphs, can_capture, tell_autograd
from gradkeel.kernels.native import Table
from gradkeel.measure import wide_dtype
from gradkeel.ranks.powers import WIDE
from gradkeel.ranks.total import total_norm
from gradkeel.tensors import are_plain, is_distributed, on_mesh_of, settle, settled, whole

# Between these, zero and inf aside, a number has its like in float32; half of the smallest is rounded to zero.
_LEAST_FLOAT32, _LARGEST_FLOAT32 = 2.0**-149, torch.finfo(torch.float32).max
_TORCH_EPS = 1e-6
"""What torch.nn.utils.clip_grads_with_norm_ adds to the norm."""


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``, in place, and return the norm before.

    A drop-in for ``torch.nn.utils.clip_grad_norm_``: signature, return value, warnings and numbers (to 5e-6
    relative). It differs where torch's result is wrong: the norm is summed in float64 (torch's is off by up to 0.5%
    at 67M float32 entries on CPU) and neither overflows nor underflows; a parameter given twice counts once; under a
    non-finite norm the gradients are left as they are (torch turns finite entries into 0 or NaN); below the bound
    they are not touched; complex and sparse gradients work, and so do DTensors of any placements and meshes, beside
    plain ones: the norm is the same on every rank, after one collective that all ranks must call.

    Args:
        parameters: parameters whose ``.grad`` is clipped; those without are passed over.
        max_norm: bound on the norm of all gradients together, at least 0; ``math.inf`` only measures. Whatever
            ``float`` takes, as in torch.
        norm_type: the p of the p-norm; ``math.inf`` or "inf" is the largest absolute entry.
        error_if_nonfinite: raise instead of returning a NaN or inf norm.
        foreach: accepted for compatibility; the fastest path is chosen by itself.

    Returns:
        [] the norm before clipping: float32, or float64 where a gradient is float64 or float32 cannot hold it. A
        replicated DTensor where all gradients are DTensors on one mesh, as under FSDP2; a plain tensor elsewhere.

    Raises:
        NonFiniteGradientError: a RuntimeError, under ``error_if_nonfinite``; nothing has been modified.
        TypeError, ValueError: for a bound that is no number or negative, or gradients in place of parameters.

    Does not sync the host on an accelerator, except for ``error_if_nonfinite`` and to read a bound that lies there.
    """
    checked = _parameters("clip_grad_norm_", parameters)
    bound = _bound("clip_grad_norm_", "max_norm", max_norm)
    order = _order("clip_grad_norm_", norm_type)
    entry = None if error_if_nonfinite else _entry(checked, order)
    if entry is None:
        return _clipped(checked, bound, order, error_if_nonfinite)
    if entry.captured is None and not (entry.is_rehearsed and _capture(entry, checked, order)):
        with entry.slots.active():
            total = _clipped(checked, bound, order, error_if_nonfinite)
        entry.is_rehearsed = not entry.slots.missed
        return total
    assert entry.captured is not None, "it was captured now, or before"
    return entry.captured.replay(checked, bound)


def _clipped(
    parameters: list[Tensor], bound: float | Tensor, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """The norm before clipping, of gradients that are clipped now."""
    gradients = settle(parameters)
    total, table = _total(gradients, norm_type, error_if_nonfinite, among=parameters)
    _scale(parameters, bound, total, table)
    # A rank without gradients must return what the others do.
    return _narrowed(total, gradients or [p for p in parameters if is_distributed(p)], table)


class _Captured:
    """The same as a graph; the bound is read from memory."""

    def __init__(
        self, parameters: list[Tensor], norm_type: float, capture: Callable[..., Graph[Tensor]]
    ) -> None:
        self._bound = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        self._graph = capture(lambda: _clipped(parameters, self._bound, norm_type, error_if_nonfinite=False))

    def replay(self, parameters: list[Tensor], bound: float) -> Tensor:
        """[] the norm before clipping."""
        self._bound.fill_(bound)
        total = self._graph.replay().clone()
        tell_autograd([parameter.grad for parameter in parameters])
        return total


class _Kept(threading.local):
    """Graphs by device, of this thread."""

    def __init__(self) -> None:
        self.graphs: dict[torch.device, Graphs[_Captured]] = {}


_KEPT = _Kept()


def _entry(parameters: list[Tensor], norm_type: float) -> Entry[_Captured] | None:
    """What a graph is kept by for these gradients; None where they are clipped by operations that are launched."""
    device = parameters[0].device if parameters else torch.device("cpu")
    if device.type != "cuda" or norm_type not in (1.0, 2.0) or torch.compiler.is_compiling():
        return None
    gradients = [parameter.grad for parameter in parameters]
    if not any(gradient is not None for gradient in gradients) or not can_capture(device):
        return None
    graphs = _KEPT.graphs.setdefault(device, Graphs(device))
    return graphs.of(norm_type, gradients)


def _capture(entry: Entry[_Captured], parameters: list[Tensor], norm_type: float) -> bool:
    graphs = _KEPT.graphs[parameters[0].device]
    return graphs.capture(entry, partial(_Captured, parameters, norm_type))


@torch.no_grad()
def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale all gradients by ``min(1, max_norm / (total_norm + 1e-6))``, in place.

    A drop-in for ``torch.nn.utils.clip_grads_with_norm_``. With a non-finite ``total_norm`` the gradients are left as
    they are; below the bound they are not touched. Arguments as in `clip_grad_norm_`; ``total_norm`` is a [] tensor,
    or a [] DTensor, which is made whole: a collective where it is ``Partial``.
    Does not sync the host on an accelerator, except to read a bound that lies there.
    """
    checked = _parameters("clip_grads_with_norm_", parameters)
    bound = _bound("clip_grads_with_norm_", "max_norm", max_norm)
    rule = "total_norm must be one number, as get_total_norm() returns it"
    check_kind(total_norm, Tensor | Real, "clip_grads_with_norm_(total_norm=...)", rule)
    # Without a device of its own a default device would take the tensor away from where it is.
    given = total_norm if isinstance(total_norm, Tensor) else torch.tensor(total_norm, device="cpu")
    if given.numel() != 1:
        raise ValueError(
            f"clip_grads_with_norm_(total_norm=...): {rule}, not a tensor of shape {list(given.shape)}"
        )
    _scale(checked, bound, whole(given).detach().to(wide_dtype(given.device)).reshape(()))


@torch.no_grad()
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor],
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    """Clamp every entry of every gradient into ``[-clip_value, clip_value]``, in place.

    A drop-in for ``torch.nn.utils.clip_grad_value_`` that also takes complex (by real and imaginary part) and sparse
    gradients. ``foreach`` is accepted for compatibility. Does not sync the host on an accelerator, except to read a
    bound that lies there.

    Raises:
        TypeError, ValueError: for a bound that is no number or negative, or gradients in place of parameters.
    """
    checked = _parameters("clip_grad_value_", parameters)
    bound = _bound("clip_grad_value_", "clip_value", clip_value)
    settle(checked)
    clamp(checked, (-bound, bound))


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Norm of all tensors taken as one vector: for p = 2 the root of the sum of all squares.

    A drop-in for ``torch.nn.utils.get_total_norm``, summed in float64 without overflow or underflow. The 0-norm is
    the number of entries that are not zero (torch counts tensors). Parameters are refused, for their norm is the
    weights' and not the gradients'.

    Args:
        tensors: gradients, such as ``[p.grad for p in model.parameters() if p.grad is not None]``.
        norm_type: the p of the p-norm; ``math.inf`` or "inf" is the largest absolute entry.
        error_if_nonfinite: raise instead of returning a NaN or inf norm.
        foreach: accepted for compatibility.

    Returns:
        [] the norm: float32, or float64 where a tensor is float64 or float32 cannot hold it; 0 for no tensors. A
        replicated DTensor where all tensors are DTensors on one mesh; a plain tensor elsewhere.

    Does not sync the host on an accelerator, except for ``error_if_nonfinite``.
    """
    given = [tensors] if isinstance(tensors, Tensor) else list(_each("get_total_norm", "tensors", tensors))
    _check_tensors("get_total_norm", "tensors", given)
    if any(isinstance(tensor, nn.Parameter) for tensor in given):
        raise TypeError(
            "get_total_norm(tensors=...): parameters were given, whose norm is that of the weights; pass the gradients "
            "[p.grad for p in parameters if p.grad is not None], or [p.detach() for p in parameters] for the weights"
        )
    total, table = _total(settled(given), _order("get_total_norm", norm_type), error_if_nonfinite)
    return _narrowed(total, given, table)


def _parameters(function: str, parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Each parameter once, checked."""
    if isinstance(parameters, Tensor):
        given = [parameters]
    else:
        given = list(_each(function, "parameters", parameters))
        if not given and isinstance(parameters, Iterator):
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",  # torch's words
                stacklevel=4,
            )
    _check_tensors(function, "parameters", given)
    if given and not any(isinstance(t, nn.Parameter) or t.requires_grad or t.grad is not None for t in given):
        raise TypeError(
            f"{function}(parameters=...): these tensors have no .grad and need none, so they look like gradients; "
            "pass the parameters themselves"
        )
    if len(set(map(id, given))) == len(given):
        return given
    return list({id(tensor): tensor for tensor in given}.values())


def _each(function: str, argument: str, given: Iterable[Tensor]) -> Iterator[Tensor]:
    try:
        return iter(given)
    except TypeError:
        raise TypeError(
            f"{function}({argument}=...): {argument} must be tensors, such as model.parameters(), not "
            f"{type(given).__name__}"
        ) from None


def _order(function: str, norm_type: float) -> float:
    try:
        return float(norm_type)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{function}(norm_type=...): norm_type must be a number or 'inf', not {type(norm_type).__name__}"
        ) from None


def _check_tensors(function: str, argument: str, given: list[Tensor]) -> None:
    if are_plain(given):
        return
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{function}({argument}=...): {argument} must be tensors, not {type(tensor).__name__}"
            )


def _bound(function: str, argument: str, value: float) -> float:
    try:
        bound = float(value)  # as torch does: strings, bools and NumPy's numbers are taken
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(
            f"{function}({argument}={value!r}): {argument} must be a number, not {type(value).__name__}"
        ) from error
    if not bound >= 0:
        raise ValueError(
            f"{function}({argument}={value!r}): {argument} must be at least 0 (a negative one would turn every "
            "gradient around); to turn clipping off do not call the function"
        )
    return bound


def _total(
    gradients: Sequence[Tensor], norm_type: float, error_if_nonfinite: bool, *, among: Sequence[Tensor] = ()
) -> tuple[Tensor | float, Table | None]:
    """The norm of all gradients, a number where the host knows it; and where they lie, if that is known."""
    if math.isnan(norm_type):
        raise ValueError(f"norm_type={norm_type!r}: norm_type must be a number or inf")
    device = next((t.device for t in (*gradients, *among)), torch.device("cpu"))
    if norm_type < 0:  # an empty tensor has no smallest entry
        gradients = [gradient for gradient in gradients if gradient.numel()]
    total, table = total_norm(gradients, norm_type, device, among=among)
    if error_if_nonfinite and not math.isfinite(total):
        raise NonFiniteGradientError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped; nothing has been modified. To get the norm without this error set `error_if_nonfinite=False`"
        )
    return total, table


def _scale(
    parameters: list[Tensor], bound: float | Tensor, total: Tensor | float, table: Table | None = None
) -> None:
    if isinstance(total, float):
        assert isinstance(bound, float), "both are known on the host"
        factor = min(1.0, bound / (total + _TORCH_EPS)) if math.isfinite(total) else 1.0
        if factor != 1.0:
            if table is None:
                separate(parameters)
            scale(parameters, factor, table)
        return
    separate(parameters)
    coefficient = (bound / (total + _TORCH_EPS)).clamp(max=1.0)
    scale(parameters, torch.where(torch.isfinite(total), coefficient, torch.ones_like(coefficient)))


def _narrowed(total: Tensor | float, gradients: Sequence[Tensor], table: Table | None) -> Tensor:
    """The norm in float32, or in float64 where a gradient is float64 or, as the host can see, float32 is too narrow.

    Of DTensors on one mesh it is one too, the same on each of its ranks, as code that is written for torch expects.
    """
    if table is not None and table.tensors:  # plain ones that were read as they are
        is_wide, gradients = table.is_wide, []
    else:
        is_wide = any(gradient.dtype in WIDE for gradient in gradients)
    if isinstance(total, Tensor):
        return on_mesh_of(gradients, total if is_wide else total.float())
    fits = total == 0 or not math.isfinite(total) or _LEAST_FLOAT32 <= total <= _LARGEST_FLOAT32
    dtype = torch.float64 if is_wide or not fits else torch.float32
    return on_mesh_of(gradients, torch.tensor(total, dtype=dtype, device="cpu"))
