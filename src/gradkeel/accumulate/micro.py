"""One micro-batch: the context around its forward and backward, and what is accumulated of it."""

import math
from contextlib import AbstractContextManager
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic

from torch import Tensor

from gradkeel.accumulate.loader import Batch, Lookahead
from gradkeel.errors import WindowError
from gradkeel.measure import wide_dtype

if TYPE_CHECKING:
    from gradkeel.accumulate.accumulator import Accumulator


class MicroBatch(Generic[Batch]):
    """One micro-batch of a window: a context for its forward AND backward.

    Attributes:
        batch: what the loader gave.
        index: its position in the window, from 0.
        is_filler: this rank has no more data and others have: the batch is the last one again, its weight counts as
            0, and so does its loss in `backward`. Multiply the loss by 0 yourself where other code runs backward.
    """

    def __init__(self, owner: "Accumulator", batch: Batch, source: Lookahead[Batch]) -> None:
        self.batch = batch
        self.index = owner._open.count
        self.is_filler = source.is_filler
        self._owner = owner
        self._source = source
        self._was_entered = False
        self._was_weighed = False
        self._last: bool | None = None
        self._context: AbstractContextManager[Any] | None = None

    @property
    def closes_window(self) -> bool:
        """Whether this is the window's last micro-batch: step after it. Known after the ``with`` block."""
        if self._last is None:
            raise WindowError(
                "micro.closes_window is known after the `with micro:` block, for the next batch is fetched only then"
            )
        return self._last

    def backward(self, loss: Tensor, *, weight: Tensor | float | None = None, scaler: Any = None) -> None:
        """Run backward on this micro-batch's loss; call it inside ``with micro:``.

        Args:
            loss: [] sum over the micro-batch's items under ``reduction="sum"``; their mean under "mean".
            weight: number of items (or tokens) in ``loss``: a number or a [] tensor on any device, at least 0.
                None counts each micro-batch alike: the window's gradient is the plain mean over micro-batches.
            scaler: the ``torch.amp.GradScaler`` in use; it scales the loss for backward only.

        Raises:
            WindowError: outside of the context, or if weights and None are mixed in one window.
            ValueError: for a negative or non-finite weight.

        Does not sync the host on an accelerator, except in float16 for a window's first weight.
        """
        amount = self._check(weight)
        owner = self._owner
        if self.is_filler:
            loss, amount = loss * 0.0, 0.0
        elif owner.reduction == "mean" and amount is not None:
            loss = loss * amount
        if scaler is not None and owner._noise is not None:
            raise ValueError(
                "micro.backward(scaler=...): the noise scale cannot be measured under a loss scale"
            )
        divisor = owner._choose_divisor(amount, is_half=scaler is not None)
        is_nothing = isinstance(amount, float) and amount == 0.0
        if not self.is_filler:
            # The mean over no items is NaN.
            owner._open.add(None if is_nothing else loss.detach(), amount)
        if is_nothing and not self._is_awaited:
            return
        scaled = loss if divisor == 1.0 else loss / divisor
        (scaled if scaler is None else scaler.scale(scaled)).backward()

    def weigh(self, weight: Tensor | float | None) -> None:
        """Tell the weight of a backward that other code runs (Accelerate, Lightning's manual mode, a pipeline).

        The loss of that backward must be the sum over the items.

        Raises:
            WindowError: outside of the context, or under ``reduction="mean"``.
        """
        amount = self._check(weight)
        if self._owner.reduction == "mean" and amount is not None:
            raise WindowError(
                "micro.weigh() needs losses that are sums, since backward is out of its hands; use reduction='sum' and "
                "multiply the mean by its weight yourself"
            )
        if not self.is_filler:
            self._owner._open.add(None, amount)

    def _check(self, weight: Tensor | float | None) -> Tensor | float | None:
        if not (self._was_entered and self._owner._is_inside):
            raise WindowError("micro.backward() and micro.weigh() belong inside the `with micro:` block")
        self._was_weighed = True
        if isinstance(weight, Tensor):
            weight = weight.detach()
            if weight.numel() != 1:
                raise ValueError(f"weight has shape {tuple(weight.shape)}: it must be one number")
            weight = weight.reshape(())
            if weight.device.type != "cpu":
                return weight.to(wide_dtype(weight.device))
            weight = weight.item()
        if weight is None:
            return None
        if isinstance(weight, bool) or not isinstance(weight, Real):
            raise TypeError(
                f"weight={weight!r}: weight must be a number or a tensor, not {type(weight).__name__}"
            )
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight={weight!r}: weight must be a finite number, at least 0")
        return float(weight)

    def __enter__(self) -> "MicroBatch[Batch]":
        """Open the micro-batch; puts gradient sync off unless it is the window's last."""
        owner = self._owner
        owner._enter()
        if owner._sync.is_needed:
            self._last = self._is_last()
        self._context = owner._sync.around(last=self._last is not False)
        self._context.__enter__()
        if owner._wide is not None and owner._sync.is_needed and self._last:
            owner._wide.pour()  # this backward's exchange is of what lies in .grad
        self._was_entered = owner._is_inside = True
        owner._watch.note()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the micro-batch; after an exception the window is kept if no gradient was touched, else broken.

        Raises:
            WindowError: if gradients have come in and nobody told their weight.
        """
        owner = self._owner
        owner._is_inside = False
        assert self._context is not None
        self._context.__exit__(kind, error, trace)
        if kind is None and not self._was_weighed and owner._watch.change() is not None:
            owner._open.broken = (
                f"micro-batch {self.index + 1} of {owner.steps} ran a backward of unknown weight"
            )
            raise WindowError(
                f"{owner._open.broken}: use micro.backward(loss, weight=...), or tell micro.weigh(weight) if other "
                "code runs backward; accumulate.drop() discards this window"
            )
        if kind is None:
            if self._last is None:
                self._last = self._is_last()
            owner._leave(last=self._last)
            if self._last and (failure := self._source.failure) is not None:
                owner._open.broken, owner._open.cause = f"the loader raised {failure!r}", failure
        elif owner._watch.change() is not None:
            owner._open.broken = (
                f"micro-batch {self.index + 1} of {owner.steps} raised {kind.__name__} during its backward"
            )

    @property
    def _is_awaited(self) -> bool:
        """Whether other ranks wait for this one's backward."""
        sync = self._owner._sync
        return sync.needs_every_backward or (sync.is_needed and self._last is True)

    def _is_last(self) -> bool:
        return self._owner._open.count + 1 >= self._owner.steps or not self._source.is_more_coming()

    def _check_was_entered(self) -> None:
        if not self._was_entered:
            raise WindowError(
                "a micro-batch was passed over: put its forward and backward inside `with micro:`"
            )
