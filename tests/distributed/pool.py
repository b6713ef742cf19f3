"""Processes that stay, so that each test of several ranks costs a process group and not an import of torch.

A case is a function of a test module: ``case(rank, *arguments)``. Every rank runs it inside a fresh process group; what
it returns comes back by pickle, so it returns numbers and words.
"""

import multiprocessing
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch

SECONDS = 60  # a case may take; a rank that waits for another in vain gives up after half of it
MOST = 4
HAS_FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # not in torch 2.6


class RankError(AssertionError):
    """A case raised, or took too long, on some rank."""


class Pool:
    """Up to four worker processes, started at the first case and again after a failure."""

    def __init__(self):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["torch.distributed.fsdp", "torch.distributed.tensor", "gradkeel"]
        )
        self._workers = []

    def run(self, count, case, *arguments, seconds=SECONDS):
        """What each of ``count`` ranks returns, in their order."""
        while len(self._workers) < count:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            workers = self._workers[:count]
            for _, connection in workers:
                connection.send((count, str(Path(folder) / "store"), seconds, case, arguments))
            answers = [self._answer(connection, seconds) for _, connection in workers]
        failures = [f"rank {rank}: {words}" for rank, (is_good, words) in enumerate(answers) if not is_good]
        if failures:
            self.close()
        words = "\n".join(failures)
        if not HAS_FSDP2_ON_CPU and ("fully_shard" in words or "record_event" in repr(answers)):
            pytest.skip("this torch's fully_shard needs an accelerator")
        if failures:
            raise RankError(words)
        return [value for _, value in answers]

    @staticmethod
    def _answer(connection, seconds):
        if not connection.poll(seconds):
            return False, f"no answer within {seconds} seconds"
        try:
            return connection.recv()
        except EOFError:
            return False, "the process has died"

    def _start(self):
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(len(self._workers), theirs), daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def close(self):
        """End the processes; a new one is started when it is needed."""
        for process, connection in self._workers:
            connection.close()
            process.terminate()
            process.join()
        self._workers = []


def _work(rank, connection):
    torch.set_num_threads(1)
    while True:
        try:
            count, store, seconds, case, arguments = connection.recv()
        except EOFError:
            return
        connection.send(_answer_of(rank, count, store, seconds, case, arguments))


def _answer_of(rank, count, store, seconds, case, arguments):
    from torch import distributed

    distributed.init_process_group(
        "gloo",
        store=distributed.FileStore(store, count),
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=seconds / 2),
    )
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # torch 2.6 says so of every DTensor on CPUs.
            warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")
            # And this of itself when it saves a checkpoint.
            warnings.filterwarnings("ignore", "TypedStorage is deprecated")
            distributed.barrier()  # a rank that is done at once would hang up on one that still connects
            return True, case(rank, *arguments)
    except Exception:  # noqa: BLE001  # the test that asked for it must hear of it
        return False, traceback.format_exc()
    finally:
        # Before torch 2.8 the group's end holds the interpreter's lock while it waits for gloo's threads, and one of
        # these may need the lock to let go of its last tensor (https://github.com/pytorch/pytorch/pull/154976).
        if torch.__version__ < (2, 8):
            time.sleep(0.05)
        distributed.destroy_process_group()
        # torch remembers how operations place their results by meshes that look alike, whose groups are gone now.
        clear_sharding_prop_cache()


def clear_sharding_prop_cache():
    """Let DTensor forget the meshes of a group that is gone."""
    from torch.distributed.tensor import DTensor, debug

    if hasattr(debug, "_clear_sharding_prop_cache"):
        debug._clear_sharding_prop_cache()
    else:  # torch 2.9 and before keep it in one place
        DTensor._op_dispatcher.sharding_propagator.propagate_op_sharding.cache.cache_clear()
