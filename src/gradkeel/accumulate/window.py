"""A window has the sums of its micro-batches, gradients that nobody else may touch, and a checkpoint."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from gradkeel.accumulate.arguments import ITEM
from gradkeel.errors import CheckpointError, WindowError
from gradkeel.guard.checkpoint import check_mapping, check_parts
from gradkeel.guard.guard import Guard
from gradkeel.measure import wide_dtype
from gradkeel.tensors import Seen, entries_to_read


@dataclass(slots=True, eq=False)
class Denominator:
    """One of the numbers by which a window's sums are divided, and the losses that belong to it."""

    weight: Tensor | float = 0.0  # of this rank's micro-batches
    loss: Tensor | None = None  # [] sum of the losses of this rank; None where nobody told any
    weighs: bool | None = None  # whether the micro-batches have weights of their own; None before the first

    def check(self, weight: Tensor | float | None) -> None:
        """Refuse a micro-batch that is weighed where the others count alike, or the other way round."""
        if self.weighs is not None and self.weighs != (weight is not None):
            raise WindowError(
                "weight=None counts each micro-batch alike, and cannot be mixed with weights in one window; give every "
                "micro-batch its number of items"
            )

    def weigh(self, weight: Tensor | float | None) -> None:
        """Take in a micro-batch's weight; None counts each micro-batch alike."""
        self.check(weight)
        self.weighs = weight is not None
        self.weight = self.weight + (1.0 if weight is None else weight)

    def lose(self, loss: Tensor) -> None:
        """Take in the sum of a term's losses."""
        self.loss = loss if self.loss is None else self.loss + loss


@dataclass(slots=True, eq=False)
class OpenWindow:
    """What has been accumulated since the last step."""

    per: dict[str, Denominator]  # by what its terms are divided, by name
    count: int = 0  # micro-batches so far; the window is open from the end of the first one to the step
    is_complete: bool = False  # no micro-batch follows
    broken: str | None = None  # what left it half done, in words
    cause: Exception | None = None  # the exception behind that, where it is not raised already
    total: Tensor | float = 0.0  # the weight of all ranks, once the window is complete
    has_logged: bool = False  # whether the guard has been told the mean loss, for the step

    @classmethod
    def empty(cls, names: Iterable[str]) -> "OpenWindow":
        """Return a window in which nothing has been accumulated."""
        return cls({name: Denominator() for name in names})

    @classmethod
    def loaded(cls, state: Mapping[str, Any], names: Iterable[str]) -> "OpenWindow":
        """Return the window that ``saved`` gave."""
        told = state["denominators"] or [(state["weight"], state["loss"], state["weighs"])]
        window = cls.empty(list(names)[: len(told)])
        for one, (weight, loss, weighs) in zip(window.per.values(), told, strict=True):
            one.weight, one.loss, one.weighs = weight, loss, weighs
        window.count, window.is_complete = int(state["count"]), bool(state["is_complete"])
        return window

    def saved(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of it."""
        told = [(one.weight, one.loss, one.weighs) for one in self.per.values()]
        weight, loss, weighs = told[0]
        return {
            "count": self.count,
            "is_complete": self.is_complete,
            "weight": weight,
            "weighs": weighs,
            "loss": loss,
            "denominators": told if len(told) > 1 else [],
        }

    @property
    def weight(self) -> Tensor | float:
        """[] this rank's weight, of a window that is divided by one number."""
        return next(iter(self.per.values())).weight

    def mean_loss(self) -> Tensor | None:
        """[] mean loss of this rank's items, added up over the denominators; 0 without items."""
        means = [one.loss / _nonzero(one.weight) for one in self.per.values() if one.loss is not None]
        if len(means) < 2:
            return means[0] if means else None
        return torch.stack([one.to(means[0].device) for one in means]).sum()

    def weights(self, device: torch.device) -> Tensor:
        """[denominators] this rank's weights."""
        dtype = wide_dtype(device)
        return torch.stack(
            [torch.as_tensor(one.weight, dtype=dtype, device=device) for one in self.per.values()]
        )

    def merge(self, totals: Tensor, whole: float, ranks: int) -> Tensor:
        """Return [denominators] what each one's sums are multiplied by, to be divided by one number from now on.

        ``totals`` are all ranks' weights; ``whole``, the one number, stands for the weight of so many ``ranks``.
        """
        factors = torch.where(totals > 0, whole / _nonzero(totals), 0.0)
        merged = Denominator(torch.where((totals > 0).any(), whole / ranks, 0.0), weighs=True)
        for one, factor in zip(self.per.values(), factors, strict=True):
            if one.loss is not None:
                merged.lose(one.loss * factor.to(one.loss.device))
        if ranks > 1 and merged.loss is None:
            merged.loss = torch.zeros_like(factors[0])  # a rank without items has its share in the mean
        self.per = dict.fromkeys(list(self.per)[:1], merged)
        return factors

    def factor(self, scale: float, device: torch.device) -> Tensor | float:
        """Return [] ``scale / total``, or 0 for an empty window."""
        if isinstance(self.total, Tensor):
            total = self.total.to(device, wide_dtype(device))
            return torch.where(total > 0, scale / _nonzero(total), torch.zeros_like(total))
        return scale / self.total if self.total > 0 else 0.0


def _nonzero(weight: Tensor | float) -> Any:
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, torch.ones_like(weight), weight)
    return weight or 1.0


