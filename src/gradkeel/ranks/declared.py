"""This module finds out which ranks must exchange numbers, from what the user declares and placements tell."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from gradkeel.errors import AttachError, RankError, SelectionError, check_kind
from gradkeel.norms import Needs
from gradkeel.ranks.exchange import Exchange
from gradkeel.ranks.flat import flat_shards
from gradkeel.ranks.group import ALONE, Group, Ranks, covering, is_running, ranks_of, spans, world
from gradkeel.ranks.layout import Census, Layout, Manifest, Parameter
from gradkeel.ranks.powers import WIDE
from gradkeel.selection import Exclude, Selection, matches
from gradkeel.tensors import is_member, is_split, mesh_of, mesh_ranks, placement_key, shard_groups, split_axes

Where: TypeAlias = "Group | tuple[Group, int] | str | None"
"""Over which ranks a parameter is split, and along which dimension; or of which parameter it is a copy."""

ShardOver = Mapping[Exclude, Where]
"""For name patterns, modules, parameters or predicates: where the rest of each parameter is."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A parameter is one of several pieces: ``ranks`` hold one each, ``dim`` tells along which dimension."""

    ranks: Ranks
    dim: int | None


class Sharing:
    """What the user has declared about ranks, with the arguments of `gradkeel.attach`, and the exchange that follows.

    Raises:
        TypeError, AttachError: for something that is no group, or a group without this rank.
    """

    def __init__(
        self, process_group: "Group | None", shard_over: ShardOver | None, nonfinite: str = "skip"
    ) -> None:
        self._nonfinite = nonfinite
        rule = "shard_over must be a dict from names, modules or parameters to a group, (group, dim), a name or None"
        check_kind(shard_over, Mapping | None, "attach(shard_over=...)", rule)
        self._given = None if process_group is None else ranks_of(process_group, "process_group")
        self._declared = [(entry, _read(entry, where)) for entry, where in (shard_over or {}).items()]
        self._entries = self._declared
        self._flat: frozenset[int] = frozenset()
        self._copies: list[Ranks] = []

    def look_at(self, parameters: Sequence[Tensor], model: nn.Module | None) -> None:
        """Find out which of the parameters FSDP1 has made flat shards; what the user has declared comes after that.

        Raises:
            AttachError: if the model does not tell how they lie.
        """
        found = flat_shards(parameters, model)
        self._flat = frozenset().union(*(ids for ids, _, _ in found))
        self._copies = [copies for _, _, copies in found]
        self._entries = [(partial(_is_one_of, ids), Split(ranks, None)) for ids, ranks, _ in found]
        self._entries += self._declared

    def connect(
        self,
        selections: Sequence[Selection],
        needs: Sequence[Needs],
        policies: Sequence[str],
        device: torch.device,
        data_parallel: Ranks | None,
    ) -> Exchange | None:
        """Make the exchange for these selections; None where no rank needs to know anything of another in a step.

        Every rank must call it alike: they compare what they have in a collective of one number each. Only where
        ranks may have different parameters do they tell each other which, once for each distinct set.

        Raises:
            AttachError, SelectionError: if the declarations do not fit.
            RankError: if another rank has raised, is missing, or has other selections or policies.
        """
        everything = [p for s in selections for p in s.parameters]
        ranks, decide_alone = self._ranks(everything, data_parallel, any(need.loss for need in needs))
        if ranks is None:
            return None
        try:
            self._check_units(selections, needs)
            own = self._manifest(selections, policies)
        except Exception as error:
            ranks.meet(error)
            raise
        ranks.meet()
        census = self._census(ranks, own, device)
        if decide_alone:
            return None
        layouts = [
            Layout(census, i, need, selection.parameters, device)
            for i, (selection, need) in enumerate(zip(selections, needs, strict=True))
        ]
        return Exchange(ranks, layouts, device, data_parallel)

    def ranks(self, parameters: Iterable[Tensor], data_parallel: Ranks | None) -> Ranks | None:
        """The ranks that train together; None for one process."""
        return self._ranks(parameters, data_parallel, needs_loss=False)[0]

    def fail(self, parameters: Iterable[Tensor], data_parallel: Ranks | None, error: BaseException) -> None:
        """Tell the others that this rank has raised before the set-up, so that they need not wait."""
        ranks = self.ranks(parameters, data_parallel)
        if ranks is not None:
            ranks.meet(error)

    def _ranks(
        self, parameters: Iterable[Tensor], data_parallel: Ranks | None, needs_loss: bool
    ) -> tuple[Ranks | None, bool]:
        """Return who compares what they have, None if there is nobody else; and whether each decides alone afterwards.

        Copies have the same gradients on all ranks, as DDP leaves them, and so the same decisions: unless policies
        look at the loss, which each rank has of its own share of the batch.
        """
        known = [where.ranks for _, where in self._entries if isinstance(where, Split)] + self._copies
        known += [] if data_parallel is None else [data_parallel]
        ranks = participants(parameters, known, self._given)
        if ranks is not None and ranks is self._given and len(ranks.members) == 1:
            return None, False
        if ranks is not None or not is_running():
            return ranks, False
        everyone = world()
        return (None, False) if len(everyone.members) == 1 else (everyone, not needs_loss)

    def _check_units(self, selections: Sequence[Selection], needs: Sequence[Needs]) -> None:
        for selection, need in zip(selections, needs, strict=True):
            if need.unit_dim is not None and not self._flat.isdisjoint(map(id, selection.parameters)):
                raise SelectionError(
                    "a policy that clips unit by unit cannot be used under FullyShardedDataParallel (FSDP1), which "
                    "cuts through rows; use a policy of whole tensors, or FSDP2 (fully_shard)"
                )

    def _manifest(self, selections: Sequence[Selection], policies: Sequence[str]) -> Manifest:
        declared, unmatched = self._chosen(selections)
        meshes: dict[Any, int] = {None: -1}
        parameters = tuple(
            tuple(
                self._parameter(name, parameter, group, declared.get(id(parameter)), meshes)
                for name, parameter, group in zip(s.names, s.parameters, s.groups, strict=True)
            )
            for s in selections
        )
        kinds = tuple((s.label, policy) for s, policy in zip(selections, policies, strict=True))
        kinds += (("nonfinite", self._nonfinite),)
        told = tuple((tuple(m.mesh.shape), tuple(m.mesh.flatten().tolist())) for m in meshes if m is not None)
        return Manifest(kinds, parameters, told, unmatched)

    def _parameter(
        self, name: str, parameter: Tensor, group: int, entry: int | None, meshes: dict[Any, int]
    ) -> Parameter:
        where = None if entry is None else self._entries[entry][1]
        return Parameter(
            name=where if isinstance(where, str) else name,
            group=group,
            shape=tuple(parameter.shape),
            is_wide=parameter.dtype in WIDE,
            is_split=is_split(parameter),
            is_alias=isinstance(where, str),
            entry=entry if isinstance(where, Split) else None,
            dim=where.dim if isinstance(where, Split) else None,
            mesh=meshes.setdefault(mesh_of(parameter), len(meshes) - 1),
            axes=split_axes(parameter),
        )

    def _chosen(self, selections: Sequence[Selection]) -> tuple[dict[int, int], tuple[str, ...]]:
        """Return each parameter's declared entry, by ``id``, a later one before an earlier; and which match none."""
        result: dict[int, int] = {}
        unmatched = []
        for i, (entry, _) in enumerate(self._entries):
            found = {
                id(parameter): i
                for selection in selections
                for name, parameter in zip(selection.names, selection.parameters, strict=True)
                if matches(entry, name, parameter, "shard_over")
            }
            if not found and not isinstance(entry, str):
                shown = type(entry).__name__ if isinstance(entry, nn.Module | Tensor) else repr(entry)
                raise SelectionError(f"shard_over: {shown} selects none of the optimizer's parameters")
            if not found:
                unmatched.append(str(entry))
            result |= found
        return result, tuple(unmatched)

    def _census(self, ranks: Ranks, own: Manifest, device: torch.device) -> Census:
        """Find out which rank has what; all ranks then know the same."""
        digest = hashlib.sha256(repr(own).encode()).digest()
        told = _tell(ranks, int.from_bytes(digest[:7], "big"), device)
        firsts = {number: place for place, number in reversed(list(enumerate(told)))}
        places = sorted(firsts.values())
        if self._given is None and not self._entries:
            others = [rank for rank, number in zip(ranks.members, told, strict=True) if number != told[0]]
            if others:
                raise RankError(
                    f"rank {', '.join(map(str, others))} and rank {ranks.members[0]} have other policies or other "
                    "parameters; give every rank the same policy, exclude and parameter groups, or, if they have "
                    "different parameters, attach with process_group= or shard_over=; ranks that train models of their "
                    f"own attach with process_group={ALONE}"
                )
            manifests, indices = [own], torch.zeros(len(told), 0, dtype=torch.int64, device="cpu")
        else:
            manifests = [own] if len(places) == 1 else [ranks.broadcast(own, place) for place in places]
            _check_kinds([ranks.members[place] for place in places], manifests)
            indices = self._indices(ranks, device)
        numbers = {told[place]: i for i, place in enumerate(places)}
        return Census(
            ranks, manifests, torch.tensor([numbers[number] for number in told], device="cpu"), indices
        )

    def _indices(self, ranks: Ranks, device: torch.device) -> Tensor:
        """Return [ranks, entries] which piece each rank has of what its entries of ``shard_over`` declare."""
        own = [where.ranks.here if isinstance(where, Split) else 0 for _, where in self._entries]
        width = max(_tell(ranks, len(own), device))  # each rank has its own shard_over
        row = torch.tensor(own + [0] * (width - len(own)), dtype=torch.int64, device=device)
        return (
            ranks.gather(row).cpu()
            if width
            else torch.zeros(len(ranks.members), 0, dtype=torch.int64, device="cpu")
        )


