"""Ranks for the tests in this folder: gloo processes that stay for the whole session."""

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="session")
def pool():
    processes = Pool()
    yield processes
    processes.close()


@pytest.fixture
def ranks(pool):
    """Runs a case on several ranks: ``ranks(2, case, ...)`` gives what each of them returned."""
    return pool.run
