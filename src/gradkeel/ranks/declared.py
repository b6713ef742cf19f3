"""Which parameters lie on several ranks, as their placement tells or the user has declared, and who must exchange."""

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gradkeel.errors import AttachError, RankError, SelectionError
from gradkeel.measure import Readings
from gradkeel.measure.powers import tensor_norms, wide_dtype
from gradkeel.norms import Needs, combine
from gradkeel.ranks.exchange import Exchange, Told
from gradkeel.ranks.group import Ranks, covering, is_running, ranks_of
from gradkeel.ranks.members import Members
from gradkeel.ranks.merge import Entry
from gradkeel.selection import Exclude, Selection, matches
from gradkeel.tensors import (
    Piece,
    is_distributed,
    is_member,
    local_parts,
    mesh_ranks,
    pieces,
    placement_key,
    shard_groups,
)

if TYPE_CHECKING:
    from gradkeel.ranks.group import Group

    Where = Group | tuple[Group, int] | str | None
    """Over which ranks a parameter is split, and along which dimension; or of which parameter it is a copy."""

ShardOver = Mapping[Exclude, "Where"]
"""For name patterns, modules, parameters or predicates: where the rest of each parameter is."""


_FINGERPRINTS = 2**24  # whole numbers that float32 knows
_FAILED = -1  # told in a fingerprint's place


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A parameter that is one of several pieces: ``ranks`` hold one each, ``dim`` tells along which dimension."""

    ranks: Ranks
    dim: int | None


@dataclass(frozen=True, slots=True)
class Table:
    """What one rank has.

    Attributes:
        kinds: each selection's label and policy.
        entries: each selection's parameters.
        unmatched: patterns of ``shard_over`` that match nothing here.
    """

    kinds: tuple[tuple[str, str], ...]
    entries: tuple[tuple[Entry, ...], ...]
    unmatched: frozenset[str]


class Sharing:
    """What the user has declared about ranks, and the exchange that follows from it.

    Args:
        process_group: the ranks that decide together, a group or a device mesh; None takes those over which
            parameters are split.
        shard_over: what plain parameters cannot tell themselves; see `gradkeel.attach`.

    Raises:
        TypeError, AttachError: for something that is no group, or a group without this rank.
    """

    def __init__(self, process_group: "Group | None", shard_over: ShardOver | None) -> None:
        self._given = None if process_group is None else ranks_of(process_group, "process_group")
        self._declared = [(entry, _read(entry, where)) for entry, where in (shard_over or {}).items()]
        # Ranks may have different parameters then, so each tells what it has.
        self._tells = self._given is not None or bool(self._declared)

    def connect(
        self,
        selections: Sequence[Selection],
        needs: Sequence[Needs],
        policies: Sequence[str],
        device: torch.device,
        data_parallel: Ranks | None,
    ) -> Exchange | None:
        """The exchange for these selections; None where no rank needs to know anything of another.

        Every rank must call it alike: they tell each other what they have, or that they have the same.

        Raises:
            AttachError, SelectionError: if the declarations do not fit.
            RankError: if another rank has raised, or has other selections or policies.
        """
        ranks = self._ranks([p for s in selections for p in s.parameters], data_parallel)
        if ranks is None:
            return None
        if self._tells:
            try:
                own = self._table(selections, needs, policies, ranks.members[ranks.here])
            except Exception:
                ranks.tell(None)
                raise
            tables = _checked(ranks, ranks.tell(own))
        else:
            tables = [self._table(selections, needs, policies, rank) for rank in ranks.members]
            _check_alike(ranks, zlib.crc32(repr(tables[0]).encode()) % _FINGERPRINTS, device)
        members = [Members([table.entries[i] for table in tables], need) for i, need in enumerate(needs)]
        return Exchange(ranks, members, device, data_parallel)

    def fail(self, parameters: Iterable[Tensor], device: torch.device, data_parallel: Ranks | None) -> None:
        """Take part in the set-up although this rank has raised, so that the others need not wait."""
        ranks = self._ranks(parameters, data_parallel)
        if ranks is not None and self._tells:
            ranks.tell(None)
        elif ranks is not None:
            _tell_number(ranks, _FAILED, device)

    def total_norm(
        self, tensors: Sequence[Tensor], norm_type: float, device: torch.device, *, among: Sequence[Tensor]
    ) -> Tensor:
        """[] float64 norm of all these tensors together; one collective where some of them are sharded.

        Tensors that lie alike are put together on each rank first, so that a call costs no more for many of them.

        Args:
            tensors: may be fewer on some ranks.
            norm_type: the p of the p-norm.
            device: where norms are put together.
            among: tensors that lie in all the ways that any rank's ``tensors`` do, such as the parameters.
        """
        examples = {placement_key(tensor): tensor for tensor in (*among, *tensors)}
        alike: dict[object, list[Tensor]] = {key: [] for key in examples}
        for tensor in tensors:
            alike[placement_key(tensor)].append(tensor)
        parts = [_norm_here(group, norm_type, device) for group in alike.values()]
        norms = torch.stack(parts) if parts else torch.zeros(0, dtype=wide_dtype(device), device=device)
        ranks = self._ranks(examples.values(), None)
        if ranks is None:
            return combine(norms, norm_type)
        entries = [
            [
                Entry(str(i), 0, (), piece.key, size=1)
                for i, example in enumerate(examples.values())
                if (piece := _piece(example, None, rank)) is not None
            ]
            for rank in ranks.members
        ]
        exchange = Exchange(ranks, [Members(entries, Needs(norm_type))], device)
        own = torch.tensor(
            [int(entry.name) for entry in entries[ranks.here]], dtype=torch.int64, device=device
        )
        agreed = exchange([Readings((True,) * len(own), norms.index_select(0, own))], Told(0))
        return combine(agreed.readings[0].norms, norm_type)

    def _ranks(self, parameters: Iterable[Tensor], data_parallel: Ranks | None) -> Ranks | None:
        """Who takes part; None if nobody needs to."""
        if not is_running():
            return None
        known = [where.ranks for _, where in self._declared if isinstance(where, Split)]
        known += [] if data_parallel is None else [data_parallel]
        needed: set[int] = set()
        for kind, example in {placement_key(p): p for p in parameters}.items():
            if kind is not None:
                groups = [ranks_of(group, "a mesh axis") for group in shard_groups(example)]
                known += groups
                # Replicas of the pieces too: they must decide alike, and hear of each other's errors and losses.
                if groups or not is_member(example):
                    needed |= set(mesh_ranks(example))
        needed |= {rank for ranks in known for rank in ranks.members if len(ranks.members) > 1}
        if self._given is None:
            return covering(needed, known) if needed else None
        missing = needed - set(self._given.members)
        if missing:
            raise AttachError(
                f"attach(process_group=...): the group of the ranks {list(self._given.members)} lacks the ranks "
                f"{sorted(missing)}, over which parameters or batches are split; pass a group that has all of them"
            )
        return self._given

    def _table(
        self, selections: Sequence[Selection], needs: Sequence[Needs], policies: Sequence[str], rank: int
    ) -> Table:
        """What a rank has: this one by its declarations, any other one if all have the same parameters."""
        declared, unmatched = self._chosen(selections)
        return Table(
            tuple((s.label, policy) for s, policy in zip(selections, policies, strict=True)),
            tuple(
                tuple(_entries(selection, need.unit_dim, declared, rank))
                for selection, need in zip(selections, needs, strict=True)
            ),
            unmatched,
        )

    def _chosen(
        self, selections: Sequence[Selection]
    ) -> tuple[dict[int, Split | str | None], frozenset[str]]:
        """What was declared for each parameter, by ``id``, a later entry before an earlier; and what matched none."""
        result: dict[int, Split | str | None] = {}
        unmatched = set()
        for entry, where in self._declared:
            found = {
                id(parameter): where
                for selection in selections
                for name, parameter in zip(selection.names, selection.parameters, strict=True)
                if matches(entry, name, parameter, "shard_over")
            }
            if not found and not isinstance(entry, str):
                shown = type(entry).__name__ if isinstance(entry, nn.Module | Tensor) else repr(entry)
                raise SelectionError(f"shard_over: {shown} selects none of the optimizer's parameters")
            if not found:
                unmatched.add(str(entry))
            result |= found
        return result, frozenset(unmatched)


def _entries(
    selection: Selection, unit_dim: int | None, declared: Mapping[int, Split | str | None], rank: int
) -> Iterator[Entry]:
    """What a rank tells of a selection's parameters; one whose mesh it is not on is an empty copy of the others'."""
    for name, parameter, group in zip(selection.names, selection.parameters, selection.groups, strict=True):
        piece = _piece(parameter, unit_dim, rank)
        if piece is None:  # torch leaves an empty vector here, which is one unit
            rows = () if unit_dim is None else (0,)
            yield Entry(name, group, tuple(parameter.shape), None, rows=rows)
        else:
            yield _entry(name, parameter, group, piece, declared.get(id(parameter)))


def _norm_here(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """[] norm of what this rank holds of tensors; what changes no norm where it holds nothing."""
    held = [part for part in local_parts(tensors) if part.numel()]
    if not held and norm_type < 0:
        return torch.full((), math.inf, dtype=wide_dtype(device), device=device)
    return combine(tensor_norms(held, norm_type, device), norm_type)


def _read(entry: Exclude, where: "Where") -> Split | str | None:
    if where is None or isinstance(where, str):
        return where
    group, dim = where if isinstance(where, tuple) else (where, None)
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 0):
        raise ValueError(
            f"shard_over={{{entry!r}: (group, {dim!r})}}: the dimension must be an int, at least 0"
        )
    return Split(ranks_of(group, "shard_over"), dim)


def _piece(parameter: Tensor, unit_dim: int | None, rank: int) -> Piece | None:
    """What a rank holds of a parameter; None if nothing, for it is not in the parameter's mesh."""
    if is_distributed(parameter):
        return pieces(parameter, unit_dim).get(rank)
    rows = () if unit_dim is None else range(1 if parameter.dim() <= 1 else parameter.shape[unit_dim])
    return Piece(rows=rows, size=parameter.numel())


