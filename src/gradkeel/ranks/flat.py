"""FSDP1's (`FullyShardedDataParallel`'s) parameters look plain and hold flat shards: only its modules know how."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, distributed, nn

from gradkeel.errors import AttachError
from gradkeel.ranks.group import Ranks, ranks_of


def is_flat(parameter: Tensor) -> bool:
    """Tell whether FSDP1 has made a parameter a view of its shard of a flat one, or it is the flat one itself."""
    return getattr(parameter, "_fsdp_flattened", False) is True


def is_fsdp1(module: nn.Module) -> bool:
    """Tell whether a module is a FullyShardedDataParallel."""
    return hasattr(module, "_gradient_postdivide_factor")


def data_parallel(module: Any) -> Any:
    """Return the process group, or the mesh, of the ranks over which FSDP1 or DDP averages gradients.

    Raises:
        ValueError: where shards have copies, and neither a mesh nor the job itself has all of these ranks.
    """
    copies = getattr(module, "_inter_node_pg", None)
    if copies is None:
        return module.process_group
    mesh = getattr(module, "_device_mesh", None)
    if mesh is None and module.process_group.size() * copies.size() != distributed.get_world_size():
        raise ValueError(
            "Accumulator(model=...): the model shards over one group and has copies over another; pass the ranks of "
            "both as process_group="
        )
    return distributed.group.WORLD if mesh is None else mesh


def flat_shards(
    parameters: Iterable[Tensor], model: nn.Module | None
) -> list[tuple[frozenset[int], Ranks, Ranks]]:
    """Tell which parameters, by ``id``, are pieces over which ranks, and which ranks have copies of the pieces.

    One entry for each process group, the same on all ranks; none for parameters that FSDP1 does not shard.

    Raises:
        AttachError: if the model does not tell how the flat ones lie.
    """
    missing = {id(parameter) for parameter in parameters if is_flat(parameter)}
    found: dict[Any, tuple[set[int], Ranks, Ranks]] = {}
    for module in () if model is None or not missing else model.modules():
        handle = getattr(module, "_handle", None)
        flat: Any = getattr(handle, "flat_param", None)
        if handle is None or flat is None:
            continue
        held = missing & {id(flat), *map(id, getattr(flat, "_params", None) or ())}
        missing -= held
        if held and handle.uses_sharded_strategy:
            group, copies = (
                handle.process_group,
                getattr(module, "_inter_node_pg", None) or handle.process_group,
            )
            if (group, copies) not in found:
                found[group, copies] = set(), ranks_of(group, "FSDP1"), ranks_of(copies, "FSDP1")
            found[group, copies][0].update(held)
    if missing:
        raise AttachError(
            f"{len(missing)} of the optimizer's parameters are flat shards of FullyShardedDataParallel (FSDP1), and "
            "only the wrapped model tells how they lie: attach(optimizer, policy, model=fsdp_model), after the model "
            "has been wrapped (with Accelerate: after prepare(), and the model that it returns); or use FSDP2 "
            "(fully_shard)"
        )
    return [(frozenset(ids), shards, copies) for ids, shards, copies in found.values()]
