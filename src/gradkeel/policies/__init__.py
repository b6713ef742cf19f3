"""Every policy, and the parts that policies are made of: scope x bound x form."""

from gradkeel.policies.base import Policy, Scope
from gradkeel.policies.bounds.base import AdaptiveBound, Bound, HostBound
from gradkeel.policies.bounds.fixed import Constant, ParameterRatio, RootMeanSquare, Schedule, Smoothness
from gradkeel.policies.bounds.running import Ema, GeometricQuantile, RunningZScore
from gradkeel.policies.bounds.windowed import Quantile, RobustZScore, ZScore
from gradkeel.policies.clip import Clip, Form
from gradkeel.policies.compose.chain import Chain, Composite, Warmup
from gradkeel.policies.compose.groups import PerGroup
from gradkeel.policies.forms import Hard, Rescale, SkipAbove, Smooth
from gradkeel.policies.recipes.adaptive import AdaGC, AutoClip, QuantileClip, RobustClip, ZClip
from gradkeel.policies.recipes.clips import (
    AdaptiveGradientClip,
    BlockRms,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
)
from gradkeel.policies.recipes.named import NamedPolicy
from gradkeel.policies.recipes.skip import SkipOnLoss, SkipStep
from gradkeel.policies.recipes.smooth import Normalize, SmoothClip, SmoothnessStep
from gradkeel.policies.scopes import Cells
from gradkeel.policies.spec.describe import PolicyDescription, describe, descriptions
from gradkeel.policies.spec.parse import PolicySpec, parse

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
