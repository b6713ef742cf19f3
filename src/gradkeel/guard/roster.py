"""What a guard looks after: the optimizer's parameters, each under one policy, and the ranks that share them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradkeel.guard.report import SelectionReport
from gradkeel.language import count
from gradkeel.measure import Readings, blank_norms, readings
from gradkeel.measure.readings import Members
from gradkeel.norms import Decision, GradientNorms, Needs, State, Window
from gradkeel.policies import Policy
from gradkeel.policies.base import is_own
from gradkeel.ranks.declared import Sharing
from gradkeel.ranks.exchange import Exchange
from gradkeel.ranks.flat import is_flat
from gradkeel.ranks.group import Ranks, is_running
from gradkeel.ranks.layout import Layout
from gradkeel.selection import (
    EXCLUDED,
    MAIN,
    Exclude,
    Groups,
    Selection,
    group_policy,
    name_parameters,
    plain,
    restore_clips,
    select,
    signature,
)
from gradkeel.tensors import is_distributed, settle

_NAMED = 10
"""So many parameters of a selection are named in a guard's repr."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One selection under its policy: what does not change from step to step."""

    label: str  # the selection's
    selection: Selection  # the parameters on this rank
    policy: Policy | None  # what decides on them; None where they are only measured
    needs: Needs  # what is measured of them
    blank: GradientNorms  # norms of the whole selection, over all ranks, on which nothing has been measured
    order: tuple[int, ...]  # each parameter's place in the model, or in the optimizer where there is no model
    nothing: Readings | None  # what is read where there are no parameters here; None where there are
    report: SelectionReport  # what is said of it where there are none on any rank, or before the first step
    shown: str  # the policy's repr
    is_own: bool  # whether the policy is made of gradkeel's own parts


