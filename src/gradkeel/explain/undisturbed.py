"""Look at a model at other points than its own, and leave no trace: parameters, buffers, gradients, randomness."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Restore = Callable[[], None]


@contextmanager
def undisturbed(
    parameters: Sequence[Tensor], module: nn.Module | None, *, in_place: bool = False
) -> Iterator[Restore]:
    """Restore parameters, buffers, gradients and randomness bit by bit at the end, after an exception as well.

    Yields a function that puts buffers and randomness back to what they were at the beginning, so that each
    evaluation inside sees the same dropout masks and the same running statistics. Gradients are set aside while
    inside, not copied. What a module keeps in plain Python attributes, or draws from a generator of its own, is not
    known here and not restored. Parameters are written through ``.data``, so that a graph that still waits for its
    backward stays valid. With ``in_place`` gradients are copied as well, for a backward inside may write to where they
    lie, as into the buckets of DistributedDataParallel.
    """
    gradients = [parameter.grad for parameter in parameters]
    copies = [gradient.clone() if in_place and gradient is not None else None for gradient in gradients]
    values = [parameter.detach().clone() for parameter in parameters]
    restore_buffers = _buffers(module)
    restore_randomness = randomness(parameters)

    def restart() -> None:
        restore_buffers()
        restore_randomness()

    try:
        for parameter in parameters:
            parameter.grad = None
        yield restart
    finally:
        for parameter, value, gradient, copy in zip(parameters, values, gradients, copies, strict=True):
            parameter.data.copy_(value)
            if gradient is not None and copy is not None:
                gradient.data.copy_(copy)  # which nobody takes for a change of the gradient
            parameter.grad = gradient
        restart()


def _buffers(module: nn.Module | None) -> Restore:
    """How to put every buffer back: the same tensor object in its place, with its old entries."""
    kept = [
        (part._buffers, name, buffer, None if buffer is None else buffer.detach().clone())
        for part in (() if module is None else module.modules())
        for name, buffer in part._buffers.items()
    ]

    def restore() -> None:
        for place, name, buffer, entries in kept:
            place[name] = buffer
            if buffer is not None and entries is not None:
                buffer.data.copy_(entries)

    return restore


def randomness(tensors: Sequence[Tensor], *, numpy: bool = True) -> Restore:
    """How to put back the random states of Python, NumPy if it is in use, torch on CPU and on the tensors' devices.

    Without ``numpy`` NumPy's, which takes longer to read than all others, is left out.
    """
    kept: list[tuple[Callable[..., object], tuple[Any, ...]]] = [
        (random.setstate, (random.getstate(),)),
        (torch.set_rng_state, (torch.get_rng_state(),)),
    ]
    numpy_random = sys.modules.get("numpy.random")  # which numpy itself does not import
    if numpy and numpy_random is not None:
        # Its global state, which a user's own data code may draw from.
        kept.append((numpy_random.set_state, (numpy_random.get_state(),)))
    for device in {tensor.device for tensor in tensors}:
        if device.type in {"cpu", "meta"}:
            continue
        backend = torch.get_device_module(device)
        # MPS has one generator, and its functions take no device.
        where = () if device.type == "mps" else (device,)
        kept.append((backend.set_rng_state, (backend.get_rng_state(*where), *where)))

    def restore() -> None:
        for put, state in kept:
            put(*state)

    return restore
