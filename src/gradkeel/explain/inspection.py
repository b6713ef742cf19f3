"""Looks into one pass of a model: the first module and operation that leave the finite numbers, or their range."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

_HALF = (torch.float16, torch.bfloat16)
_GREW = 10.0
# These hand on what they are given, and make no number of their own.
_NOT_MADE_BY = ("view", "detach", "clone", "copy_", "isfinite", "isnan", "isinf", "masked_fill")


class Inspection:
    """What was seen of the passes: the bad one first, then a good one to compare with."""

    def __init__(self, model: nn.Module | None) -> None:
        # The first whose output was not finite; else, once compared, the first with ten times that of the good pass.
        self.module: str | None = None
        self.op: str | None = None  # the first that made a number that is not finite from finite ones
        self._model = model
        self._sizes: dict[str, float] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the bad pass."""
        with self._hooked(self._sizes), _FirstBad(self):
            yield

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Watch a good pass, and compare."""
        usual: dict[str, float] = {}
        found = self.module
        with self._hooked(usual):
            yield
        grown = (name for name, size in self._sizes.items() if size > _GREW * usual.get(name, size) > 0)
        self.module = found or next(grown, None)

    @contextlib.contextmanager
    def _hooked(self, sizes: dict[str, float]) -> Iterator[None]:
        """The largest entry of each module's output, in the order in which they end; inf where it is not finite."""

        def note(name: str) -> Any:
            def hook(_: nn.Module, __: object, output: object) -> None:
                outputs = [
                    t for t in tree_flatten(output)[0] if isinstance(t, Tensor) and t.is_floating_point()
                ]
                if not outputs:
                    return
                with torch.no_grad():
                    size = max(float(t.detach().abs().max()) if t.numel() else 0.0 for t in outputs)
                    finite = all(bool(torch.isfinite(t).all()) for t in outputs)
                if name not in sizes:
                    sizes[name] = size if finite else float("inf")
                    if not finite and self.module is None:
                        self.module = name

            return hook

        named = [] if self._model is None else [item for item in self._model.named_modules() if item[0]]
        handles = [module.register_forward_hook(note(name)) for name, module in named]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _FirstBad(TorchDispatchMode):
    """Notes the first operation that makes a non-finite number from finite ones, forward or backward."""

    def __init__(self, found: Inspection) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.").split(".")[0]
        if (
            self._found.op is None
            and name not in _NOT_MADE_BY
            and "empty" not in name  # whatever was in memory before
            and not name.startswith("c10d")  # other ranks' numbers
            and not _is_finite(result)
        ):
            if _is_finite((args, kwargs)):
                self._found.op = name
            elif _has_bad_number((args, kwargs)):
                self._found.op = f"{name} by a number that is not finite"
        return result


def _is_finite(tree: object) -> bool:
    return all(
        bool(torch.isfinite(t).all())
        for t in tree_flatten(tree)[0]
        if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex()) and t.device.type != "meta"
    ) and not _has_bad_number(tree)


def _has_bad_number(tree: object) -> bool:
    numbers = [x for x in tree_flatten(tree)[0] if isinstance(x, float)]
    return any(x != x or x in (float("inf"), float("-inf")) for x in numbers)


class _Float32(TorchFunctionMode):
    """Turns half tensors that are asked for into float32 ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.half, Tensor.bfloat16):
            return args[0].float()
        if func is Tensor.to:
            args, kwargs = tree_map(_unless_half, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _unless_half(x: Any) -> Any:
    return torch.float32 if isinstance(x, torch.dtype) and x in _HALF else x


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Without autocast, whoever turns it on, and without conversions to half; half weights stay what they are."""
    enter = torch.autocast.__enter__

    def enter_disabled(self: Any) -> Any:
        self._enabled = False
        return enter(self)  # type: ignore[no-untyped-call]

    torch.autocast.__enter__ = enter_disabled  # type: ignore[method-assign]
    try:
        with _Float32():
            yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


def samples_of(batch: Any) -> int | None:
    """How many samples a batch has; None where its tensors do not agree on it in dimension 0."""
    sizes = {len(t) for t in tree_flatten(batch)[0] if isinstance(t, Tensor) and t.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def take(batch: Any, samples: Sequence[int]) -> Any:
    """These samples of a batch alone."""

    def part(t: Any) -> Any:
        return t[torch.tensor(samples, device=t.device)] if isinstance(t, Tensor) and t.dim() else t

    return tree_map(part, batch)
