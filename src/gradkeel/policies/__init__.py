"""Every policy, and the parts that policies are made of: scope x bound x form."""

from gradkeel.policies.adaptive import AdaGC, AutoClip, QuantileClip, RobustClip, ZClip
from gradkeel.policies.base import Policy, Scope
from gradkeel.policies.bounds import AdaptiveBound, Bound, HostBound
from gradkeel.policies.cells import Cells
from gradkeel.policies.clip import Clip, Form
from gradkeel.policies.compose import Chain, Composite, Warmup
from gradkeel.policies.describe import PolicyDescription, describe, descriptions
from gradkeel.policies.fixed import Constant, ParameterRatio, RootMeanSquare, Schedule, Smoothness
from gradkeel.policies.forms import Hard, Rescale, SkipAbove, Smooth
from gradkeel.policies.groups import PerGroup
from gradkeel.policies.named import NamedPolicy
from gradkeel.policies.parse import PolicySpec, parse
from gradkeel.policies.recipes import (
    AdaptiveGradientClip,
    BlockRms,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
)
from gradkeel.policies.running import Ema, GeometricQuantile, RunningZScore
from gradkeel.policies.skip import SkipOnLoss, SkipStep
from gradkeel.policies.smooth import Normalize, SmoothClip, SmoothnessStep
from gradkeel.policies.windowed import Quantile, RobustZScore, ZScore

__all__ = [
    "AdaGC",
    "AdaptiveBound",
    "AdaptiveGradientClip",
    "AutoClip",
    "BlockRms",
    "Bound",
    "Cells",
    "Chain",
    "Clip",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Composite",
    "Constant",
    "Ema",
    "Form",
    "GeometricQuantile",
    "Hard",
    "HostBound",
    "NamedPolicy",
    "Normalize",
    "ParameterRatio",
    "PerGroup",
    "Policy",
    "PolicyDescription",
    "PolicySpec",
    "Quantile",
    "QuantileClip",
    "Rescale",
    "RobustClip",
    "RobustZScore",
    "RootMeanSquare",
    "RunningZScore",
    "Schedule",
    "Scope",
    "SkipAbove",
    "SkipOnLoss",
    "SkipStep",
    "Smooth",
    "SmoothClip",
    "Smoothness",
    "SmoothnessStep",
    "Warmup",
    "ZClip",
    "ZScore",
    "describe",
    "descriptions",
    "parse",
]
