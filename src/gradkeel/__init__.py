"""gradkeel keeps PyTorch training on an even keel: it owns everything between ``loss.backward()`` and ``step()``.

>>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
"""

import importlib
import typing

from gradkeel import policies
from gradkeel.accumulate import Accumulator, MicroBatch
from gradkeel.attach import attach
from gradkeel.errors import (
    AttachError,
    CheckpointError,
    DoubleClippingWarning,
    GradkeelError,
    GradkeelWarning,
    NonFiniteGradientError,
    PolicySpecError,
    RankError,
    SelectionError,
    SkippedStepWarning,
    TooManySkipsError,
    WindowError,
)
from gradkeel.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradkeel.guard import Guard, StepReport
from gradkeel.policies import AdaptiveGradientClip, ClipByGlobalNorm, ClipByNorm, ClipByValue
from gradkeel.table import gradients
from gradkeel.version import __version__ as __version__

if typing.TYPE_CHECKING:
    from gradkeel import explain, smoothness
    from gradkeel.explain.autopsy import Autopsy
    from gradkeel.record import Recorder

__all__ = [
    "Accumulator",
    "AdaptiveGradientClip",
    "AttachError",
    "Autopsy",
    "CheckpointError",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "DoubleClippingWarning",
    "GradkeelError",
    "GradkeelWarning",
    "Guard",
    "MicroBatch",
    "NonFiniteGradientError",
    "PolicySpecError",
    "RankError",
    "Recorder",
    "SelectionError",
    "SkippedStepWarning",
    "StepReport",
    "TooManySkipsError",
    "WindowError",
    "attach",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "explain",
    "get_total_norm",
    "gradients",
    "policies",
    "smoothness",
]

# What a training script need not load before it records or asks why: where each name is found.
_LAZY = {
    "Autopsy": "gradkeel.explain.autopsy",
    "Recorder": "gradkeel.record",
    "explain": "gradkeel.explain",
    "smoothness": "gradkeel.smoothness",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'gradkeel' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if module.__name__ == f"gradkeel.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
