"""The comparison table's own column: gradkeel is right in every trap that the page lists."""

import pytest

from benchmarks.trap_trainers import with_accelerate_by_items, with_gradkeel
from benchmarks.traps import TRAINING_TRAPS, single_calls


@pytest.mark.parametrize("name", TRAINING_TRAPS)
@pytest.mark.filterwarnings("ignore::gradkeel.SkippedStepWarning")
def test_gradkeel_is_right_in_training(name):
    assert TRAINING_TRAPS[name](with_gradkeel).is_right


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_gradkeel_is_right_in_single_calls_and_torch_is_where_its_documentation_says_how():
    right_in_torch, not_asked_for = ("6 unscale_order", "12 one entry"), "14 the same, nothing asked for"
    for name, (mine, theirs) in single_calls().items():
        assert mine.is_right == (name != not_asked_for), name
        assert theirs.is_right == name.startswith(right_in_torch), name


@pytest.mark.parametrize("name", TRAINING_TRAPS)
def test_accelerates_guide_for_samples_of_variable_size_is_right_where_it_is(name):
    pytest.importorskip("accelerate")
    found = TRAINING_TRAPS[name](with_accelerate_by_items)
    assert found.is_right == (not name.startswith("10 ")), found
