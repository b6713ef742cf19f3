"""The same gradients in, the same gradients out, for every pair of a policy and a peer that share a formula."""

import pytest

from benchmarks.parity import BOUNDS, PAIRS, TOLERANCE, difference, is_installed

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("seed", [7, 8, 9])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair.policy(1.0).spec}-{pair.peer}-{pair.call}")
def test_same_gradients_in_same_gradients_out(pair, bound, seed):
    if not is_installed(pair):
        pytest.skip(f"`make test-peers` installs {pair.peer}")
    assert difference(pair, bound, seed) <= TOLERANCE
