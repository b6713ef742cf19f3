"""Ranks for the tests in this folder: gloo processes that stay for the whole session."""

import pytest
from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def _pool():
    pool = Pool()
    yield pool
    pool.close()


@pytest.fixture
def ranks(_pool):
    """Runs a case on several ranks: ``ranks(2, case, ...)`` gives what each of them returned."""
    return _pool.run
