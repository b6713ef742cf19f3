"""Everything gradkeel raises or warns with, in one tree.

GradkeelError
├── PolicySpecError          (ValueError)    a policy spec string that cannot be read
├── SelectionError           (ValueError)    an exclude pattern, module or parameter that selects nothing
├── AttachError              (RuntimeError)  an optimizer that cannot be guarded, or is guarded already
├── NonFiniteGradientError   (RuntimeError)  a NaN or inf gradient under ``nonfinite="raise"``
├── TooManySkipsError        (RuntimeError)  more skips in a row than ``max_consecutive_skips``
├── RankError                (RuntimeError)  another rank of a distributed run raised, or disagrees with this one
├── WindowError              (RuntimeError)  a step, a clip or a zero_grad in the middle of an accumulation window
├── CheckpointError          (ValueError)    a state that does not belong to this guard, policy or accumulator
├── RecordError              (ValueError)    a file that is no gradkeel record, or one from a newer version
└── MissingExtraError        (ImportError)   an optional dependency that is not installed

GradkeelWarning (UserWarning)
├── SkippedStepWarning       a step was skipped; names the parameter
├── DoubleClippingWarning    somebody else clips too; names the argument to turn off
├── UnguardedCopyWarning     a copied optimizer carries no guard
└── RecordWarning            recording stopped, or its file was moved or deleted; training goes on
"""

import importlib
import typing


def check_kind(value: object, kind: typing.Any, argument: str, rule: str) -> None:
    """Raise `TypeError` unless a value is of this kind, as ``isinstance`` takes it.

    It names the ``argument``, such as ``"attach(model=...)"``, and the ``rule``: what it must be, with the fix.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{argument}: {rule}, not {type(value).__name__}")


class GradkeelError(Exception):
    """Base of every error that gradkeel raises on purpose."""


class PolicySpecError(GradkeelError, ValueError):
    """A policy spec string such as ``"global-norm:1.0"`` that cannot be read."""


class SelectionError(GradkeelError, ValueError):
    """An ``exclude`` entry or a ``"clip"`` key that does not select what it says."""


class AttachError(GradkeelError, RuntimeError):
    """An optimizer that cannot be guarded, or is guarded already."""


class NonFiniteGradientError(GradkeelError, RuntimeError):
    """A NaN or inf gradient under ``nonfinite="raise"``; nothing has been modified."""


class TooManySkipsError(GradkeelError, RuntimeError):
    """More skipped steps in a row than ``max_consecutive_skips`` allows."""


class RankError(GradkeelError, RuntimeError):
    """Another rank of a distributed run raised, or is set up in another way; this one must not go on alone."""


class WindowError(GradkeelError, RuntimeError):
    """A step, a clip or a ``zero_grad`` in the middle of an accumulation window."""


class CheckpointError(GradkeelError, ValueError):
    """A state that does not belong to this guard, policy or accumulator."""


class RecordError(GradkeelError, ValueError):
    """A file that is no gradkeel record, or one that a newer version wrote."""


class MissingExtraError(GradkeelError, ImportError):
    """An optional dependency that is not installed; the message holds the install command."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        """Say which ``package`` is missing, for what ``purpose``, and which ``extra`` installs it."""
        super().__init__(
            f"{purpose} needs {package}, which is not installed; run: pip install 'gradkeel[{extra}]'"
        )


def import_extra(module: str, extra: str, purpose: str) -> typing.Any:
    """A module of an optional dependency.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(module.partition(".")[0], extra, purpose) from None


class GradkeelWarning(UserWarning):
    """Base of every warning that gradkeel gives."""


class SkippedStepWarning(GradkeelWarning):
    """An optimizer step was skipped because a gradient was not finite."""


class DoubleClippingWarning(GradkeelWarning):
    """Gradients were already clipped by somebody else before the guard saw them."""


class UnguardedCopyWarning(GradkeelWarning):
    """A copied or unpickled optimizer is not guarded; attach a guard to the copy."""


class RecordWarning(GradkeelWarning):
    """Recording has stopped, or goes on in another file, for the reason given; training goes on."""
