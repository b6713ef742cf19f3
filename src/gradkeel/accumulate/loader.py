"""This module goes through a loader, and knows whether there is more, on this rank or on any other."""

import contextlib
import itertools
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import torch

from gradkeel.errors import RankError, WindowError
from gradkeel.ranks.group import Ranks

Batch = TypeVar("Batch")

_NO_LENGTH, _FAILED = -1, -2  # told in a length's place


class Lookahead(Generic[Batch]):
    """An iterator that can tell whether there is more, fetching the next item no sooner than it must.

    With ``by_length``, ``is_more_coming`` is answered by the loader's length, where it has one, without fetching.
    """

    def __init__(self, loader: Iterable[Batch], *, by_length: bool) -> None:
        self.is_filler = False  # whether the item taken last was taken before, since there are no more
        # what the loader has raised, where it was not passed on at once
        self.failure: Exception | None = None
        self._iterator = iter(loader)
        self._fetched: list[Batch] = []
        self._taken = 0
        self._length: int | None = None
        if by_length:
            with contextlib.suppress(TypeError):
                self._length = len(loader)  # type: ignore[arg-type]  # without a length it raises, which is the test

    def fetch(self) -> bool:
        """Have the next item at hand; False at the end of the data."""
        if not self._fetched:
            self._fetched.extend(itertools.islice(self._iterator, 1))
        return bool(self._fetched)

    def is_more_coming(self) -> bool:
        """Whether another item comes after the one taken last."""
        return self.fetch() if self._length is None else self._taken < self._length

    def take(self) -> Batch:
        """Return the item that ``fetch`` found."""
        self._taken += 1
        return self._fetched.pop()


class Together(Lookahead[Batch]):
    """A look ahead for ranks that must go on together: the end comes when no rank has more.

    Where every rank's loader has a length, the lengths are told once. Else, whenever a window opens, ranks tell
    whether they have another item, and whoever has fewer than a window of them repeats its last one.

    Where a loader raises, its rank goes on to the window's end likewise, for the others wait for it in backward.
    ``opens_window`` tells whether the next item is the first of a window.

    Raises:
        WindowError: on every rank, if one of them has no item at all that it could repeat.
        RankError: if another rank's loader raised at its first item; on that rank what it raised.
    """

    def __init__(
        self, loader: Iterable[Batch], ranks: Ranks, device: torch.device, *, opens_window: Callable[[], bool]
    ) -> None:
        self._ranks, self._device, self._opens_window = ranks, device, opens_window
        self._last: list[Batch] = []
        self._goes_on = False
        try:
            super().__init__(loader, by_length=True)
            super().fetch()
        except Exception:
            self._tell(_FAILED)
            raise
        lengths = self._tell(_NO_LENGTH if self._length is None else self._length)
        failed = [rank for rank, length in zip(ranks.members, lengths, strict=True) if length == _FAILED]
        if failed:
            raise RankError(f"the loaders of the ranks {failed} raised errors (their own output says which)")
        self._total = None if min(lengths) == _NO_LENGTH else max(lengths)
        if self._total is not None:
            self._check(lengths)

    def fetch(self) -> bool:
        """Have the next item at hand; False if no rank has more."""
        try:
            has_more = self.failure is None and super().fetch()
        except Exception as error:  # noqa: BLE001  # the window's step raises it
            self.failure, has_more = error, False
        if self._total is not None:
            self._goes_on = self._taken < self._total
        elif self._opens_window():
            told = self._tell(2 if has_more or self.failure is not None else len(self._last))
            self._goes_on = max(told) == 2
            if self._goes_on:
                self._check(told)
        return self._goes_on

    def is_more_coming(self) -> bool:
        """Whether any rank has another item after the one taken last; without lengths, windows are always filled."""
        return self._total is None or self._taken < self._total

    def take(self) -> Batch:
        """Return the item that ``fetch`` found, or the last one again."""
        self._taken += 1
        self.is_filler = not self._fetched
        if not self.is_filler:
            self._last = [self._fetched.pop()]
        return self._last[0]

    def _tell(self, number: int) -> list[float]:
        row = torch.full((1,), float(number), device=self._device)
        return self._ranks.gather(row).flatten().tolist()

    def _check(self, numbers: list[float]) -> None:
        empty = [rank for rank, number in zip(self._ranks.members, numbers, strict=True) if number == 0]
        if empty and max(numbers) > 0:
            raise WindowError(
                f"the loaders of the ranks {empty} have no batch at all while others have some; every rank needs one "
                "at least, to go on with while others have more"
            )
