"""How a step is skipped: what has been done for it before it was known to be bad is put back, bit by bit."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkeel.tensors import are_plain, is_distributed, local_part


def clear_gradients(parameters: Sequence[Tensor]) -> None:
    """Set every gradient to None, so that what is not finite goes into no later sum; to 0 where its memory is kept.

    A parameter that has no gradient in the next step is left alone where it has None, and where it has 0 it is moved by
    momentum and weight decay, as after ``zero_grad(set_to_none=False)``.
    """
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is not None and is_kept(parameter, gradient):
            gradient.zero_()  # not multiplied by 0, which leaves NaN
        else:
            parameter.grad = None


def is_kept(parameter: Tensor, gradient: Tensor) -> bool:
    """Whether somebody goes on with the memory of this gradient, and so would no longer reach a new one.

    It is part of a buffer of the loop's or of DistributedDataParallel's, which may be as large as the gradient; or
    autograd, which fills leaves that require it, did not put it there. Autograd itself makes parts of the gradient of
    `torch.cat`, which may as well be zeroed.
    """
    if not are_plain([gradient]) or gradient.layout != torch.strided or gradient.requires_grad:
        return False  # made anew in each backward
    if gradient.is_inference() and not torch.is_inference_mode_enabled():
        return False  # nobody can write to it
    return (
        not parameter.requires_grad
        or gradient._is_view()
        or gradient.untyped_storage().nbytes() > gradient.nbytes
    )


class Snapshot:
    """An optimizer before a step: its settings and counters, and, with ``values``, its state and its parameters.

    Optimizers that it holds, as SAM and Lookahead do, belong to it.
    """

    def __init__(self, optimizer: Optimizer, *, values: bool = True) -> None:
        self._optimizers = list(_held(optimizer, set()))
        self._groups = [[dict(group) for group in held.param_groups] for held in self._optimizers]
        self._counters = [
            {key: value for key, value in vars(held).items() if isinstance(value, int | float | None)}
            for held in self._optimizers
        ]
        self._states: list[dict[Any, Any]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        if values:
            parameters = {id(p): p for groups in self._groups for group in groups for p in group["params"]}
            self._values = [(p, p.detach().clone()) for p in parameters.values()]
            self._states = [
                {p: copy.deepcopy(state) for p, state in held.state.items()} for held in self._optimizers
            ]

    def has_moved(self) -> bool:
        """Whether any parameter, where they were kept, is another one by now; syncs the host on an accelerator."""
        return any(not torch.equal(local_part(p), local_part(value)) for p, value in self._values)

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit by bit."""
        for parameter, value in self._values:
            parameter.copy_(value)
        for held, groups, counters in zip(self._optimizers, self._groups, self._counters, strict=True):
            vars(held).update(counters)
            for group, before in zip(held.param_groups, groups, strict=False):
                group.clear()
                group.update(before)
        for held, state in zip(self._optimizers, self._states, strict=False):
            held.state.clear()
            held.state.update(state)


def _held(optimizer: Optimizer, seen: set[int]) -> Iterator[Optimizer]:
    """The optimizer and those that it holds."""
    if id(optimizer) not in seen:
        seen.add(id(optimizer))
        yield optimizer
        for value in tuple(vars(optimizer).values()):
            if isinstance(value, Optimizer):
                yield from _held(value, seen)


class Buffers:
    """A model's buffers as of the last step, so that a skip takes back what the forward pass put into them.

    Only those that training changes are kept, which the first step shows: BatchNorm's statistics, but no masks. Where
    the optimizer's parameters have been written to between two steps, as by loading a checkpoint, what was kept belongs
    to other weights, and is not put back. Without a model nothing is kept.
    """

    def __init__(self, model: nn.Module | None, parameters: Sequence[Tensor]) -> None:
        self._places = [
            (f"{path}.{name}" if path else name, module, name)
            for path, module in (() if model is None else model.named_modules())
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_distributed(buffer)
        ]
        self._has_learned = False
        self.kept = [
            (module, name, _there(module, name).detach().clone()) for _, module, name in self._places
        ]
        self._version = _version(parameters)
        self._fits = True
        self._is_back = False

    def look(self, parameters: Sequence[Tensor]) -> None:
        """Before a step: are the parameters as the last one left them?"""
        self._fits = _version(parameters) == self._version
        self._is_back = False

    @torch.no_grad()
    def note(self, parameters: Sequence[Tensor]) -> None:
        """After a step: keep the buffers as they are."""
        if self._is_back:
            return
        pairs = [
            (m, n, kept, buffer) for m, n, kept in self.kept if (buffer := m._buffers.get(n)) is not None
        ]
        if self._has_learned and all(_is_like(buffer, kept) for _, _, kept, buffer in pairs):
            torch._foreach_copy_([kept for _, _, kept, _ in pairs], [buffer for *_, buffer in pairs])
        else:
            self.kept = [
                (m, n, buffer.detach().clone())
                for m, n, kept, buffer in pairs
                if self._has_learned or not _is_same(buffer, kept)
            ]
            self._has_learned = True
        self._version = _version(parameters)

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the buffers the contents that were kept, if these belong to the weights."""
        self._is_back = self._fits
        for module, name, kept in self.kept if self._fits else ():
            buffer = module._buffers.get(name)
            if buffer is not None and buffer.shape == kept.shape and not _is_same(buffer, kept):
                buffer.copy_(kept)

    def broken(self) -> tuple[str, ...]:
        """The names of the buffers in which there is a NaN; an inf may be a mask's."""
        return tuple(
            path
            for path, module, name in self._places
            if (buffer := module._buffers.get(name)) is not None
            and (buffer.is_floating_point() or buffer.is_complex())
            and bool(buffer.isnan().any())
        )


def _there(module: nn.Module, name: str) -> Tensor:
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer


def _is_like(one: Tensor, other: Tensor) -> bool:
    return one.device == other.device and one.shape == other.shape


def _is_same(one: Tensor, other: Tensor) -> bool:
    return _is_like(one, other) and (one.is_meta or torch.equal(one, other))


def _version(parameters: Sequence[Tensor]) -> int:
    return parameters[0]._version if parameters else 0
