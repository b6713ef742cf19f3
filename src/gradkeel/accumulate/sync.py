"""This module knows when a distributed model exchanges gradients, between whom, and by what it divides them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from gradkeel.errors import check_kind
from gradkeel.ranks.flat import data_parallel, is_fsdp1
from gradkeel.ranks.group import Group, Ranks, ranks_of

_TORCH = "torch.distributed.algorithms.ddp_comm_hooks."
_AVERAGES = (
    "allreduce_hook",
    "fp16_compress_hook",
    "bf16_compress_hook",
    "powerSGD_hook",
    "batched_powerSGD_hook",
    "_reducer_allreduce_and_upcast_hook",
)


class GradientSync:
    """Puts a distributed model's gradient exchange off to a window's last micro-batch; arguments as in `Accumulator`.

    DistributedDataParallel and FSDP1 want ``no_sync`` around forward and backward, FSDP2 has
    ``set_requires_gradient_sync``. A module without such parts, or None, exchanges nothing.

    Attributes:
        is_needed: gradients are exchanged, so that a micro-batch must know at its start whether it is the last.
        needs_every_backward: ranks wait for each other in every backward, so that none may leave one out.
        exchanges_once: only the first backward after a forward is exchanged, so that terms must run in one backward.
        keeps_sums: the model keeps a window's sums where nobody else can add to them.
        ranks: between which gradients are exchanged; None for one process.
        divisor: what the sum of the ranks' gradients has been divided by when it arrives: their number, as a rule.

    Raises:
        ValueError: if parts of the model divide their gradients by different numbers, or by one that nobody knows.
        TypeError, AttachError: for something that is no group, or a group without this rank.
    """

    def __init__(
        self, model: nn.Module | None, process_group: "Group | None", divides: float | None = None
    ) -> None:
        parts: list[Any] = list(_outermost(model)) if model is not None else []
        self._fsdp = [part for part in parts if hasattr(part, "set_requires_gradient_sync")]
        self._ddp = [part for part in parts if not hasattr(part, "set_requires_gradient_sync")]
        self.is_needed = bool(parts)
        self.needs_every_backward, self.exchanges_once = bool(self._fsdp), bool(self._ddp)
        self.keeps_sums = any(map(is_fsdp1, self._ddp))
        groups: list[Any] = [process_group]
        if process_group is None:
            groups = [*map(data_parallel, self._ddp), *(mesh for mesh, _ in _meshes(self._fsdp))]
        found = [ranks_of(group, "Accumulator(process_group=...)") for group in groups]
        ranks = max(found, key=lambda one: len(one.members)) if found else None
        self.ranks: Ranks | None = None if ranks is None or len(ranks.members) == 1 else ranks
        rule = "divides must be a number above 0"
        check_kind(divides, Real | None, "Accumulator(divides=...)", rule)
        if divides is not None and not divides > 0:
            raise ValueError(f"Accumulator(divides={divides!r}): {rule}")
        self._divides = divides
        self.divisor = self._read_divisor()
        self._hooks = self._count_hooks()

    def around(self, *, last: bool) -> AbstractContextManager[Any]:
        """Return the context around one micro-batch, which exchanges gradients if it is the last."""
        if last and self._hooks != (found := self._count_hooks()):  # one was registered later
            self.divisor, self._hooks = self._read_divisor(), found
        context = ExitStack()
        for part in self._fsdp:
            part.set_requires_gradient_sync(last)
        for part in self._ddp:
            if not last:
                context.enter_context(part.no_sync())
        return context

    def added(self, weights: Tensor) -> Tensor:
        """Return [k] the sum of all ranks' weights [k]."""
        return weights if self.ranks is None else self.ranks.added(weights.clone())

    def drop(self) -> None:
        """Clear what FSDP2 keeps of a window that it has not exchanged."""
        for parameter in (p for group in _param_groups(self._fsdp) for p in group.fsdp_params):
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # made in the first forward
                parameter._unsharded_param.grad = None

    def largest(self, weight: float, device: torch.device) -> float:
        """Return the largest such weight of all ranks, on all of them; syncs the host."""
        if self.ranks is None:
            return weight
        row = torch.full((1,), weight, dtype=torch.float64, device=device)
        return float(self.ranks.gather(row).amax())

    def _read_divisor(self) -> float:
        found = {self._divided_by(part) for part in self._ddp}
        found |= {float(mesh.size()) if factor is None else factor for mesh, factor in _meshes(self._fsdp)}
        if len(found) > 1:
            raise ValueError(
                f"Accumulator(model=...): parts of the model divide their gradients by different numbers "
                f"({', '.join(f'{one:g}' for one in sorted(found))}); call set_gradient_divide_factor() on the FSDP "
                "modules so that all of them divide by the same"
            )
        return found.pop() if found else 1.0

    def _count_hooks(self) -> int:
        return sum(len(_hooks(part)) for part in self._ddp)

    def _divided_by(self, part: Any) -> float:
        strange = [hook for hook in _hooks(part) if not _is_average(hook)]
        if strange and self._divides is None:
            shown = getattr(strange[0], "__qualname__", repr(strange[0]))
            raise ValueError(
                f"Accumulator(model=...): the model has the communication hook {shown}(), and nobody can tell what it "
                "does; say by what it divides the sum over ranks: divides=1 if it only sums, divides=dist."
                "get_world_size() if it averages"
            )
        if is_fsdp1(part):  # which divides twice, before it adds and afterwards
            return float(part._gradient_predivide_factor * part._gradient_postdivide_factor)
        return float(self._divides) if strange and self._divides else float(part.process_group.size())


