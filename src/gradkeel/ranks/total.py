"""The norm of many tensors as one, over all ranks that hold parts of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels.native import Table
from gradkeel.measure import wide_dtype
from gradkeel.measure.powers import read, tensor_norms
from gradkeel.norms import combine, fixed, is_on_host
from gradkeel.ranks.declared import participants
from gradkeel.ranks.group import Ranks
from gradkeel.ranks.powers import WIDE, PowerSums
from gradkeel.tensors import (
    are_distributed,
    is_distributed,
    is_first_copy,
    local_parts,
    placement_key,
    settled,
)


def total_norm(
    tensors: Sequence[Tensor], norm_type: float, device: torch.device, *, among: Sequence[Tensor] = ()
) -> tuple[Tensor | float, Table | None]:
    """Norm of all these tensors taken together: a number on CPU, [] float64 elsewhere; and their table, if known.

    None of them is ``Partial``, as `settle` and `settled` see to; norms are put together on ``device``. A collective if
    some are distributed over ranks; where some ranks have fewer than others, ``among`` has some that lie in all ways
    in which any rank's do, such as the parameters.
    """
    alike = among or tensors
    ranks = participants(alike, (), None) if are_distributed(alike) else None
    table = None
    if ranks is None:
        reading = read(tensors, norm_type, device)
        total = combine(reading.norms, norm_type) if reading.total is None else reading.total
        table = reading.table
    else:
        total = _over_ranks(ranks, tensors, alike, norm_type, device)
    return total.item() if isinstance(total, Tensor) and is_on_host(total) else total, table


def measure_total(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Return [] the norm of all these tensors, as wide as the device has it; see `total_norm`."""
    total = total_norm(settled(tensors), norm_type, device)[0]
    return torch.as_tensor(total, dtype=wide_dtype(device), device=device)


@torch.no_grad()
def _over_ranks(
    ranks: Ranks,
    given: Sequence[Tensor],
    alike: Sequence[Tensor],
    norm_type: float,
    device: torch.device,
) -> Tensor:
    """Return [] the norm over all ranks; ``alike`` lie in all the ways that any rank's tensors do."""
    counting = {
        key: is_first_copy(one) if is_distributed(one) else ranks.here == 0
        for key, one in {placement_key(one): one for one in alike}.items()
    }
    counts = [counting[placement_key(one)] for one in given]
    norm = _here(local_parts(given), counts, norm_type, device).reshape(1)
    if math.isinf(norm_type):
        return (ranks.largest(norm) if norm_type > 0 else -ranks.largest(-norm)).squeeze(0)
    sums = PowerSums(norm_type, is_wide=not {one.dtype for one in alike}.isdisjoint(WIDE))
    return sums.norms(ranks.added(sums.of(norm))).squeeze(0)


def _here(parts: Sequence[Tensor], counts: Sequence[bool], norm_type: float, device: torch.device) -> Tensor:
    """Return [] the norm of what counts on this rank, or is not finite here; of nothing, what changes no norm."""
    held = [(part, is_counted) for part, is_counted in zip(parts, counts, strict=True) if part.numel()]
    nothing = math.inf if norm_type < 0 else 0.0
    if not held:
        return torch.full((), nothing, dtype=wide_dtype(device), device=device)
    norms = tensor_norms([part for part, _ in held], norm_type, device)
    if not all(is_counted for _, is_counted in held):
        counted = fixed(tuple(is_counted for _, is_counted in held), torch.bool, device)
        norms = torch.where(counted | ~norms.isfinite(), norms, nothing)
    return combine(norms, norm_type)
