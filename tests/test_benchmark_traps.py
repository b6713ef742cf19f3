"""The comparison table's own column: gradkeel is right in every trap that the page lists."""

import pytest

from benchmarks.trap_trainers import with_gradkeel
from benchmarks.traps import TRAINING_TRAPS, accumulation_traps, function_traps, loss_scale_traps


@pytest.mark.parametrize("name", TRAINING_TRAPS)
@pytest.mark.filterwarnings("ignore::gradkeel.SkippedStepWarning")
def test_gradkeel_is_right_in_training(name):
    assert TRAINING_TRAPS[name](with_gradkeel).is_right


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_gradkeel_is_right_in_single_calls_and_torch_is_not():
    for name, (mine, theirs) in {**function_traps(), **loss_scale_traps(), **accumulation_traps()}.items():
        assert mine.is_right, name
        assert not theirs.is_right, name
