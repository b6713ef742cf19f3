"""The norm of many tensors as one, over all ranks that hold parts of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.measure.powers import read
from gradkeel.norms import combine, is_on_host
from gradkeel.ranks.declared import Sharing
from gradkeel.tensors import are_distributed, settled


def total_norm(
    tensors: Sequence[Tensor], norm_type: float, device: torch.device, *, among: Sequence[Tensor] = ()
) -> Tensor | float:
    """Norm of all these tensors taken together: a number on CPU, [] float64 elsewhere.

    A collective if some are distributed over ranks.

    Args:
        tensors: such as gradients.
        norm_type: the p of the p-norm.
        device: where norms are put together.
        among: the parameters, where some ranks may have fewer of their gradients than others.
    """
    given = settled(tensors)
    if are_distributed(given) or are_distributed(among):
        total = Sharing(None, None).total_norm(given, norm_type, device, among=among)
    else:
        reading = read(given, norm_type, device)
        if reading.total is not None:
            return reading.total
        total = combine(reading.norms, norm_type)
    return total.item() if is_on_host(total) else total


def measure_total(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """[] float64 norm of all these tensors; see `total_norm`."""
    return torch.as_tensor(total_norm(tensors, norm_type, device), dtype=torch.float64)
