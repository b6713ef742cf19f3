"""What the stages of the pipeline hand to each other: slotted, and made of norms, never of gradients.

``measure`` makes a `GradientNorms`; a policy turns it into a `Decision`; ``apply`` carries that out; the guard sums
the step up in a ``StepReport``, which stands in ``guard.report`` with the ``Recorder`` protocol. None of them changes
once it is made; they are not frozen, for that would make each of them four times as slow to make.
"""

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""A policy's state: flat, tensors only, on the device of the norms."""


def is_on_host(tensor: Tensor) -> bool:
    """Whether its numbers may be read without waiting: they are on CPU, and nobody traces or watches operations."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
    )


def combine(norms: Tensor, norm_type: float) -> Tensor:
    """Norm of a whole from the norms of its parts: ``(sum n_i^p)^(1/p)``, relative to the part that counts most.

    ``norms`` has shape [..., k]; the result has shape [...] and the same dtype. Scaling by the largest part, of a
    negative order by the smallest, keeps finite parts from ever giving a non-finite or zero whole. No host sync.
    """
    if norms.numel() == 0:
        return norms.new_zeros(norms.shape[:-1])
    if norm_type == math.inf:
        return norms.amax(-1)
    if norm_type == -math.inf:
        return norms.amin(-1)
    if norm_type == 0:  # the number of entries that are not zero: counts add up
        return norms.sum(-1)
    if norms.dim() == 1 and norm_type in (1.0, 2.0) and is_on_host(norms):
        whole = _vector_norm(norms, norm_type)
        if 1e-140 < whole.item() < 1e150 and norms.dtype == torch.float64:  # no power has left the range
            return whole
    most = norms.amax(-1) if norm_type > 0 else norms.amin(-1)
    scale = torch.where((most > 0) & (most < math.inf), most, torch.ones_like(most))
    return _vector_norm(norms / scale.unsqueeze(-1), norm_type) * scale


def _vector_norm(values: Tensor, norm_type: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(values, norm_type, dim=-1)
    return norm


def take(values: Tensor, rows: Sequence[int]) -> Tensor:
    """Return ``values[rows]``, without a host sync after the first call with these rows."""
    return values.index_select(0, index(rows, values.device))


def index(rows: Sequence[int], device: torch.device) -> Tensor:
    """Return ``rows`` as a tensor on ``device``, made once."""
    return fixed(tuple(rows), torch.int64, device)


def fixed(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return these numbers as a tensor on ``device``, made once: to make it waits for the device."""
    return kept(made(values, dtype, device))


