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


# -- policies: each from its paper or formula, on one stream of norms ------------------------------------------


def agc(gradients, weights, ratio=0.01, floor=1e-3):
    """Brock et al. 2021: each row (each whole vector) against its own weights."""
    result = []
    for gradient, weight in zip(gradients, weights, strict=True):
        if gradient.dim() < 2:
            result += clip_by_norm([gradient], ratio * max(norm([weight]), floor))
            continue
        rows = zip(gradient.unbind(0), weight.unbind(0), strict=True)
        result.append(torch.stack([clip_by_norm([g], ratio * max(norm([w]), floor))[0] for g, w in rows]))
    return result


def block_rms(tensors, bound):
    """optax ``clip_by_block_rms``."""
    return [scaled([t], 1 / max(1.0, norm([t]) / math.sqrt(t.numel()) / bound))[0] for t in tensors]


def linear_quantile(values, q):
    """The q-quantile with linear interpolation between order statistics."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low, high = math.floor(position), math.ceil(position)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def windowed_bounds(norms, window, warmup, statistic):
    """Bound at each step: ``statistic`` of the last ``window`` norms before it, inf before ``warmup`` norms."""
    bounds = []
    for step in range(len(norms)):
        past = norms[max(0, step - window) : step]
        bounds.append(statistic(past) if step >= warmup else math.inf)
    return bounds


def mean_plus(z):
    """Mean plus z unbiased standard deviations (OLMo)."""

    def statistic(past):
        mean = math.fsum(past) / len(past)
        return mean + z * math.sqrt(math.fsum((n - mean) ** 2 for n in past) / (len(past) - 1))

    return statistic


def limited_window_bounds(norms, z, window, warmup):
    """gradkeel's hardened skip-step: outliers enter the window limited to 2 z standard deviations of at least 0.1%."""
    bounds, entered = [], []
    for step, n in enumerate(norms):
        past = entered[max(0, step - window) : step]
        if step < warmup:
            bounds.append(math.inf)
            entered.append(n)
            continue
        mean = math.fsum(past) / len(past)
        std = math.sqrt(math.fsum((m - mean) ** 2 for m in past) / (len(past) - 1))
        std = max(std, 1e-3 * abs(mean))
        bounds.append(mean + z * std)
        entered.append(max(mean - 2 * z * std, min(mean + 2 * z * std, n)))
    return bounds


def robust_plus(z):
    """Log-median plus z times 1.4826 MAD, at least 0.01."""

    def statistic(past):
        logs = [math.log(n) for n in past]
        median = linear_quantile(logs, 0.5)
        mad = linear_quantile([abs(entry - median) for entry in logs], 0.5)
        return math.exp(median + z * max(0.01, 1.4826022185056018 * mad))

    return statistic


def geometric_quantile_bounds(norms, q, eta, initial=None):
    """Andrew et al. 2021, without noise; starts at the first norm unless told where."""
    bounds, bound = [], math.inf if initial is None else initial
    for n in norms:
        bounds.append(bound)
        bound = n if math.isinf(bound) else bound * math.exp(-eta * ((n <= bound) - q))
    return bounds


def weighted_moments(values, decay):
    """Mean and population variance with weights decay^age: what bias-corrected averages are."""
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
    spread = math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    return mean, spread / math.fsum(weights)


def running_z_bounds(norms, z=2.5, decay=0.97, warmup=25):
    """gradkeel's hardened ZClip: z-score of the logarithm, reciprocal above the threshold.

    After the warm-up a value enters limited to z standard deviations, its square divided by the variance that a
    standard normal value has when it is limited so, here by integration.
    """
    shrink = _integral(lambda x: min(abs(x), z) ** 2 * math.exp(-x * x / 2) / math.sqrt(2 * math.pi), -12, 12)
    bounds, mean, variance, total = [], 0.0, 0.0, 0.0
    for step, n in enumerate(norms):
        margin = z * max(0.01, math.sqrt(variance))
        distance = math.log(n) - mean
        bounds.append(math.exp(mean + margin**2 / max(margin, distance)) if step >= warmup else math.inf)
        entered = max(-margin, min(margin, distance)) if step >= warmup else distance
        square = entered**2 / (shrink if step >= warmup else 1.0)
        total = decay * total + 1.0  # sum of the weights decay^age
        mean, variance = mean + entered / total, (1 - 1 / total) * (variance + square / total)
    return bounds


def _integral(function, low, high, steps=20000):
    """Simpson's rule."""
    width = (high - low) / steps
    inner = math.fsum((4 if i % 2 else 2) * function(low + i * width) for i in range(1, steps))
    return (function(low) + inner + function(high)) * width / 3


def ema_bounds(norms, ratio, decay=0.98, warmup=1):
    """gradkeel's hardened AdaGC after its warm-up: a multiple of the running geometric mean."""
    past = [math.log(n) for n in norms]
    steps = range(len(norms))
    return [
        ratio * math.exp(weighted_moments(past[:i], decay)[0]) if i >= warmup else math.inf for i in steps
    ]


def zclip(norms, z=2.5, alpha=0.97, warmup=25, eps=1e-6):
    """ZClip as published: the clipped norms, and the final mean and variance."""
    clipped, mean, variance = [], 0.0, 0.0
    for step, n in enumerate(norms):
        if step < warmup:
            clipped.append(n)
            mean = math.fsum(clipped) / len(clipped)
            variance = math.fsum((m - mean) ** 2 for m in clipped) / len(clipped)
            continue
        std = math.sqrt(variance)
        score = (n - mean) / (std + eps)
        clipped.append(mean + z * std / (score / z) if score > z else n)
        mean = alpha * mean + (1 - alpha) * clipped[-1]
        variance = alpha * variance + (1 - alpha) * (clipped[-1] - mean) ** 2
    return clipped, mean, variance


def adagc(steps, ratio=1.05, beta=0.98, warmup=100, absolute=1.0):
    """AdaGC as published: ``steps`` rows of per-tensor norms; the clipped norms, and gamma."""
    clipped, gamma = [], [math.inf] * len(steps[0])
    for t, norms in enumerate(steps, 1):
        if t < warmup:
            together = min(absolute / math.sqrt(math.fsum(n * n for n in norms)), 1.0)
            row = [together * n for n in norms]
            gamma = [min(g, n) for g, n in zip(gamma, row, strict=True)]
        else:
            row = [min(ratio * g / n, 1.0) * n for g, n in zip(gamma, norms, strict=True)]
            gamma = [beta * g + (1 - beta) * n for g, n in zip(gamma, row, strict=True)]
        clipped.append(row)
    return clipped, gamma