def participants(parameters: Iterable[Tensor], known: Sequence[Ranks], given: Ranks | None) -> Ranks | None:
    """Return the ranks that must exchange numbers of these parameters; None if no rank needs to.

    Groups that are ``known`` must be among them; ``given`` are the ranks that the user wants, if told.
    """
    if not is_running():
        return None
    examples = [p for kind, p in {placement_key(p): p for p in parameters}.items() if kind is not None]
    spread = [p for p in examples if not is_member(p) or shard_groups(p)]
    if given is None and not known and len({mesh_of(p) for p in spread}) == 1 and spans(mesh_of(spread[0])):
        return ranks_of(mesh_of(spread[0]), "a mesh")  # as nearly always, and quickly found
    groups, needed = list(known), set[int]()
    for example in spread:
        # Replicas of the pieces too: they must decide alike, and hear of each other's errors and losses.
        needed.update(mesh_ranks(example))
        groups += [ranks_of(group, "a mesh axis") for group in shard_groups(example)]
    needed.update(rank for ranks in groups for rank in ranks.members if len(ranks.members) > 1)
    if given is None:
        return covering(needed, groups) if needed else None
    missing = needed - set(given.members)
    if missing:
        raise AttachError(
            f"attach(process_group=...): the group of the ranks {list(given.members)} lacks the ranks "
            f"{sorted(missing)}, over which parameters or batches are split; pass a group that has all of them"
        )
    return given


