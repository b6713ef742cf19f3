"""Which test a line is run for, while the map is drawn; a plugin of coverage.

Each test is a context of coverage, and processes that it starts begin with that context. The ranks of tests/distributed
outlive a test, so coverage asks there, at each case, which test runs.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

LOG = "MUTANTS_LOG"  # a folder, while the map is drawn: one file of lines for each pytest process
TEST = "MUTANTS_TEST"  # the context of the test that runs, for the processes that it starts
CURRENT = "MUTANTS_CURRENT"  # a file that holds the same, for processes that stay


def context_of(test: str) -> str:
    """A test's name as coverage's context: ids may hold any sign, and coverage joins contexts by one."""
    return hashlib.sha256(test.encode()).hexdigest()[:16]


def coverage_init(registry: Any, options: dict[str, str]) -> None:
    """Coverage's entry: only the ranks that stay ask for the running test."""
    del options
    if CURRENT in os.environ and "forkserver" in " ".join(sys.orig_argv):
        registry.add_dynamic_context(_ranks())


def _ranks() -> Any:
    from coverage import CoveragePlugin

    class Ranks(CoveragePlugin):
        """Names the running test, whenever a function of a test file is entered."""

        def dynamic_context(self, frame: Any) -> str | None:
            """The context for the call of a case; the pool's own loop runs in none."""
            name = frame.f_code.co_filename
            if "/tests/" not in name or name.endswith("/pool.py"):
                return None
            return Path(os.environ[CURRENT]).read_text(encoding="utf-8")

    return Ranks()
