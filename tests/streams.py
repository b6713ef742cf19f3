"""Streams of norms for policies, without gradients."""

import torch

from gradkeel.norms import GradientNorms, combine


def measured(norms, step=1, *, groups=None, loss=None, norm_type=2.0, sizes=None):
    """What a measurement of n tensors with these norms would give."""
    norms = torch.as_tensor(norms, dtype=torch.float64).reshape(-1)
    n = norms.numel()
    return GradientNorms(
        names=tuple(f"w{i}" for i in range(n)),
        norms=norms,
        total=combine(norms, norm_type),
        norm_type=norm_type,
        groups=tuple(groups or [0] * n),
        step=step,
        sizes=tuple(sizes or [1] * n),
        weights=torch.ones_like(norms),
        units=norms,
        unit_weights=torch.ones_like(norms),
        unit_counts=(1,) * n,
        unit_sizes=(1,) * n,
        loss=None if loss is None else torch.as_tensor(loss, dtype=torch.float64),
    )


def play(policy, stream, *, state=None, first=1, losses=None):
    """Decisions on a stream of norms, and the state after it."""
    decisions = []
    for i, norms in enumerate(stream):
        now = measured(norms, first + i, loss=None if losses is None else losses[i])
        state = policy.init(now) if state is None else state
        decision, state = policy.decide(now, state)
        decisions.append(decision)
    return decisions, state


def bounds(policy, stream, **options):
    """[steps, n] the bound of each step, where one tensor or each tensor is a cell."""
    return torch.stack([decision.bound.reshape(-1) for decision in play(policy, stream, **options)[0]])


def log_normal(steps, cells, *, spread=0.3, median=1.0, seed=0):
    """[steps, cells] norms whose logarithm has the standard deviation ``spread``."""
    generator = torch.Generator().manual_seed(seed)
    return median * torch.exp(spread * torch.randn(steps, cells, generator=generator, dtype=torch.float64))
