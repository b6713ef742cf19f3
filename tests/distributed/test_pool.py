"""No distributed test can wait for ever: the pool has a time limit for each case."""

import time

import pytest
import torch
from torch import distributed

from tests.distributed.pool import Pool, RankError


def sleeps(rank):
    time.sleep(60 * rank)


def waits(rank):
    if rank == 0:
        distributed.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("case", "words"), [(sleeps, "rank 1: no answer within 4 seconds"), (waits, "rank 0: Traceback")]
)
def test_a_case_that_does_not_end_is_a_failure(case, words):
    pool = Pool()
    try:
        pool.run(2, own_rank, seconds=60)  # the workers' start is not what is timed
        with pytest.raises(RankError, match=words):
            pool.run(2, case, seconds=4)
        assert pool.run(2, own_rank) == [0, 1]  # and others can be run after it
    finally:
        pool.close()


def own_rank(rank):
    return rank
