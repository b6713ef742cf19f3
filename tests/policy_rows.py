"""The rows of the battery: a new policy is a new row here, and inherits every test of `test_every_policy`."""

import dataclasses
import functools
import math
import re

import torch

import gradkeel as gk
from gradkeel import policies as gp

SHAPES = {"linear": (4, 3), "bias": (4,), "conv": (2, 2, 3), "table": (5, 3), "nothing": (0, 3)}
GROUPS = (("linear", "bias"), ("conv", "table", "nothing"))
HISTORY = 130  # longer than every warm-up


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy, and what it promises.

    Attributes:
        policy: with bounds that gradients with entries of about 1e-4 are below, and of about 50 above.
        cell: what is scaled alike, and so keeps its direction; "value" keeps none.
        touches_small: scales what is below the bound too.
        skips: makes no step instead of scaling.
    """

    policy: gp.Policy
    cell: str
    touches_small: bool = False
    skips: bool = False

    @property
    def id(self):
        try:
            return self.policy.spec
        except TypeError:
            # Without addresses, for every worker of pytest-xdist must find the same names.
            return re.sub(r" at 0x[0-9a-f]+", "", repr(self.policy))


ROWS = [
    Row(gp.ClipByValue(0.5), "value"),
    Row(gp.ClipByValue(0.4, min=-0.2), "value"),
    Row(gp.ClipByNorm(0.5), "tensor"),
    Row(gp.ClipByGlobalNorm(0.5), "global"),
    Row(gp.ClipByGlobalNorm(0.5, norm_type=math.inf), "global"),
    Row(gp.ClipByGlobalNorm(0.5, eps=1e-6), "global"),
    Row(gp.AdaptiveGradientClip(0.01), "unit"),
    Row(gp.AdaptiveGradientClip(0.1, unit_dim=1), "unit"),
    Row(gp.BlockRms(0.1), "tensor"),
    Row(gp.SmoothClip(0.5), "global", touches_small=True),
    Row(gp.SmoothClip(0.5, scope="unit"), "unit", touches_small=True),
    Row(gp.Normalize(0.5), "global", touches_small=True),
    Row(gp.Normalize(0.5, scope="tensor"), "tensor", touches_small=True),
    Row(gp.SmoothnessStep(2.0, 3.0), "global", touches_small=True),
    Row(gp.AutoClip(), "global"),
    Row(gp.AutoClip(0.5, window=40, warmup=10, scope="unit"), "unit"),
    Row(gp.QuantileClip(), "global"),
    Row(gp.QuantileClip(initial=0.5, scope="group"), "group"),
    Row(gp.ZClip(), "global"),
    Row(gp.ZClip(scope="tensor", patience=None), "tensor"),
    Row(gp.ZClip(reference=True), "global"),
    Row(gp.RobustClip(), "global"),
    Row(gp.RobustClip(scope="group"), "group"),
    Row(gp.AdaGC(), "tensor"),
    Row(gp.AdaGC(reference=True), "tensor"),
    Row(gp.SkipStep(), "global", skips=True),
    Row(gp.SkipStep(reference=True), "global", skips=True),
    Row(gp.Clip("group", gp.Ema(2.0), gp.Smooth(), 1.0), "group", touches_small=True),
    Row(gp.Clip("global", gp.Schedule(lambda step: 1 / step), gp.Hard()), "global"),
    Row(gp.Chain(gp.ClipByNorm(0.5), gp.ClipByGlobalNorm(0.6)), "tensor"),
    Row(gp.Chain(gp.AdaptiveGradientClip(0.01), gp.ClipByNorm(0.005)), "unit"),
    Row(gp.Chain(gp.Normalize(3.0), gp.AutoClip(), gp.ClipByValue(0.1)), "value", touches_small=True),
    Row(gp.Chain(gp.SkipStep(), gp.ZClip()), "global", skips=True),
    Row(gp.Warmup(50, gp.ClipByGlobalNorm(1.0), gp.AutoClip()), "global"),
    Row(gp.Warmup(500, gp.AdaptiveGradientClip(0.01), None), "unit"),
    Row(gp.PerGroup(gp.ClipByNorm(0.5), gp.ZClip(scope="tensor")), "tensor"),
    Row(gp.PerGroup(None, gp.AdaptiveGradientClip(0.01)), "unit"),
]


class Run:
    """Parameters, optimizer and guard, to which gradients are given."""

    def __init__(self, policy, dtype=torch.float64, state=None):
        self.parameters = {name: torch.nn.Parameter(value) for name, value in weights(dtype).items()}
        groups = [{"params": [(name, self.parameters[name]) for name in group]} for group in GROUPS]
        # So small that weights stay the same in every dtype: policies see weights only through AGC.
        self.optimizer = torch.optim.SGD(groups, lr=1e-30, foreach=False)
        self.guard = gk.attach(self.optimizer, policy)
        if state is not None:
            self.guard.load_state_dict(state)

    def step(self, gradients, **scalars):
        """Clip these gradients by name; what is left of them, densely, by name (None where the step was skipped)."""
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)
        self.guard.log(**scalars)
        self.optimizer.step()
        left = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        return {name: g.to_dense() if g.layout != torch.strided else g.clone() for name, g in left.items()}


def weights(dtype=torch.float64):
    """What every run starts from: representable in every dtype, so that it is the same in all of them."""
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}
    return {name: value.half().to(dtype) for name, value in drawn.items()}


def gradients(scale, seed, dtype=torch.float64):
    """Gradients with entries of about ``scale``, representable in every dtype, without zeros."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, shape in SHAPES.items():
        entries = torch.randn(shape, generator=generator)
        entries = torch.where(entries.abs() < 0.1, 0.1, entries) * scale
        result[name] = entries.bfloat16().half().to(dtype)
    return result


@functools.cache
def seasoned(row):
    """The guard's state after a history of ordinary steps, and the reports of these."""
    run, reports = Run(row.policy), []
    generator = torch.Generator().manual_seed(2)
    for step in range(HISTORY):
        scale = math.exp(0.3 * torch.randn((), generator=generator).item())
        run.step(gradients(scale, seed=step))
        reports.append(run.guard.report.selections[0])
    return run.guard.state_dict(), reports