def _is_one_of(ids: frozenset[int], name: str, parameter: Tensor) -> bool:
    return id(parameter) in ids


def _read(entry: Exclude, where: Where) -> Split | str | None:
    if where is None or isinstance(where, str):
        return where
    group, dim = where if isinstance(where, tuple) else (where, None)
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int) or dim < 0):
        raise ValueError(
            f"shard_over={{{entry!r}: (group, {dim!r})}}: the dimension must be an int, at least 0"
        )
    return Split(ranks_of(group, "shard_over"), dim)


def _tell(ranks: Ranks, number: int, device: torch.device) -> list[int]:
    """Return each rank's number, which float64 holds exactly, in the group's order."""
    return ranks.gather(torch.full((1,), number, dtype=torch.int64, device=device)).flatten().tolist()


def _check_kinds(ranks: Sequence[int], manifests: Sequence[Manifest]) -> None:
    """Raise unless all have the same selections and policies, and each pattern matches somewhere."""
    for rank, manifest in zip(ranks, manifests, strict=True):
        if manifest.kinds != manifests[0].kinds:
            raise RankError(
                f"rank {ranks[0]} has the selections and policies {dict(manifests[0].kinds)}, but rank {rank} has "
                f"{dict(manifest.kinds)}; give every rank the same policy and the same parameter groups with a 'clip' "
                "key"
            )
    nowhere = frozenset.intersection(*(frozenset(manifest.unmatched) for manifest in manifests))
    if nowhere:
        raise SelectionError(f"shard_over={min(nowhere)!r} matches no parameter of any rank")
