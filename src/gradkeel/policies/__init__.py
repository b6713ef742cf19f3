"""Every policy, and the parts that policies are made of: scope x bound x form."""

from gradkeel.policies.base import Bound, Cells, Clip, Form, HostBound, NamedPolicy, Policy
from gradkeel.policies.fixed import ClipByGlobalNorm, ClipByNorm, ClipByValue, Constant, Schedule
from gradkeel.policies.forms import Hard, Normalize, SkipAbove, Smooth
from gradkeel.policies.parse import PolicySpec, parse

__all__ = [
    "Bound",
    "Cells",
    "Clip",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "Constant",
    "Form",
    "Hard",
    "HostBound",
    "NamedPolicy",
    "Normalize",
    "Policy",
    "PolicySpec",
    "Schedule",
    "SkipAbove",
    "Smooth",
    "parse",
]