class Roster:
    """The optimizers' parameters under their policies, read again whenever the optimizers' groups change.

    Attributes:
        parts: the selections, as in `gradkeel.selection.select`.
        here: indices of the parts that have parameters on this rank.
        names: names of all parameters on this rank, selection after selection.
        parameters: all parameters on this rank, likewise.
        device: where norms are put together.
        is_on_cuda: whether that is a CUDA device, whose steps can be graphs.
        clips: whether there is a policy, and not only something to measure.
        exchange: tells the ranks' norms to each other; None where every rank knows all it needs.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        policy: Policy | None,
        *,
        model: nn.Module | None,
        exclude: Iterable[Exclude],
        sharing: Sharing,
    ) -> None:
        self.model = model
        self._optimizers = optimizers
        # Some optimizers have a setting "clip" of their own.
        self._own_clip = ["clip" in getattr(optimizer, "defaults", ()) for optimizer in optimizers]
        self._sole = optimizers[0] if self._own_clip == [False] else None
        self._policy = policy
        self._exclude = tuple(exclude)
        self._sharing = sharing
        self._signature: tuple[tuple[int, Any], ...] = ()
        self._held: list[list[Tensor]] = []
        self._flat = 0
        self._data_parallel: Ranks | None = None
        self.parts: tuple[Part, ...] = ()
        self.exchange: Exchange | None = None
        self.read(None)

    def _groups(self) -> Groups:
        if self._sole is not None:
            return self._sole.param_groups
        return [
            {key: value for key, value in group.items() if key != "clip"} if is_own else group
            for optimizer, is_own in zip(self._optimizers, self._own_clip, strict=True)
            for group in optimizer.param_groups
        ]

    def is_current(self, window: Window | None) -> bool:
        """Whether neither the optimizer's groups nor the ranks of the window have changed."""
        groups = self._sole.param_groups if self._sole is not None else self._groups()
        if (None if window is None else window.ranks) is not self._data_parallel or len(groups) != len(
            self._held
        ):
            return False
        for group, (length, clip), held in zip(groups, self._signature, self._held, strict=True):
            parameters = group["params"]
            # None was put in another's place, as Accelerate puts sharded parameters in that of whole ones?
            if (
                len(parameters) != length
                or group.get("clip", MAIN) != clip
                or not all(map(is_, parameters, held))
            ):
                return False
        # FSDP1 may have cut the same parameters since.
        return _count_flat(self.parameters) == self._flat

    def read(self, window: Window | None) -> None:
        """Read names, groups and their policies from the optimizer, and find out who shares them.

        A collective where ranks share parameters; an error there is told to the other ranks.
        """
        self._data_parallel = data_parallel = None if window is None else window.ranks
        try:
            selections, policies = self._selections()
            parameters = tuple(parameter for selection in selections for parameter in selection.parameters)
            self._flat = _count_flat(parameters)
            self._sharing.look_at(parameters, self.model)
        except Exception as error:
            self._held = []  # to be read again
            everything = [p for group in self._groups() for p in group["params"]]
            self._sharing.fail(everything, data_parallel, error)
            raise
        self.names = tuple(name for selection in selections for name in selection.names)
        self.parameters = parameters
        self.device = _device_of(self.parameters)
        self.is_on_cuda = self.device.type == "cuda"
        self._distributed = [parameter for parameter in self.parameters if is_distributed(parameter)]
        needs = [self._needs(policy) for policy in policies]
        words = [in_words(policy) for policy in policies]
        try:
            self.exchange = self._sharing.connect(selections, needs, words, self.device, data_parallel)
        except Exception:
            self._held = []
            raise
        members: Sequence[Any] = selections if self.exchange is None else self.exchange.layouts
        self.ranks = self._sharing.ranks(parameters, data_parallel)
        self.parts = tuple(map(self._part, selections, policies, needs, members))
        self.clips = any(policy is not None for policy in policies)
        self.here = [i for i, part in enumerate(self.parts) if part.selection.parameters]

    def _part(self, selection: Selection, policy: Policy | None, needs: Needs, whole: Members) -> Part:
        blank, shown = blank_norms(whole, needs, self.device), repr(policy)
        nothing = None if selection.parameters else readings(selection, needs, self.device)
        order = tuple(self._order.get(name, len(self._order) + i) for i, name in enumerate(blank.names))
        absent = (False,) * len(blank.names)
        report = SelectionReport(selection.label, shown, blank, Decision(), absent, order=order)
        return Part(
            selection.label, selection, policy, needs, blank, order, nothing, report, shown, is_own(policy)
        )

    def _selections(self) -> tuple[tuple[Selection, ...], list[Policy | None]]:
        groups = self._groups()
        restore_clips(groups, self._signature)
        by_group = [group_policy(group, index) for index, group in enumerate(groups)]
        self._signature = signature(groups)
        self._held = [list(group["params"]) for group in groups]
        names = name_parameters(groups, self.model)
        model = () if self.model is None else (plain(name) for name, _ in self.model.named_parameters())
        self._order = {name: i for i, name in enumerate(dict.fromkeys((*model, *names.values())))}
        selections = select(groups, names, self._exclude, self.model)
        known = {MAIN: self._policy, EXCLUDED: None}
        return selections, [known[s.label] if s.label in known else by_group[s.groups[0]] for s in selections]

    def _needs(self, policy: Policy | None) -> Needs:
        if policy is not None:
            return policy.needs
        return Needs(self._policy.needs.norm_type if self._policy is not None else 2.0)

    def owners(self) -> dict[str, tuple[tuple[str, ...], Policy | None]]:
        """The parameters, over all ranks, and the policy that each selection's state belongs to."""
        return {part.label: (part.blank.names, part.policy) for part in self.parts}

    def fingerprint(self) -> dict[str, Any]:
        """What a saved state must have in common with this roster to belong to it."""
        return {
            "policies": {part.label: in_words(part.policy) for part in self.parts},
            "parameters": {part.label: len(part.blank.names) for part in self.parts},
        }

    def filled(self, states: Mapping[str, State]) -> dict[str, State]:
        """Each policy's state, or the one that it starts with: what a checkpoint is made of, and loaded into."""
        return {
            part.label: states.get(part.label) or part.policy.init(part.blank)
            for part in self.parts
            if part.policy is not None and part.blank.names
        }

    def lines(self) -> Iterator[str]:
        """What is under which policy, in words."""
        for part in self.parts:
            selection, n = part.selection, len(part.selection.names)
            if selection.label != MAIN and not n:
                continue
            what = "measured, not clipped" if part.policy is None else repr(part.policy)
            yield f"  {selection.label}: {what}; {count(n, '{n:,} parameter', '{n:,} parameters')}"
            yield from (f"    {name}" for name in selection.names[:_NAMED])
            if n > _NAMED:
                yield f"    ... and {n - _NAMED} more"

    def pieces(self) -> dict[str, tuple[int, ...]]:
        """Which piece of each parameter lies on this rank; those that count for another rank are left out."""
        return dict.fromkeys(self.names, ()) if self.exchange is None else self.exchange.pieces()

    def local(self, index: int) -> Layout | None:
        """Which of a part's parameters, as all ranks know them, are here; None where all are, and whole."""
        if self.exchange is None:
            return None
        local = self.exchange.layouts[index]
        return None if not self.exchange.splits and local.rows is None else local

    def readings(self) -> list[Readings]:
        """Norms of the gradients as this rank holds them, selection by selection."""
        if self._distributed:
            settle(self._distributed)
        return [part.nothing or readings(part.selection, part.needs, self.device) for part in self.parts]

    def fail(self) -> None:
        """Tell the other ranks that this one has raised and will not read its gradients in this step."""
        if self.exchange is not None:
            self.exchange.fail()


def _device_of(parameters: Iterable[Tensor]) -> torch.device:
    """Where norms of these are put together: an accelerator, if any is on one."""
    devices = {parameter.device for parameter in parameters}
    return next((d for d in devices if d.type != "cpu"), torch.device("cpu"))


def _count_flat(parameters: Sequence[Tensor]) -> int:
    return sum(map(is_flat, parameters)) if is_running() else 0


def in_words(policy: Policy | None) -> str:
    """A policy's repr without addresses in memory, which are others in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(policy))