class GradientWatch:
    """Sees whether anybody else wrote to gradients, by their identity and version counter; reads no gradient."""

    def __init__(self, parameters: Callable[[], Sequence[Tensor]]) -> None:
        self._parameters = parameters
        self._seen: list[tuple[Tensor, Seen | None]] = []

    def note(self) -> None:
        """Remember the gradients as they are now."""
        self._seen = [(p, None if p.grad is None else Seen(p.grad)) for p in self._parameters()]

    def change(self) -> str | None:
        """Tell what happened to the gradients since ``note``: "cleared", "modified", or None."""
        changed = [p.grad for p, seen in self._seen if not _is_as(seen, p.grad)]
        if not changed:
            return None
        return "cleared" if any(gradient is None for gradient in changed) else "modified"

    def refuse_changes(self, when: str) -> None:
        """Raise `WindowError` if anybody else wrote to gradients, or changed the optimizer's, since ``note``."""
        if self._seen and {id(p) for p, _ in self._seen} != set(map(id, self._parameters())):
            raise WindowError(
                f"the optimizer's parameters have changed in the middle of the window, {when}; change its parameter "
                "groups only after optimizer.step(), or call accumulate.drop() to discard the window"
            )
        change = self.change()
        if change == "cleared":
            raise WindowError(
                f"gradients were cleared in the middle of the window, {when}; call optimizer.zero_grad() only after "
                "optimizer.step(), or accumulate.drop() to discard a window"
            )
        if change == "modified":
            raise WindowError(
                f"gradients were modified by somebody else in the middle of the window, {when}; if it is a clip, "
                "remove it (the guard clips the whole window, once), and call backward() only through micro.backward()"
            )

    def any_unchanged(self) -> bool:
        """Tell whether some gradient is still there just as it was noted, and is not 0, as a skip may leave it."""
        return any(
            p.grad is not None and _is_as(seen, p.grad) and bool(entries_to_read(p.grad).any())
            for p, seen in self._seen
        )


def _is_as(seen: Seen | None, gradient: Tensor | None) -> bool:
    """Tell whether a gradient is just as it was noted: there and unchanged, or not there."""
    if seen is None or gradient is None:
        return seen is None and gradient is None
    return seen.is_tensor(gradient) and seen.unchanged() is not None


def by_names(guard: Guard, held: Mapping[Tensor, Tensor]) -> dict[str, Tensor]:
    """Copy what is held for each parameter, under its name."""
    pairs = zip(guard.names, guard.parameters, strict=True)
    return {name: held[parameter].detach().clone() for name, parameter in pairs if parameter in held}


def saved_sums(guard: Guard, sums: Mapping[str, Mapping[Tensor, Tensor]]) -> dict[str, Any]:
    """Return what is kept apart from ``.grad``; by denominator, where there are several."""
    named = {per: by_names(guard, held) for per, held in sums.items()}
    if len(named) > 1:
        return {"sums": {}, "apart": named}
    return {"sums": next(iter(named.values()), {}), "apart": {}}


_OLDER = {"per": [ITEM], "apart": {}, "denominators": []}  # before there could be several
_PARTS = {
    "count": SupportsIndex, "is_complete": SupportsIndex, "weight": Real | Tensor, "denominators": list | tuple,
    "gradients": Mapping, "sums": Mapping, "apart": Mapping,
}  # fmt: skip


def check_saved(
    state: Mapping[str, Any], mine: Mapping[str, Any], *, names: Sequence[str], has_wide_sums: bool
) -> dict[str, Any]:
    """Return a saved window with all of its parts; raise `CheckpointError` unless it fits this accumulator."""
    check_mapping("accumulate", state)
    state = {**_OLDER, **state}
    for key, value in mine.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"accumulator state has {key}={state.get(key)!r}, but this Accumulator {key}={value!r}; resume with "
                "the same, or start at a window's beginning without loading it"
            )
    check_parts("accumulate", state, _PARTS)
    check_parts("accumulate", state["apart"], dict.fromkeys(state["apart"], Mapping))
    parts = [state["gradients"], state["sums"], *state["apart"].values()]
    for part in parts:
        check_parts("accumulate", part, dict.fromkeys(part, Tensor))
    unknown = [name for part in parts for name in part if name not in set(names)]
    if unknown:
        raise CheckpointError(f"accumulator state knows parameters that are not here: {', '.join(unknown)}")
    if state["sums"] and not has_wide_sums:
        raise CheckpointError("accumulator state holds wide sums; make the Accumulator with accumulate_dtype")
    return state
