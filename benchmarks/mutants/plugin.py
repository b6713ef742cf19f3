"""A plugin of pytest: runs the planned tests in the planned order and says what came of them, or draws the map."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutants.contexts import CURRENT, LOG, TEST, context_of

PLAN = "MUTANTS_PLAN"  # a file: {test: seconds that it may take}, in the order to run
RESULT = "MUTANTS_RESULT"  # a file that this module writes


class Planned:
    """Runs the tests of a plan, stops at the first that fails, and says which."""

    def __init__(self) -> None:
        self._limits: dict[str, float] = json.loads(Path(os.environ[PLAN]).read_text(encoding="utf-8"))
        self._result: dict[str, Any] = {"failed": [], "is_timeout": False, "is_over": False}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep what is planned."""
        found = {item.nodeid: item for item in items}
        chosen: dict[str, float] = {}
        for test, limit in self._limits.items():
            # A mutant may change a parameter's id: then all parameters of that test stand for it.
            alike = [test] if test in found else [one for one in found if _function(one) == _function(test)]
            for one in alike:
                chosen.setdefault(one, limit)
        items[:] = [found[test] for test in chosen]
        for item in items:
            item.add_marker(pytest.mark.timeout(chosen[item.nodeid]), append=False)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a failure at once: the process may not live to tell."""
        if report.failed:
            self._result["is_timeout"] |= "Timeout (>" in report.longreprtext
            self._failed(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A mutant that a test file cannot even import is noticed as well."""
        if report.failed:
            self._failed(f"import of {report.nodeid}")

    def pytest_sessionfinish(self) -> None:
        """Say that the session came to its end."""
        self._result["is_over"] = True
        self._write()

    def _failed(self, test: str) -> None:
        self._result["failed"].append(test)
        self._write()

    def _write(self) -> None:
        Path(os.environ[RESULT]).write_text(json.dumps(self._result), encoding="utf-8")


def _function(test: str) -> str:
    return test.partition("[")[0]


class Mapped:
    """Tells coverage which test runs, and logs how long tests and imports of test files took."""

    def __init__(self) -> None:
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        self._log = Path(os.environ[LOG], f"{worker}.jsonl").open("w", encoding="utf-8")  # noqa: SIM115
        os.environ[CURRENT] = str(Path(os.environ[LOG], f"{worker}.current"))
        self._outcome = ""

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        """Time the import of a test file."""
        begin = _clock()
        report = yield
        if isinstance(collector, pytest.Module):
            self._write(file=collector.nodeid, seconds=_clock() - begin)
        return report

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Open the test's context, and close it."""
        from coverage import Coverage

        coverage = Coverage.current()
        assert coverage is not None
        context = context_of(item.nodeid)
        os.environ[TEST] = context
        Path(os.environ[CURRENT]).write_text(context, encoding="utf-8")
        coverage.switch_context(context)
        self._outcome = ""
        begin = _clock()
        try:
            return (yield)
        finally:
            coverage.switch_context("")
            os.environ.pop(TEST, None)
            self._write(test=item.nodeid, seconds=_clock() - begin, outcome=self._outcome)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test ends."""
        if report.when == "call" or not report.passed:
            self._outcome = report.outcome

    def _write(self, **entry: Any) -> None:
        self._log.write(json.dumps(entry) + "\n")
        self._log.flush()


def _clock() -> float:
    """Seconds, without those for which others had the processor where the system counts them (Linux)."""
    try:
        waited = int(Path("/proc/thread-self/schedstat").read_text(encoding="utf-8").split()[1]) / 1e9
    except OSError:
        waited = 0.0
    return time.perf_counter() - waited


def pytest_configure(config: pytest.Config) -> None:
    """Install what the environment asks for."""
    if PLAN in os.environ:
        config.pluginmanager.register(Planned())
    if LOG in os.environ and (hasattr(config, "workerinput") or not config.getoption("numprocesses", None)):
        config.pluginmanager.register(Mapped())
