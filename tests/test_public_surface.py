"""What `import gradkeel` offers: a change of this list is a decision, and goes into CHANGELOG.md."""

import inspect

import pytest

import gradkeel

SURFACE = [
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