def _hooks(part: Any) -> list[Any]:
    return [hook for hook, _ in getattr(part, "_comm_hooks", ())]


def _is_average(hook: Any) -> bool:
    """Tell whether this is one of torch's hooks that average, as DistributedDataParallel itself does."""
    return getattr(hook, "__module__", "").startswith(_TORCH) and getattr(hook, "__name__", "") in _AVERAGES


def _outermost(model: nn.Module) -> Iterator[nn.Module]:
    """Return a model's outermost parts that exchange gradients, perhaps the model itself."""
    if hasattr(model, "set_requires_gradient_sync") or hasattr(model, "no_sync"):
        yield model
        return
    for child in model.children():
        yield from _outermost(child)


def _param_groups(parts: list[Any]) -> Iterator[Any]:
    """Return the groups of parameters that FSDP2 exchanges together."""
    modules = [module for part in parts for module in part.modules()]
    for state in (module._get_fsdp_state() for module in modules if hasattr(module, "_get_fsdp_state")):
        several = getattr(state, "_fsdp_param_groups", None)  # older torch has one for each module
        found = [state._fsdp_param_group] if several is None else several
        yield from (group for group in found if group is not None)


def _meshes(parts: list[Any]) -> list[tuple[Any, float | None]]:
    """Return, for each group of FSDP parameters, its data-parallel ranks, and the divisor where one was set."""
    return [(_data_parallel(group.mesh_info), _own_divisor(group)) for group in _param_groups(parts)]


def _own_divisor(group: Any) -> float | None:
    if getattr(group, "reduce_scatter_reduce_op", None) is not None:  # torch 2.6 hides the factor in it
        raise ValueError(
            "Accumulator(model=...): set_reduce_scatter_divide_factor() was called on the model, and this torch does "
            "not tell what the factor was; leave that call out, or install a torch with set_gradient_divide_factor()"
        )
    return getattr(group, "gradient_divide_factor", None)


def _data_parallel(info: Any) -> Any:
    axes = [getattr(info, name, None) for name in ("replicate_mesh_dim", "shard_mesh_dim")]
    chosen = [axis for axis in axes if axis is not None]
    if len(chosen) == 1:
        return info.mesh.get_group(chosen[0])
    if len(chosen) == info.mesh.ndim:
        return info.mesh
    return info.mesh[tuple(info.mesh.mesh_dim_names[axis] for axis in chosen)]
