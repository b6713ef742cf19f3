"""gradkeel keeps PyTorch training on an even keel: it owns everything between ``loss.backward()`` and ``step()``.

>>> guard = gk.attach(optimizer, gk.ClipByGlobalNorm(1.0), model=model)
"""

import importlib
import typing

from gradkeel.version import __version__ as __version__

if typing.TYPE_CHECKING:
    from gradkeel import explain, policies, smoothness
    from gradkeel.accumulate import Accumulator, MicroBatch
    from gradkeel.attaching import attach
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
    from gradkeel.explain.autopsy import Autopsy
    from gradkeel.explain.plot import plot
    from gradkeel.functional import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
    from gradkeel.guard import Guard, StepReport
    from gradkeel.policies import AdaptiveGradientClip, ClipByGlobalNorm, ClipByNorm, ClipByValue
    from gradkeel.record import Recorder
    from gradkeel.table import gradients

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
    "plot",
    "policies",
    "smoothness",
]

# Where each name is found, once it is asked for: the command line's help must not wait for torch.
_WHERE = {
    "accumulate": "Accumulator MicroBatch",
    "attaching": "attach",
    "errors": "AttachError CheckpointError DoubleClippingWarning GradkeelError GradkeelWarning NonFiniteGradientError "
    "PolicySpecError RankError SelectionError SkippedStepWarning TooManySkipsError WindowError",
    "explain.autopsy": "Autopsy",
    "functional": "clip_grad_norm_ clip_grad_value_ clip_grads_with_norm_ get_total_norm",
    "explain.plot": "plot",
    "guard": "Guard StepReport",
    "policies": "AdaptiveGradientClip ClipByGlobalNorm ClipByNorm ClipByValue",
    "record": "Recorder",
    "table": "gradients",
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        value: object = getattr(importlib.import_module(f"gradkeel.{_MODULES[name]}"), name)
    else:
        try:
            value = importlib.import_module(f"gradkeel.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"gradkeel.{name}":
                raise
            raise AttributeError(f"module 'gradkeel' has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
