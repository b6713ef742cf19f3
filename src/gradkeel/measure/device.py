"""Norms of tensors on an accelerator, in float64 and without a sync of the host."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gradkeel.kernels import triton_host


def device_norms(tensors: Sequence[Tensor], norm_type: float, wide: torch.dtype) -> Tensor:
    """[k] norms of the tensors of one accelerator, by the Triton kernels or in one foreach call."""
    kernels = triton_host.kernels() if norm_type in (1.0, 2.0) else None
    table = None if kernels is None else kernels.table(tensors)
    if kernels is not None and table is not None:
        return kernels.norms(table, norm_type)
    filled = [_filled(tensor) for tensor in tensors]
    norms = list(torch._foreach_norm(filled, norm_type, dtype=wide))
    doubles = [i for i, tensor in enumerate(filled) if tensor.dtype == torch.float64]
    if doubles and norm_type > 0 and not math.isinf(norm_type):
        # Squares of float64 entries leave even float64's range, so they are taken relative to max |g|, at any rate:
        # looking whether that is necessary would sync the host.
        chosen = [filled[i] for i in doubles]
        largest = torch.stack(list(torch._foreach_norm(chosen, math.inf)))
        scales = torch.where(
            (largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest)
        ).unbind()
        scaled = torch._foreach_norm(torch._foreach_div(chosen, list(scales)), norm_type)
        for i, norm, scale in zip(doubles, scaled, scales, strict=True):
            norms[i] = norm * scale
    return torch.stack(norms)


def _filled(tensor: Tensor) -> Tensor:
    # Some norms of an empty tensor are undefined in torch; that of a zero is 0.
    return tensor if tensor.numel() else tensor.new_zeros(1)