@lru_cache(maxsize=512)
def made(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return these numbers as a tensor on ``device``, the same while they are among the last that were asked for."""
    return torch.tensor(values, dtype=dtype, device=device)


_IN_GRAPHS: dict[int, Tensor] = {}


def kept(tensor: Tensor) -> Tensor:
    """Keep it for good while a CUDA graph is captured, gradkeel's or the user's, which holds its address alone."""
    if tensor.is_cuda and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _IN_GRAPHS[id(tensor)] = tensor
    return tensor


@lru_cache(maxsize=64)
def expanded(values: tuple[int, ...], counts: tuple[int, ...]) -> tuple[int, ...]:
    """Repeat each of n values as often as its count says: a number per parameter becomes a number per unit."""
    return tuple(value for value, times in zip(values, counts, strict=True) for _ in range(times))


@lru_cache(maxsize=64)
def rows_of(counts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """Return indices that lay n runs of ``counts`` values each out as rows of ``width`` places, row after row.

    Each run begins a row of its own, and has one even where it is empty; places that are left over hold the number
    of all values.
    """
    places, start, end = list[int](), 0, sum(counts)
    for count in counts:
        places += [*range(start, start + count), *[end] * (rows_for(count, width) * width - count)]
        start += count
    return torch.tensor(places, dtype=torch.int64, device=device)


def rows_for(count: int, width: int) -> int:
    """Return how many rows of ``width`` places so many values take, at least one."""
    return max(1, -(-count // width))


def per_tensor(units: Tensor, norms: "GradientNorms", *, least: bool = False) -> Tensor:
    """[n] norm of each tensor from those of its units, or the least of them."""
    counts = norms.unit_counts
    if not any(counts):
        return torch.full_like(norms.norms, torch.inf if least else 0.0)
    # In two rounds of equal rows, filled up with what counts for nothing: as many operations whatever the tensors,
    # in a fixed order, and few places are left over even where one tensor has most of the units.
    width = math.isqrt(max(counts)) + 1
    pieces = tuple(rows_for(count, width) for count in counts)
    for runs, places in ((counts, width), (pieces, max(pieces))):
        filled = torch.cat([units, units.new_full((1,), torch.inf if least else 0.0)])
        rows = filled.index_select(0, kept(rows_of(runs, places, units.device))).reshape(-1, places)
        units = rows.amin(1) if least else combine(rows, norms.norm_type)
    return units


def from_memory(numbers: bytearray) -> Tensor:
    """Make [k] float64 of what the native kernels have written: a tensor of the same memory."""
    if not numbers:  # which torch refuses
        return torch.empty(0, dtype=torch.float64, device="cpu")
    return torch.frombuffer(numbers, dtype=torch.float64)


def from_list(values: Sequence[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Make [k] a tensor of these numbers on the host; faster than ``torch.tensor``, and no copy from elsewhere."""
    wide = torch.float64 if dtype.is_floating_point else torch.int64
    tensor = torch.frombuffer(array("d" if wide.is_floating_point else "q", values), dtype=wide)
    return tensor if dtype == wide else tensor.to(dtype)


@dataclass(frozen=True, slots=True)
class Lines:
    """A formula that is followed for each of many cells, operation by operation.

    Its numbers are in this order: what all cells share, what each has of its own, constants, and results of the lines.
    """

    shared: int  # how many numbers all cells share
    own: int  # how many each has of its own: its norm, what else is looked at, and what is remembered of it
    constants: tuple[float, ...]  # these numbers stand in the formula
    # each line's, by name, and the places of the numbers that it is on
    operations: tuple[tuple[Any, ...], ...]
    # the places of what comes of it: a verdict, a bound, and what is remembered from now on
    found: tuple[int, ...]
    # the places of what decides whether a norm enters the cell's ring of them, of how many it has seen, and of the
    # norm; empty where there is no ring. The operation "window" is of the ring as it was.
    entry: tuple[int, ...] = ()


compilers: list[Callable[[Lines], Callable[..., Any] | None]] = []
"""Who makes fast functions of formulas: the kernels, of which policies know nothing, put theirs here."""

_Class = TypeVar("_Class", bound=type)
_MAKERS: dict[type, Callable[[Any], Tensor]] = {
    float: partial(torch.full, (), dtype=torch.float64, device="cpu"),
    bool: partial(torch.full, (), dtype=torch.bool, device="cpu"),
    list: from_list,
    bytearray: from_memory,
}


def late(*names: str) -> Callable[[_Class], _Class]:
    """These fields of a slotted dataclass may be given as numbers of the host's, which are a tensor once it is read.

    On CPU making a tensor takes longer than all that is done with it, and most are never looked at. What was given
    stays in the field of the same name with ``known_`` before it.
    """

    def of(kind: _Class) -> _Class:
        for name in names:
            slot = vars(kind)[name]
            setattr(kind, f"known_{name}", slot)
            setattr(kind, name, property(_reader(slot.__get__, slot.__set__), slot.__set__))
        return kind

    return of


def _reader(get: Callable[[Any], Any], put: Callable[[Any, Any], None]) -> Callable[[Any], Any]:
    def read(owner: Any) -> Any:
        value = get(owner)
        make = _MAKERS.get(type(value))
        if make is not None:
            value = make(value)
            put(owner, value)
        return value

    return read


@late("norms", "total")
@dataclass(slots=True, eq=False)
class GradientNorms:
    """The norms of the TRUE gradients of one selection of parameters, at one step.

    n is the number of parameters, u the number of their units (output rows or filters). Every tensor is float64
    (float32 on devices without it) and on one device. A parameter without a gradient has the norm 0.

    Attributes:
        names: the n parameters' names, in the optimizer's order.
        norms: [n] norm of each parameter's gradient.
        total: [] norm of all of them together: the root of the sum of powers.
        norm_type: the p of the p-norm; ``math.inf`` is the largest absolute entry.
        groups: the n parameters' group indices in the optimizer.
        step: the number of this step, from 1.
        weights: [n] norm of each parameter itself, where a policy asked for it.
        sizes: the n parameters' numbers of entries.
        units: [u] norm of each unit's gradient, parameter after parameter, where a policy asked for it.
        unit_weights: [u] norm of each unit's weights, likewise.
        unit_counts: how many units each of the n parameters has; sums to u.
        unit_sizes: how many entries a unit of each of the n parameters has.
        peaks: [n, 2] each gradient's lowest and highest entry, where a policy asked for it.
        loss: [] the loss of this step, where the user logged it before the step.
    """

    names: tuple[str, ...]
    norms: Tensor
    total: Tensor
    norm_type: float
    groups: tuple[int, ...]
    step: int
    sizes: tuple[int, ...] = ()
    weights: Tensor | None = None
    units: Tensor | None = None
    unit_weights: Tensor | None = None
    unit_counts: tuple[int, ...] = ()
    unit_sizes: tuple[int, ...] = ()
    peaks: Tensor | None = None
    loss: Tensor | None = None

    if TYPE_CHECKING:

        @property
        def known_norms(self) -> Tensor | bytearray:
            """The same as the norms, or the host's memory of them that they were given as."""

        @property
        def known_total(self) -> Tensor | float:
            """The same, or the number of the host's that it was given as."""

    def after(self, decision: "Decision") -> "GradientNorms":
        """The norms that the gradients have after a decision, which must not clamp; does not sync the host."""
        norms, known, unit_factors = self, decision.known_coefficients, decision.unit_coefficients
        factors = None if isinstance(known, float) and known == 1.0 else decision.coefficients
        if factors is not None:
            units, is_one = norms.units, factors.dim() == 0
            if units is not None:
                rows = expanded(tuple(range(len(norms.names))), norms.unit_counts)
                units = units * (factors if is_one else take(factors, rows))
            tensors = norms.norms * factors
            total = norms.total * factors if is_one else combine(tensors, norms.norm_type)
            norms = replace(norms, norms=tensors, total=total, units=units)
        if unit_factors is not None:
            assert norms.units is not None, "a decision on units comes from norms of units"
            units = norms.units * unit_factors
            tensors = per_tensor(units, norms)
            norms = replace(norms, norms=tensors, total=combine(tensors, norms.norm_type), units=units)
        return norms


@late("coefficients", "skip", "bound")
@dataclass(slots=True, eq=False)
class Decision:
    """What a policy wants done to the gradients of its selection; the parts that are None are not wanted.

    The parts combine by multiplication, in this order: coefficients, unit coefficients, then the clamp. An empty
    decision keeps the gradients as they are.

    Attributes:
        coefficients: [] one for all parameters, or [n] one for each; finite, above 0.
        unit_coefficients: [u] one for each unit.
        clamp: lowest and highest value that an entry may have; whether any was outside, reports know where the policy's
            needs have peaks.
        skip: [] bool: True asks for the step to be skipped.
        bound: [] or [n] or [u] the bound that was in force (inf where there was none), for reports and records.
    """

    coefficients: Tensor | None = None
    unit_coefficients: Tensor | None = None
    clamp: tuple[float, float] | None = None
    skip: Tensor | None = None
    bound: Tensor | None = None

    def beside(self, norms: Tensor) -> "Decision":
        """The same where norms are on an accelerator: what is on the host is sent there, which syncs it."""
        return Decision(
            coefficients=_sent(self.known_coefficients, norms),
            unit_coefficients=_sent(self.unit_coefficients, norms),
            clamp=self.clamp,
            skip=self.known_skip,  # type: ignore[arg-type]  # a number of the host's may be given
            bound=_sent(self.known_bound, norms),
        )

    def apart(self) -> "Decision":
        """The same decision, which stays as it is when whoever made it writes to its tensors and lists again."""
        return Decision(
            coefficients=_copied(self.known_coefficients),
            unit_coefficients=_copied(self.unit_coefficients),
            clamp=_copied(self.clamp),
            skip=_copied(self.known_skip),
            bound=_copied(self.known_bound),
        )

    if TYPE_CHECKING:

        @property
        def known_coefficients(self) -> Tensor | float | list[float] | None:
            """The same, or the numbers of the host's that they were given as."""

        @property
        def known_skip(self) -> Tensor | bool | None:
            """The same, or what the host knows."""

        @property
        def known_bound(self) -> Tensor | float | list[float] | None:
            """The same, or the numbers of the host's that it was given as."""


def _sent(value: Any, beside: Tensor) -> Any:
    if isinstance(value, list):
        return from_list(value).to(beside)
    return value.to(beside.device) if isinstance(value, Tensor) and value.dim() else value


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return value.copy() if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Needs:
    """What a policy wants measured; the guard measures it once.

    ``unit_dim`` is the dimension that counts the units, where the policy looks at units: a tensor with more than one
    dimension is measured over all its other dimensions, any other tensor is one unit. A policy that looks at the loss
    says so, for each data-parallel rank has a loss of its own, and they must agree on one.
    """

    norm_type: float = 2.0
    weights: bool = False
    unit_dim: int | None = None
    peaks: bool = False
    loss: bool = False


class Window(Protocol):
    """What a guard must know of the accumulation window that the gradients belong to."""

    @property
    def ranks(self) -> Any:
        """The ``ranks.group.Ranks`` over which the window's batch is spread; None for one process."""

    def check_step(self) -> None:
        """Raise `WindowError` unless the window is complete."""

    def weight(self) -> Tensor | float:
        """[] weight of the window on this rank."""

    def agree(self, weight: Tensor, loss: Tensor | None) -> None:
        """Take note of the window's [] weight and [] mean loss over all ranks, where there are some."""

    def factor(self) -> Tensor | float:
        """[] what turns the accumulated sums into the window's mean: 1 / (total weight); 0 for an empty window."""

    @property
    def reduction(self) -> str:
        """What losses are: "sum" over their items, or "mean"."""

    @property
    def per(self) -> tuple[str, ...]:
        """By what the sums are divided, by name."""

    def mean_of(self, total: float) -> float:
        """What turns sums of another such total weight, accumulated by backwards of their own, into their mean."""

    def is_empty(self) -> bool | Tensor:
        """Whether the window's total weight is zero, so that there is nothing to step on."""

    def drop(self) -> None:
        """Discard an open window and its gradients."""

    def closed(self, *, stepped: bool | Tensor) -> None:
        """Called after the optimizer's step; the next micro-batch opens a new window."""
