"""The accumulation page's table, small: what equals the full batch, and what does not."""

import pytest

from benchmarks.accumulation import apart, train


def distance(name, mode, bound, updates=5):
    weights = {m: train(name, m, 4, updates, bound)["weights"] for m in (mode, "full batch")}
    return apart(name, weights[mode], weights["full batch"])


@pytest.mark.parametrize("bound", [None, 0.2])
def test_exact_accumulation_is_the_full_batch(bound):
    assert distance("simple-mlp", "exact", bound) < 1e-6  # float32


def test_the_undivided_sum_is_not_and_a_tight_bound_hides_it():
    assert distance("simple-mlp", "undivided sum", None) > 0.1
    assert distance("simple-mlp", "undivided sum", 0.2) < 1e-6


def test_the_mean_of_means_is_not_with_uneven_sequences():
    # AdamW divides by the gradient's own size, which multiplies float32's rounding.
    assert distance("tiny-transformer", "exact", None, updates=3) < 1e-3
    assert distance("tiny-transformer", "mean of means", None, updates=3) > 1e-2
