"""gradkeel keeps PyTorch training on an even keel: it owns everything between ``loss.backward()`` and ``step()``.

>>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
"""

from gradkeel import policies
from gradkeel.accumulate import Accumulator, MicroBatch
from gradkeel.attach import attach
from gradkeel.errors import (
    AttachError,
    CheckpointError,
    GradkeelError,
    GradkeelWarning,
    MissingExtraError,
    NonFiniteGradientError,
    PolicySpecError,
    SelectionError,
    TooManySkipsError,
    WindowError,
)
from gradkeel.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from gradkeel.guard import Guard
from gradkeel.policies import ClipByGlobalNorm, ClipByNorm, ClipByValue
from gradkeel.step_report import StepReport
from gradkeel.table import gradients

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "AttachError",
    "CheckpointError",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "GradkeelError",
    "GradkeelWarning",
    "Guard",
    "MissingExtraError",
    "MicroBatch",
    "NonFiniteGradientError",
    "PolicySpecError",
    "SelectionError",
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
]
