"""One micro-batch: the context around its forward and backward, and what is accumulated of it."""

import difflib
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from numbers import Real
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic

import torch
from torch import Tensor

from gradkeel.accumulate.loader import Batch, Lookahead
from gradkeel.errors import WindowError, check_kind
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
        # By denominator, of the terms whose backward has returned.
        self._weights: dict[str, Tensor | float | None] = {}
        self._told: tuple[str, Tensor | float | None] | None = None  # what `weigh` was told
        self._put_off: list[tuple[str, Tensor | float | None, Tensor, Tensor | None]] = []
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

    def backward(
        self,
        loss: Tensor,
        *,
        weight: Tensor | float | None = None,
        per: str | None = None,
        retain_graph: bool = False,
        scaler: Any = None,
    ) -> None:
        """Run backward on this micro-batch's loss, or on one of several terms of it; call it inside ``with micro:``.

        Terms of one micro-batch share its weight: each further call leaves ``weight`` out, gives the same again, or 0.
        A term without items of its own, such as a penalty, counts once for each item under ``reduction="sum"`` if
        you multiply it by the weight, and so it does under "mean" as it is. The weight counts once backward has
        returned: where it raises before it has changed a gradient, the window is as it was.

        Args:
            loss: [] sum over the micro-batch's items under ``reduction="sum"``; their mean under "mean".
            weight: number of items (or tokens) in ``loss``: a number or a [] tensor on any device, at least 0.
                None counts each micro-batch alike: the window's gradient is the plain mean over micro-batches.
            per: which of the accumulator's denominators, ``Accumulator(per=...)``, the term is divided by.
            retain_graph: keep the graph, for another term of the same forward.
            scaler: the ``torch.amp.GradScaler`` in use; it scales the loss for backward only.

        Raises:
            WindowError: outside of the context, if weights and None are mixed in one window, or for another weight
                than that of the micro-batch's terms before.
            ValueError: for a loss that is not one real number, a negative or non-finite weight, or an unknown ``per``.
            TypeError: for a loss that is no tensor.

        Under DistributedDataParallel the terms of a window's last micro-batch run in one backward when the block
        ends, for only the first backward after a forward is exchanged. Does not sync the host on an accelerator,
        except in float16 for a window's first weight, and where a further term's weight is given as a tensor.
        """
        owner = self._owner
        name, amount = self._share(weight, per)
        _check_loss(loss, owner.reduction)
        if self.is_filler:
            loss = loss * 0.0
        elif owner.reduction == "mean" and amount is not None:
            loss = loss * amount
        if scaler is not None and not callable(getattr(scaler, "scale", None)):
            raise TypeError(
                "micro.backward(scaler=...): scaler must be a torch.amp.GradScaler, or None, not "
                f"{type(scaler).__name__}"
            )
        if scaler is not None and owner._noise is not None:
            raise ValueError(
                "micro.backward(scaler=...): the noise scale cannot be measured under a loss scale"
            )
        divisor = owner._choose_divisor(amount, is_half=scaler is not None)
        is_nothing = isinstance(amount, float) and amount == 0.0
        told = None if is_nothing else loss.detach()  # the mean over no items is NaN
        is_awaited = owner._sync.needs_every_backward or (owner._sync.is_needed and self._last)
        if not is_nothing or is_awaited:  # by other ranks
            scaled = loss if divisor == 1.0 else loss / divisor
            scaled = scaled if scaler is None else scaler.scale(scaled)
            if self._last and owner._sync.exchanges_once:
                self._put_off.append((name, amount, scaled, told))
                return
            self._run(scaled, retain_graph=retain_graph)
            if len(owner.per) > 1:
                owner._take(name)  # before another denominator's comes in
        self._count(name, amount, told)

    def weigh(self, weight: Tensor | float | None) -> None:
        """Tell the weight of a backward that other code runs (Accelerate, Lightning's manual mode, a pipeline).

        The loss of that backward must be the sum over the items. The weight counts when the block ends without an
        exception.

        Raises:
            WindowError: outside of the context, under ``reduction="mean"``, or with several denominators.
        """
        name, amount = self._share(weight, None)
        if self._owner.reduction == "mean" and amount is not None:
            raise WindowError(
                "micro.weigh() needs losses that are sums, since backward is out of its hands; use reduction='sum' and "
                "multiply the mean by its weight yourself"
            )
        self._told = name, amount

    def _share(self, weight: Tensor | float | None, per: str | None) -> tuple[str, Tensor | float | None]:
        """Return the denominator of a term, and the micro-batch's weight in it."""
        if not (self._was_entered and self._owner._is_inside):
            raise WindowError("micro.backward() and micro.weigh() belong inside the `with micro:` block")
        name, amount = _one_of(self._owner.per, per), _checked(weight)
        if self.is_filler:
            return name, 0.0
        known = {**self._weights, **{name: before for name, before, _, _ in self._put_off}}
        known |= {} if self._told is None else [self._told]
        if name not in known:
            self._owner._open.per[name].check(amount)
            return name, amount
        before = known[name]
        if amount is not None and not bool(amount == 0.0) and (before is None or bool(before != amount)):
            raise WindowError(
                f"weight={weight!r} for another term of micro-batch {self.index + 1}, whose weight is {before!r}: "
                "terms of one micro-batch share its weight, so leave it out after the first; a term with another "
                "count needs a denominator of its own: Accumulator(per=('token', 'sequence')), "
                "micro.backward(loss, weight=n, per='sequence')"
            )
        return name, before

    def _count(self, name: str, amount: Tensor | float | None, loss: Tensor | None) -> None:
        """Let a term whose backward has returned enter the window, and with the first one the weight."""
        if not self.is_filler:
            if name not in self._weights:
                self._owner._open.per[name].weigh(amount)
            if loss is not None:
                self._owner._open.per[name].lose(loss)
        self._weights[name] = amount

    def _run(self, *losses: Tensor, retain_graph: bool = False) -> None:
        """Run backward; where it raises half-way, the window is broken, whoever catches that."""
        owner = self._owner
        if self._weights:
            owner._watch.note()  # what the terms before have left
        try:
            torch.autograd.backward(losses, retain_graph=retain_graph)
        except BaseException as error:
            # FSDP2 keeps the sums of a window elsewhere, so that it cannot be seen whether they have changed.
            if owner._sync.needs_every_backward or owner._watch.change() is not None:
                self._break(type(error))
            raise

    def _run_put_off(self) -> None:
        """Run the one backward of all terms that a model exchanges."""
        terms, self._put_off = self._put_off, []
        if len(self._owner.per) == 1:
            self._run(*(scaled for _, _, scaled, _ in terms))
            for name, amount, _, told in terms:
                self._count(name, amount, told)
            return
        for name, amount, _, told in terms:  # what each is divided by follows from the weights
            self._count(name, amount, told)
        try:
            factors = self._owner._merge()
            self._run(*(scaled * factors[name].to(scaled.device) for name, _, scaled, _ in terms))
        except BaseException as error:
            self._break(type(error))
            raise

    def _break(self, kind: type[BaseException]) -> None:
        self._owner._open.broken = (
            f"micro-batch {self.index + 1} of {self._owner.steps} raised {kind.__name__} during its backward"
        )

    def __enter__(self) -> "MicroBatch[Batch]":
        """Open the micro-batch; puts gradient sync off unless it is the window's last."""
        owner = self._owner
        owner._enter()
        if owner._sync.is_needed:
            self._last = self._is_last()
        # FSDP2 keeps together what it has not exchanged, so that terms are exchanged one by one.
        is_apart = len(owner.per) > 1 and owner._sync.needs_every_backward
        self._context = owner._sync.around(last=self._last is not False or is_apart)
        self._context.__enter__()
        if owner._sync.is_needed and self._last:
            owner._pour()  # this backward's exchange is of what lies in .grad
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
        assert self._context is not None
        try:
            if kind is None and self._put_off:
                self._run_put_off()
        except BaseException as raised:
            kind = type(raised)
            raise
        finally:
            owner._is_inside = False
            self._context.__exit__(None, None, None)
            if kind is None:
                self._close()
            elif owner._open.broken is None and (self._weights or owner._watch.change() is not None):
                self._break(kind)

    def _close(self) -> None:
        """Take in a micro-batch that nothing has interrupted."""
        owner = self._owner
        has_changed = owner._watch.change() is not None
        if self._told is not None:
            self._count(*self._told, None)
        elif not self._weights and has_changed and owner._open.broken is None:
            owner._open.broken = (
                f"micro-batch {self.index + 1} of {owner.steps} ran a backward of unknown weight"
            )
            raise WindowError(
                f"{owner._open.broken}: use micro.backward(loss, weight=...), or tell micro.weigh(weight) if other "
                "code runs backward; accumulate.drop() discards this window"
            )
        if self._last is None:
            self._last = self._is_last()
        owner._leave(last=self._last)
        if self._last and (failure := self._source.failure) is not None:
            owner._open.broken, owner._open.cause = f"the loader raised {failure!r}", failure

    def _is_last(self) -> bool:
        return self._owner._open.count + 1 >= self._owner.steps or not self._source.is_more_coming()


def _one_of(names: Sequence[str], per: str | None) -> str:
    if per is None and len(names) == 1:
        return names[0]
    if per is None or per not in names:
        near = difflib.get_close_matches(str(per), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"per={per!r}: must be one of Accumulator(per={tuple(names)}){hint}")
    return per


def _checked(weight: Tensor | float | None) -> Tensor | float | None:
    """Return a weight as a number, or as a [] tensor on an accelerator, where the host does not look at it."""
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


def _check_loss(loss: object, reduction: str) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.is_complex():
        rule = f"loss must be a tensor of one real number, the {reduction} over the micro-batch's items"
        check_kind(loss, Tensor, "micro.backward(loss=...)", rule)
        assert isinstance(loss, Tensor), "as check_kind has seen"
        raise ValueError(
            f"micro.backward(loss=...): {rule}, not one of shape {list(loss.shape)} and {loss.dtype}; call "
            f"loss.{reduction}() first"
        )
