"""What `import gradkeel` offers: a change of this list is a decision, and goes into CHANGELOG.md."""

import inspect
import subprocess
import sys

import pytest

import gradkeel

SURFACE = [
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


def test_the_surface_is_frozen():
    assert gradkeel.__all__ == SURFACE


def test_the_surface_is_sorted():
    assert sorted(SURFACE) == SURFACE


def test_nothing_public_hides_beside_the_surface():
    hidden = {
        name
        for name, value in vars(gradkeel).items()
        if not (name.startswith("_") or inspect.ismodule(value) or name in SURFACE)
    }
    assert hidden == set()


@pytest.mark.parametrize("name", SURFACE)
def test_every_name_is_there_and_documented(name):
    assert inspect.cleandoc(getattr(gradkeel, name).__doc__ or "")


def test_what_a_training_loop_may_catch_is_on_the_surface():
    from gradkeel import errors

    # These four are met at a file, a copy or an install command, not in a loop.
    elsewhere = {"MissingExtraError", "RecordError", "RecordWarning", "UnguardedCopyWarning"}
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert classes - elsewhere <= set(gradkeel.__all__)


LATER = ("gradkeel.explain", "gradkeel.record", "gradkeel.smoothness", "gradkeel.cli", "sqlite3")


def test_importing_loads_nothing_that_a_loop_without_a_record_does_not_use():
    code = f"import sys, gradkeel; print([name for name in {LATER!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lazy_names_are_those_of_their_modules():
    from gradkeel.record import Recorder

    assert gradkeel.Recorder is Recorder
    assert {"Recorder", "explain", "smoothness"} <= set(dir(gradkeel))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        gradkeel.nothing  # noqa: B018  # looking it up is the point
