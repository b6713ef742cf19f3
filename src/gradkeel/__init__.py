"""gradkeel keeps PyTorch training on an even keel: it owns everything between ``loss.backward()`` and ``step()``.

>>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
"""

from gradkeel import policies, smoothness
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
from gradkeel.guard import Guard
from gradkeel.policies import AdaptiveGradientClip, ClipByGlobalNorm, ClipByNorm, ClipByValue
from gradkeel.record import Recorder
from gradkeel.step_report import StepReport
from gradkeel.table import gradients

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "AdaptiveGradientClip",
    "AttachError",
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
    "get_total_norm",
    "gradients",
    "policies",
    "smoothness",
]