def _entry(name: str, parameter: Tensor, group: int, piece: Piece, where: Split | str | None) -> Entry:
    shape = tuple(parameter.shape)
    if isinstance(where, str):
        return Entry(where, group, shape, None, piece.row_key, piece.rows, piece.size)
    if where is None:
        return Entry(name, group, shape, piece.key, piece.row_key, piece.rows, piece.size)
    index = where.ranks.here
    return Entry(
        name, group, shape, (index, *piece.key), piece.row_key, piece.rows, piece.size, index, where.dim
    )


def _tell_number(ranks: Ranks, number: int, device: torch.device) -> list[float]:
    row = torch.full((1,), float(number), dtype=wide_dtype(device), device=device)
    return ranks.gather(row).flatten().tolist()


def _check_alike(ranks: Ranks, fingerprint: int, device: torch.device) -> None:
    """Raise unless all ranks have the same fingerprint; a collective of one number each."""
    told = _tell_number(ranks, fingerprint, device)
    _refuse_failed(rank for rank, number in zip(ranks.members, told, strict=True) if number == _FAILED)
    others = [rank for rank, number in zip(ranks.members, told, strict=True) if number != told[0]]
    if others:
        raise RankError(
            f"rank {', '.join(map(str, others))} and rank {ranks.members[0]} have other policies or other parameters; "
            "give every rank the same policy, exclude and parameter groups, or, if they have different parameters, "
            "attach with process_group= or shard_over="
        )


def _refuse_failed(ranks: Iterable[int]) -> None:
    failed = ", ".join(map(str, ranks))
    if failed:
        raise RankError(f"rank {failed} could not set its guard up (its own output says why), so no rank can")


def _checked(ranks: Ranks, tables: Sequence[Table | None]) -> list[Table]:
    """The tables, if every rank has one with the same selections and policies."""
    _refuse_failed(rank for rank, table in zip(ranks.members, tables, strict=True) if table is None)
    given = [table for table in tables if table is not None]
    for rank, table in zip(ranks.members, given, strict=True):
        if table.kinds != given[0].kinds:
            raise RankError(
                f"rank {ranks.members[0]} has the selections and policies {dict(given[0].kinds)}, but rank {rank} has "
                f"{dict(table.kinds)}; give every rank the same policy and the same parameter groups with a 'clip' key"
            )
    nowhere = frozenset.intersection(*(table.unmatched for table in given))
    if nowhere:
        raise SelectionError(f"shard_over={min(nowhere)!r} matches no parameter of any rank")
    return given
