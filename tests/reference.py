"""Slow float64 twins, written from the formulas and papers: what the tests compare with."""

import math

import torch


# -- norms and the exact convention ---------------------------------------------------------------------------


def norm(tensors, p=2.0):
    """Norm of all tensors as one vector of Python floats."""
    entries = [abs(entry) for tensor in tensors for entry in _entries(tensor)]
    if p == 0:
        return float(sum(entry != 0 for entry in entries))
    if not entries:
        return 0.0
    if math.isinf(p):
        return max(entries) if p > 0 else min(entries)
    largest = max(entries)
    if largest == 0:
        return 0.0
    return largest * math.fsum((entry / largest) ** p for entry in entries) ** (1 / p)


def _entries(tensor):
    tensor = tensor.detach()
    if tensor.is_sparse:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().flatten().tolist()


def scaled(tensors, coefficient):
    """Each tensor times a number, rounded once."""
    wide = {True: torch.complex128, False: torch.float64}
    return [(t.detach().to(wide[t.is_complex()]) * coefficient).to(t.dtype) for t in tensors]


def clip_by_global_norm(tensors, bound, p=2.0, eps=0.0):
    """All together: ``min(1, c / (n + eps))``."""
    return scaled(tensors, min(1.0, bound / max(norm(tensors, p) + eps, 5e-324)))


def clip_by_norm(tensors, bound, p=2.0):
    """Each tensor by itself: ``min(1, c / n)``."""
    return [clip_by_global_norm([tensor], bound, p)[0] for tensor in tensors]


def clip_by_value(tensors, low, high):
    """Each entry by itself."""
    return [tensor.detach().clamp(low, high) for tensor in tensors]
