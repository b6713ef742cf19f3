"""Exact gradient accumulation: sums with their weights, divided once, by the weight of the whole window."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradkeel.accumulate.arguments import ITEM, Reduction, check_arguments, check_loader
from gradkeel.accumulate.loader import Batch, Lookahead, Together
from gradkeel.accumulate.micro import MicroBatch
from gradkeel.accumulate.noise import NoiseMeter
from gradkeel.accumulate.sync import GradientSync
from gradkeel.accumulate.wide import WideSums
from gradkeel.accumulate.window import GradientWatch, OpenWindow, by_names, check_saved, saved_sums
from gradkeel.apply.skip import clear_gradients
from gradkeel.errors import CheckpointError, WindowError
from gradkeel.guard.guard import Guard
from gradkeel.noise_scale import NoiseScale
from gradkeel.ranks.group import Group, Ranks

_VERSION = 1


class Accumulator:
    """Makes K micro-batches count exactly like one batch of their size.

    Losses enter with their weight (items or tokens). Sums of gradients are divided once, at the window's end, by the
    weight of the whole window, inside the same coefficient as the clip:
    ``gradient = sum_k grad(loss_sum_k) / sum_k weight_k``. The mean of the micro-batches' means, which most loops
    compute, is something else as soon as the weights differ. All data-parallel ranks must make one alike.

    Args:
        guard: guards the optimizer that steps at the end of each window.
        steps: micro-batches in a window, at least 1; the last window of the data may be shorter.
        model: the DistributedDataParallel or FSDP2 model, whose gradient exchange is put off to the window's end and
            whose average over ranks is undone; windows weigh what they weigh on all ranks.
        process_group: the data-parallel ranks, as a process group or a device mesh, where the model does not tell.
        reduction: what the losses are: "sum" over the micro-batch's items, or their "mean" (torch's criteria default
            to it), which is multiplied by the weight first.
        per: names of the denominators, where terms of the loss are divided by different counts, such as
            ``("token", "sequence")``: ``micro.backward(loss, weight=n, per="sequence")``. Costs a buffer for each.
        divides: by what the model's own communication hook divides the sum over ranks; needed where
            ``register_comm_hook`` was given another hook than torch's averaging ones. 1 for a hook that only sums.
        accumulate_dtype: sum in this dtype, such as ``torch.float32`` for bfloat16 gradients, which stall otherwise
            (1 + 256 x 0.003 stays 1). Costs a buffer for every parameter.
        noise_scale: measure the gradients after each micro-batch and estimate the gradient noise scale.

    Raises:
        ValueError, TypeError: for arguments of another kind.
        WindowError: if the guard has an accumulator already.

    Example:
        >>> accumulate = gk.Accumulator(guard, steps=8)
        >>> for micro in accumulate(loader):
        ...     with micro:
        ...         loss_sum, tokens = loss_and_count(model, micro.batch)
        ...         micro.backward(loss_sum, weight=tokens)
        ...     if micro.closes_window:
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    def __init__(
        self,
        guard: Guard,
        steps: int,
        *,
        model: nn.Module | None = None,
        process_group: "Group | None" = None,
        reduction: Reduction = "sum",
        per: Sequence[str] = (ITEM,),
        divides: float | None = None,
        accumulate_dtype: torch.dtype | None = None,
        noise_scale: bool = False,
    ) -> None:
        check_arguments(guard, steps, model, reduction, per, accumulate_dtype, noise_scale=noise_scale)
        if guard.window is not None:
            raise WindowError("Accumulator(guard=...): this guard has an accumulator already; use that one")
        self.guard = guard
        self.steps = steps
        self.reduction: Reduction = reduction
        self.per = tuple(per)
        self._sync = GradientSync(model, process_group, divides)
        if noise_scale and self._sync.is_needed:
            raise ValueError("Accumulator(noise_scale=True): needs one process; ranks exchange windows only")
        self._watch = GradientWatch(lambda: guard.parameters)
        # What is kept apart from .grad until the window closes.
        apart = accumulate_dtype is not None or len(self.per) > 1
        self._sums = {name: WideSums(accumulate_dtype or torch.float32) for name in self.per if apart}
        if self._sums and self._sync.keeps_sums:
            words = "FullyShardedDataParallel (FSDP1) sums itself; use FSDP2 (fully_shard)"
            raise ValueError(f"Accumulator(per=..., accumulate_dtype=...): {words}")
        self._noise = NoiseMeter(guard) if noise_scale else None
        self._divisor: float | None = None
        self._last_loss: Tensor | None = None
        self._open = OpenWindow.empty(self.per)
        self._resumed = False
        self._is_inside = False  # of a micro-batch's context
        guard.window = self
        try:
            guard.connect()
        except BaseException:
            guard.window = None  # an accumulator that nobody has would stop every step
            raise

    # ---- micro-batches -----------------------------------------------------------------------------------------

    def __call__(self, loader: Iterable[Batch]) -> "Iterator[MicroBatch[Batch]]":
        """Go through ``loader`` once, in windows of ``steps`` micro-batches; the last window ends with the data.

        The next batch is fetched when the current one is done with, so a loader may reuse its buffers, and random
        numbers are drawn in the order of a plain loop.

        Data-parallel ranks go on together to the end of the longest loader: a rank that has no more data repeats its
        last batch with the weight 0 (``micro.is_filler``). They tell each other the lengths of their loaders once, or,
        where one has no length, before each window whether they have more; the last window is filled up then. A
        loader's error is raised by the window's step, which the other ranks then do not wait for.

        Raises:
            WindowError: if a window is open still, after an early ``break``: call `finish` or `drop` first.
            TypeError: for what cannot be gone through.
        """
        check_loader(loader)
        if self._open.count and not self._resumed:  # a checkpoint may have been taken inside of a window
            raise WindowError(
                f"a window is open after micro-batch {self._open.count} of {self.steps} (the loop was left early, or "
                "not followed by optimizer.step()); call accumulate.finish() and step, or accumulate.drop(), first"
            )
        self._resumed = False
        return self._windows(loader)

    def micro(self) -> "MicroBatch[None]":
        """The next micro-batch of a loop that draws its batches by calls: ``with accumulate.micro() as micro:``.

        Windows have ``steps`` of them; `finish` closes one early. Data-parallel ranks must make equally many.
        """
        self._resumed = False
        return MicroBatch(self, None, Lookahead(itertools.repeat(None), by_length=False))

    def _windows(self, loader: Iterable[Batch]) -> "Iterator[MicroBatch[Batch]]":
        if self.ranks is None:
            source = Lookahead(loader, by_length=self._sync.is_needed)
        else:
            device = self.guard.device
            source = Together(loader, self.ranks, device, opens_window=lambda: self._open.count == 0)
        while source.fetch():
            micro = MicroBatch(self, source.take(), source)
            yield micro
            if not micro._was_entered:
                raise WindowError(
                    "a micro-batch was passed over: put its forward and backward inside `with micro:`"
                )
        if self._open.count and not self._open.is_complete:
            raise WindowError(
                f"the data ended after micro-batch {self._open.count} of {self.steps} of a window that nothing has "
                "closed (its last micro-batch raised, or the loader is shorter than its length says); call "
                "accumulate.finish() and step, or accumulate.drop()"
            )

    def finish(self) -> None:
        """Close the open window early, so that the optimizer may step on what there is.

        Raises:
            WindowError: if no window is open, or its gradients have not been exchanged between ranks.
        """
        self._check_unbroken()
        if not self._open.count:
            raise WindowError("accumulate.finish(): no window is open")
        if self._sync.is_needed and not self._open.is_complete:
            raise WindowError(
                "accumulate.finish(): this window's gradients have not been exchanged between ranks, which happens in "
                "the backward of its last micro-batch; call accumulate.drop()"
            )
        self._complete()

    def drop(self) -> None:
        """Discard the open window: its gradients are cleared, and the next micro-batch opens a new one."""
        clear_gradients(self.guard.parameters)
        self._sync.drop()
        for one in self._sums.values():
            one.sums.clear()
        if self._noise is not None:
            self._noise.drop()
        if self._open.has_logged:
            self.guard.logged.pop("loss", None)
        self._watch.note()
        self._open = OpenWindow.empty(self.per)

    @property
    def loss(self) -> Tensor | None:
        """[] mean loss over the items of the window so far, or of the last window; None before the first backward."""
        loss = self._open.mean_loss()
        return self._last_loss if loss is None else loss

    @property
    def noise_scale(self) -> NoiseScale:
        """The gradient noise scale over all windows of two micro-batches or more; reading it syncs the host.

        Raises:
            ValueError: unless the accumulator was made with ``noise_scale=True``.
        """
        if self._noise is None:
            raise ValueError("accumulate.noise_scale: make the Accumulator with noise_scale=True")
        return self._noise.value()

    def _enter(self) -> None:
        """Make sure, before a micro-batch, that everything is as the last one left it."""
        if self._is_inside:
            raise WindowError("`with micro:` inside of another micro-batch's; end that one first")
        self._check_unbroken()
        self.guard.connect()  # to the parameters of a group that was added after the last window
        if self._open.count:
            if self._open.is_complete:
                raise WindowError(
                    "a micro-batch after the end of the window: call optimizer.step() (or accumulate.drop()) whenever "
                    "micro.closes_window is True"
                )
            self._watch.refuse_changes(f"before micro-batch {self._open.count + 1} of {self.steps}")
        elif self._watch.any_unchanged():
            raise WindowError(
                "a new window would add to the last one's gradients: call optimizer.zero_grad() after optimizer.step()"
            )

    def _check_unbroken(self) -> None:
        if self._open.broken is not None:
            raise WindowError(f"{self._open.broken}; call accumulate.drop() to go on") from self._open.cause

    def _choose_divisor(self, weight: Tensor | float | None, *, is_half: bool) -> float:
        """Choose once a power of two near a window's weight, by which float16 losses are divided; 1 elsewhere.

        Gradients of sums would leave float16's range. Dividing by a power of two is exact, and `factor` undoes it.
        """
        if self._divisor is None:
            if not (is_half or any(p.dtype == torch.float16 for p in self.guard.parameters)):
                self._divisor = 1.0
                return 1.0
            amount = self._sync.largest(1.0 if weight is None else float(weight), self.guard.device)
            if amount == 0.0:
                return 1.0  # nothing has been weighed yet
            self._divisor = 2.0 ** round(math.log2(amount * self.steps))
        return self._divisor

    def _leave(self, *, last: bool) -> None:
        """Take in a micro-batch whose backward has run."""
        self._open.count += 1
        if self._noise is not None:
            self._noise.note(self._open.weight, self._divisor or 1.0)
        if len(self.per) == 1:
            self._take(self.per[0])
        if last:
            self._complete()
        self._watch.note()

    def _take(self, name: str) -> None:
        """Keep what has come into ``.grad`` apart, where it must be."""
        if name in self._sums:
            self._sums[name].take(self.guard.parameters)

    def _pour(self) -> None:
        """Put what is kept apart into ``.grad``, for this backward's exchange is of that."""
        if len(self.per) == 1 and self._sums:
            self._sums[self.per[0]].pour()

    def _merge(self) -> dict[str, Tensor]:
        """Divide what is kept apart by its denominator over all ranks, and put it into ``.grad``; a collective.

        Returns what terms to come must be multiplied by. The window's weight is that of float16's divisor from then on.
        """
        totals = self._sync.added(self._open.weights(self.guard.device))
        ranks = 1 if self.ranks is None else len(self.ranks.members)
        factors = self._open.merge(totals, self._divisor or 1.0, ranks)
        first, *others = self._sums.values()
        first.absorb(others, list(factors))
        first.pour()
        return dict(zip(self.per, factors, strict=True))

    def _complete(self) -> None:
        if self._noise is not None:
            sums = self._sums.get(self.per[0])
            self._noise.close(None if sums is None else sums.sums.values(), self._divisor or 1.0)
        if len(self._open.per) > 1:
            self._merge()
        self._pour()
        self._open.is_complete = True
        self._open.total = self._open.weight
        self._watch.note()
        loss = self._open.mean_loss()
        if loss is not None:
            self._last_loss = loss
            if "loss" not in self.guard.logged:
                self.guard.log(loss=loss)
                self._open.has_logged = True

    # ---- the guard's side (norms.Window) -----------------------------------------------------------------------

    def check_step(self) -> None:
        """Raise unless the window is complete and nobody else has touched its gradients."""
        self._check_unbroken()
        if self._is_inside:
            raise WindowError("optimizer.step() inside `with micro:`; step after it, if micro.closes_window")
        if not self._open.count:
            raise WindowError(
                "optimizer.step() without a window: gradients must come through `for micro in accumulate(loader)`, and "
                "each window allows one step"
            )
        if not self._open.is_complete:
            raise WindowError(
                f"optimizer.step() after micro-batch {self._open.count} of {self.steps}: the window is not complete; "
                "step only if micro.closes_window, or call accumulate.finish() first"
            )
        self._watch.refuse_changes("before optimizer.step()")

    @property
    def ranks(self) -> Ranks | None:
        """The ranks over which the batch is spread, whose weights the guard adds up; None for one process."""
        return self._sync.ranks

    def weight(self) -> Tensor | float:
        """Return [] this rank's weight of the window."""
        return self._open.weight

    def agree(self, weight: Tensor, loss: Tensor | None) -> None:
        """Take the window's weight and mean loss over all ranks."""
        self._open.total = weight
        self._last_loss = self._last_loss if loss is None else loss

    def factor(self) -> Tensor | float:
        """Return [] the factor of sums: 1 / total weight, float16's divisor and the average over ranks undone."""
        return self._open.factor((self._divisor or 1.0) * self._sync.divisor, self.guard.device)

    def mean_of(self, total: float) -> float:
        """What turns sums of another such total weight, accumulated by backwards of their own, into their mean."""
        return self._sync.divisor / total if total else 0.0

    def is_empty(self) -> bool | Tensor:
        """Tell whether the window's total weight is 0."""
        return self._open.total == 0

    def closed(self, *, stepped: bool | Tensor) -> None:
        """Open the next window."""
        self._open = OpenWindow.empty(self.per)
        self._watch.note()

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the open window, its gradients included, so that a run killed inside it resumes bitwise equal.

        With several ranks it can be saved between windows only, and raises a `CheckpointError` inside of one.
        Loadable with ``torch.load(weights_only=True)``. Between windows it holds no tensors.
        """
        self._check_unbroken()
        if (self._sync.is_needed or self.ranks is not None) and self._open.count:
            raise CheckpointError(
                "accumulate.state_dict(): in the middle of a window each rank has sums of its own, which no checkpoint "
                "of the model holds; take checkpoints after optimizer.step()"
            )
        gradients = {p: p.grad for p in self.guard.parameters if self._open.count and p.grad is not None}
        return {
            "version": _VERSION,
            "steps": self.steps,
            "reduction": self.reduction,
            "per": list(self.per),
            **self._open.saved(),
            "divisor": self._divisor,
            "gradients": by_names(self.guard, gradients),
            **saved_sums(self.guard, {name: one.sums for name, one in self._sums.items()}),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state that ``state_dict`` gave; nothing is changed if it does not fit.

        Raises:
            CheckpointError: for another window size, reduction, version, or other parameters.
        """
        mine = {"version": _VERSION, "steps": self.steps, "reduction": self.reduction, "per": list(self.per)}
        state = check_saved(state, mine, names=self.guard.names, has_wide_sums=bool(self._sums))
        by_name = dict(zip(self.guard.names, self.guard.parameters, strict=True))
        self.drop()
        self._open = OpenWindow.loaded(state, self.per)
        self._resumed = self._open.count > 0
        self._divisor = state["divisor"]
        for name, gradient in state["gradients"].items():
            parameter = by_name[name]
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.device).clone()
            else:  # its memory is kept
                parameter.grad.copy_(gradient)
        for per, sums in {self.per[0]: state["sums"], **state["apart"]}.items():
            for name, total in sums.items():
                self._sums[per].sums[by_name[name]] = total.to(by_name[name].device).clone()
        if self._noise is not None:
            self._noise.note(self._open.weight, self._divisor or 1.0, state["sums"].values())
        self._watch.note()
        if self._open.is_complete:
            self._complete()  # which tells the guard the window's loss
