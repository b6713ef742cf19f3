"""This module knows which ranks of a distributed run decide together, and how they tell each other something."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, distributed

from gradkeel.errors import AttachError, RankError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = "ProcessGroup | DeviceMesh"

_PATIENCE = timedelta(minutes=2)
_ALL_HERE = "all"
_CAN_RUN = distributed.is_available()
ALONE = "torch.distributed.new_group([rank], use_local_synchronization=True)"


@dataclass(frozen=True, slots=True, eq=False)
class Ranks:
    """A process group's ranks."""

    group: "ProcessGroup"  # the group, of which this rank is a member
    members: tuple[int, ...]  # the ranks, by their numbers in the whole job, in the group's order
    here: int  # this rank's place among them

    def gather(self, row: Tensor) -> Tensor:
        """Return [ranks, k] each rank's row [k], in the group's order: one collective, which every rank must join."""
        sent = row.to(_device_for(self.group, row.device))
        received = sent.new_empty(len(self.members) * sent.numel())
        # all_gather_into_tensor has a new name since torch 2.13, under which the old one warns.
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        gather(received, sent, group=self.group)
        return received.view(len(self.members), -1).to(row.device)

    def added(self, row: Tensor) -> Tensor:
        """Return [k] the sum of all ranks' rows [k], the same bits on each: one collective, which uses the row up."""
        return self._reduced(row, distributed.ReduceOp.SUM)

    def largest(self, row: Tensor) -> Tensor:
        """Return [k] the largest entries of all ranks' float64 rows [k], NaN above inf: one collective."""
        # What a backend makes of a NaN in a maximum is not told. Whole numbers in the order of the bits have none.
        return _in_order(self._reduced(_in_order(row), distributed.ReduceOp.MAX), back=True)

    def meet(self, failure: BaseException | None = None) -> None:
        """Wait until all ranks have come here, before the collectives of a set-up, so that none waits in vain.

        They meet in the job's key-value store, with a few requests each, which no rank's absence blocks.

        Args:
            failure: why this rank cannot go on, which it tells the others without waiting for them.

        Raises:
            RankError: if another rank has failed, or has not come within two minutes (or the group's own timeout).
        """
        if len(self.members) == 1 or distributed.get_backend(self.group) == "fake":
            return
        store = distributed.distributed_c10d._get_default_store()
        if store is None:  # under MPI
            return
        room = f"gradkeel/{self.group.group_name}"
        room += f"/{store.add(f'{room}/visits/{self.here}', 1)}"
        store.set(f"{room}/{self.here}", "here")
        if failure is not None:
            words = (
                f"rank {self.members[self.here]} could not set its guard up ({type(failure).__name__}: {failure}; its "
                "own output says more), so no rank can"
            )
            store.compare_set(f"{room}/verdict", "", words)
            return
        if store.add(f"{room}/count", 1) == len(self.members):
            store.compare_set(f"{room}/verdict", "", _ALL_HERE)
        patience = self._patience()
        try:
            store.wait([f"{room}/verdict"], patience)
        except (RuntimeError, distributed.DistError):
            absent = [rank for place, rank in enumerate(self.members) if not store.check([f"{room}/{place}"])]
            store.compare_set(
                f"{room}/verdict",
                "",
                f"rank {', '.join(map(str, absent))} did not set its guard up within {patience.total_seconds():g} s of "
                f"the others: attach() and Accumulator() must be called on all of the ranks {list(self.members)}. If a "
                "rank comes later, let all of them wait in torch.distributed.barrier() first; ranks that train without "
                f"the others attach with process_group=, {ALONE} for one alone",
            )
        verdict = store.get(f"{room}/verdict").decode()
        if verdict != _ALL_HERE:
            raise RankError(verdict)

    def _patience(self) -> timedelta:
        """Return how long a set-up waits for other ranks: no longer than any collective of the group would."""
        backends = [self.group._get_backend(kind) for kind in self.group._device_types]
        own = [getattr(getattr(one, "options", None), "_timeout", _PATIENCE) for one in backends]
        return min([_PATIENCE, *own])

    def broadcast(self, value: object, place: int) -> Any:
        """Return what the rank at a place tells all: a collective for set-up, which pickles and syncs."""
        values = [value if self.here == place else None]
        distributed.broadcast_object_list(values, src=self.members[place], group=self.group)
        return values[0]

    def _reduced(self, row: Tensor, operation: Any) -> Tensor:
        sent = row.to(_device_for(self.group, row.device))
        distributed.all_reduce(sent, operation, group=self.group)
        return sent.to(row.device)


def is_running() -> bool:
    """Tell whether this process is one rank of a distributed job."""
    return _CAN_RUN and distributed.is_initialized()


def ranks_of(group: "Group", argument: str) -> Ranks:
    """Return the ranks of a process group or of a device mesh, all axes of it together.

    Raises:
        TypeError: for something else.
        AttachError: without a distributed job, or if this rank is not in the group.
    """
    if not is_running():
        raise AttachError(
            f"{argument}: there is no distributed job; call torch.distributed.init_process_group() first"
        )
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        group = _group_of_mesh(group)
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(f"{argument} must be a ProcessGroup or a DeviceMesh, not {type(group).__name__}")
    members = tuple(distributed.get_process_group_ranks(group))
    here = distributed.get_rank()
    if here not in members:
        raise AttachError(f"{argument}: rank {here} is not in the group of the ranks {list(members)}")
    return Ranks(group, members, members.index(here))


def world() -> Ranks:
    """Return all ranks of the job."""
    return ranks_of(_everyone(), "process_group")


def covering(needed: Iterable[int], known: Sequence[Ranks]) -> Ranks:
    """Return the smallest known group, the whole job included, that has all the needed ranks.

    Raises:
        AttachError: if none has.
    """
    wanted = set(needed)
    fitting = [ranks for ranks in (*known, world()) if wanted <= set(ranks.members)]
    if not fitting:
        raise AttachError(
            f"no process group has all of the ranks {sorted(wanted)}; pass one as process_group="
        )
    return min(fitting, key=lambda ranks: len(ranks.members))


def spans(mesh: "DeviceMesh") -> bool:
    """Tell whether a mesh has a process group of all its ranks, of which this rank is one."""
    return mesh.size() == distributed.get_world_size() or (
        mesh.ndim == 1 and mesh.get_coordinate() is not None
    )


def _in_order(values: Tensor, *, back: bool = False) -> Tensor:
    """Turn float64 numbers into int64 of the same order, NaN last; or, ``back``, the other way round."""
    if not back:
        values = torch.where(values.isnan(), math.nan, values)  # a NaN without a sign
    bits = values.view(torch.int64)
    ordered = torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)
    return ordered.view(torch.float64) if back else ordered


def _group_of_mesh(mesh: "DeviceMesh") -> "ProcessGroup":
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == distributed.get_world_size():
        return _everyone()
    return mesh._flatten().get_group()


def _everyone() -> "ProcessGroup":
    group = distributed.group.WORLD
    assert group is not None, "the job is running"
    return group


def _device_for(group: "ProcessGroup", device: torch.device) -> torch.device:
    """Return a device on which the group communicates: the given one, if it can (NCCL knows no CPU tensors)."""
    kinds = [kind.type for kind in group._device_types]
    if not kinds or device.type in kinds:
        return device
    if kinds[0] == "cpu":
        return torch.device("cpu")
    return torch.device(kinds[0], getattr(torch, kinds[0]).current_device())
