"""The norm of many tensors as one, over all ranks that hold parts of them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.measure import whole_norm
from gradkeel.measure.powers import tensor_norms, wide_dtype
from gradkeel.ranks.declared import participants
from gradkeel.ranks.powers import WIDE, PowerSums
from gradkeel.tensors import (
    are_distributed,
    is_distributed,
    is_first_copy,
    local_parts,
    placement_key,
    settled,
)


@torch.no_grad()
def measure_total(
    tensors: Sequence[Tensor], norm_type: float, device: torch.device, *, among: Sequence[Tensor] = ()
) -> Tensor:
    """[] float64 norm of all these tensors taken together; a collective if some are distributed over ranks.

    Args:
        tensors: such as gradients.
        norm_type: the p of the p-norm.
        device: where norms are put together.
        among: where some ranks have fewer tensors than others: some that lie in all the ways that any rank's do, such
            as the parameters.
    """
    given = settled(tensors)
    examples = {placement_key(one): one for one in among or given} if are_distributed(among or given) else {}
    ranks = participants(examples.values(), (), None) if examples else None
    if ranks is None:
        return whole_norm(tensor_norms(local_parts(given), norm_type, device), norm_type)
    counting = {
        key: is_first_copy(one) if is_distributed(one) else ranks.here == 0 for key, one in examples.items()
    }
    counts = [counting[placement_key(one)] for one in given]
    norm = _here(local_parts(given), counts, norm_type, device).reshape(1)
    if math.isinf(norm_type):
        return (ranks.largest(norm) if norm_type > 0 else -ranks.largest(-norm)).squeeze(0)
    sums = PowerSums(norm_type, is_wide=not {one.dtype for one in among or given}.isdisjoint(WIDE))
    return sums.norms(ranks.added(sums.of(norm))).squeeze(0)


def _here(parts: Sequence[Tensor], counts: Sequence[bool], norm_type: float, device: torch.device) -> Tensor:
    """[] the norm of what counts on this rank, and of what is not finite; of nothing what changes no norm."""
    held = [(part, is_counted) for part, is_counted in zip(parts, counts, strict=True) if part.numel()]
    nothing = math.inf if norm_type < 0 else 0.0
    if not held:
        return torch.full((), nothing, dtype=wide_dtype(device), device=device)
    norms = tensor_norms([part for part, _ in held], norm_type, device)
    if not all(is_counted for _, is_counted in held):
        counted = torch.tensor([is_counted for _, is_counted in held], device=device)
        norms = torch.where(counted | ~norms.isfinite(), norms, nothing)
    return whole_norm(norms, norm_type)
