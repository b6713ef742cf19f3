"""The norm of many tensors as one, over all ranks that hold parts of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.measure import whole_norm
from gradkeel.measure.powers import tensor_norms
from gradkeel.ranks.declared import Sharing
from gradkeel.tensors import are_distributed, settled


def measure_total(
    tensors: Sequence[Tensor], norm_type: float, device: torch.device, *, among: Sequence[Tensor] = ()
) -> Tensor:
    """[] float64 norm of all these tensors taken together; a collective if some are distributed over ranks.

    Args:
        tensors: such as gradients.
        norm_type: the p of the p-norm.
        device: where norms are put together.
        among: the parameters, where some ranks may have fewer of their gradients than others.
    """
    given = settled(tensors)
    if are_distributed(given) or are_distributed(among):
        return Sharing(None, None).total_norm(given, norm_type, device, among=among)
    return whole_norm(tensor_norms(given, norm_type, device), norm_type)
