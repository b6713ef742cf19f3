"""The ways in which a model's parameters lie on ranks, each with what `gradkeel.attach` must be told of it."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

# Every rank has the whole tensor, which need not travel; before torch 2.7 it does all the same.
AT_HOME = (
    {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where parameters are.

    Attributes:
        place: of a name and a whole tensor: what this rank holds of it, as a parameter; None if nothing.
        grade: the same for a gradient, which may be placed in another way.
        arguments: for `gradkeel.attach`.
    """

    place: Callable[[str, torch.Tensor], torch.Tensor | None]
    grade: Callable[[str, torch.Tensor], torch.Tensor | None] | None = None
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def gradient(self, name, whole):
        return (self.grade or self.place)(name, whole)


def on_mesh(mesh, *placements):
    """Distributes copies of whole tensors, for a shard may share their memory; a placement may be a function."""

    def place(_, whole):
        chosen = [p(whole) if callable(p) else p for p in placements]
        return distribute_tensor(whole.clone(), mesh, chosen, **AT_HOME)

    return place


def rows(_):
    return Shard(0)


def columns(whole):
    return Shard(1 if whole.dim() > 1 else 0)


def by_name(places, otherwise):
    return lambda name, whole: places.get(name, otherwise)(name, whole)


def plain(_, whole):
    return whole.clone()


def shards(rank, count):
    return Layout(on_mesh(init_device_mesh("cpu", (count,)), rows))


def column_shards(rank, count):
    return Layout(on_mesh(init_device_mesh("cpu", (count,)), columns))


def replicas(rank, count):
    return Layout(on_mesh(init_device_mesh("cpu", (count,)), Replicate()))


def partial_gradients(rank, count):
    mesh = init_device_mesh("cpu", (count,))

    def addend(_, whole):
        # What ranks hold adds up to the whole: rank 0 has too much, and the last one takes it away again.
        share = whole / count
        share = share + 8.0 if rank == 0 else share
        share = share - 8.0 if rank == count - 1 else share
        return DTensor.from_local(share, mesh, [Partial()], run_check=False)

    return Layout(on_mesh(mesh, Replicate()), addend)


def mixed_with_plain(rank, count):
    mesh = init_device_mesh("cpu", (count,))
    return Layout(by_name({"linear": on_mesh(mesh, rows), "conv": on_mesh(mesh, columns)}, plain))


def hybrid(rank, count):
    return Layout(on_mesh(init_device_mesh("cpu", (2, count // 2)), Replicate(), rows))


def two_meshes(rank, count):
    one, other = init_device_mesh("cpu", (count,)), init_device_mesh("cpu", (count // 2, 2))
    second = on_mesh(other, Replicate(), rows)
    return Layout(by_name({"conv": second, "table": second}, on_mesh(one, rows)))


def both_dims(rank, count):
    return Layout(on_mesh(init_device_mesh("cpu", (2, count // 2)), rows, columns))


def same_dim_twice(rank, count):
    """As fully_shard leaves what tensor parallelism had sharded along the same dimension: cut there, then here."""
    mesh = init_device_mesh("cpu", (2, count // 2))

    def place(_, whole):
        local = _part(_part(whole, rank % 2, 2), rank // 2, count // 2)
        placements = [_StridedShard(0, split_factor=count // 2), Shard(0)]
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
        )

    return Layout(place)


def _part(whole, index, count, dim=0):
    """As `torch.chunk` cuts, with empty parts where there are too few rows."""
    parts = whole.chunk(count, dim)
    return (parts[index] if index < len(parts) else whole.narrow(dim, 0, 0)).clone()


def _pieces(rank, count, dim):
    return lambda _, whole: _part(whole, rank, count, dim if whole.dim() > dim else 0)


def experts(rank, count):
    return Layout(_pieces(rank, count, 0), arguments={"shard_over": {"*": (distributed.group.WORLD, 0)}})


def plain_columns(rank, count):
    return Layout(_pieces(rank, count, 1), arguments={"shard_over": {"*": (distributed.group.WORLD, 1)}})


STAGES = ({"linear", "conv"}, {"bias", "table", "nothing"})


def stages(rank, count):
    def place(name, whole):
        return whole.clone() if name in STAGES[rank] else None

    return Layout(place, arguments={"shard_over": {"*": distributed.group.WORLD}})


def tied_stages(rank, count):
    """The bias is on both stages, with the same gradient."""

    def place(name, whole):
        return whole.clone() if name in STAGES[rank] | {"bias"} else None

    return Layout(place, arguments={"shard_over": {"*": distributed.group.WORLD, "bias": None}})


def sharded_stages(rank, count):
    """Two pipeline stages, each sharded over half of the ranks."""
    meshes = [distributed.device_mesh.DeviceMesh("cpu", [2 * i, 2 * i + 1]) for i in range(2)]
    columns_of_stages = [distributed.new_group([i, i + 2]) for i in range(2)]
    own = on_mesh(meshes[rank // 2], rows)

    def place(name, whole):
        return own(name, whole) if name in STAGES[rank // 2] else None

    return Layout(place, arguments={"shard_over": {"*": columns_of_stages[rank % 2]}})


def everywhere(rank, count):
    return Layout(plain, arguments={"process_group": distributed.group.WORLD})


LAYOUTS = {
    2: [
        shards,
        column_shards,
        replicas,
        partial_gradients,
        mixed_with_plain,
        hybrid,
        two_meshes,
        experts,
        plain_columns,
        stages,
        tied_stages,
        everywhere,
    ],
    4: [
        shards,
        column_shards,
        mixed_with_plain,
        hybrid,
        two_meshes,
        both_dims,
        same_dim_twice,
        sharded_stages,
        experts,
        replicas,
        partial_gradients,
        plain_columns,
    ],
}
