"""Every optimizer of a dozen packages under the guard, and the page that says so; `make test-optimizers` runs it."""

import pytest

pytest.importorskip("pytorch_optimizer", reason="needs the environment of make test-optimizers")

from benchmarks.optimizers import LEFT_OUT, PACKAGES, PAGE, cases, examine

pytestmark = [
    pytest.mark.optimizers,
    pytest.mark.filterwarnings("ignore"),  # theirs
]

CASES = list(cases())
REFUSED = {
    "torch_optimizer.Lookahead": ".optimizer",
    "schedulefree.ScheduleFreeWrapper": ".base",
    "schedulefree.ScheduleFreeWrapperReference": ".base",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_clips_as_torch_skips_bit_by_bit_and_keeps_the_state_or_is_refused_with_the_fix(case):
    row = examine(case)
    if case.name in REFUSED:
        assert f"attach to its {REFUSED[case.name]}" in row.attach
    else:
        assert (row.attach, row.clip, row.skip, row.state) == ("yes",) * 4


def test_there_are_enough_of_them_and_the_page_names_each():
    assert len(CASES) >= 30
    assert len({case.package for case in CASES}) == len(PACKAGES) >= 6
    text = PAGE.read_text(encoding="utf-8")
    assert [case.name for case in CASES if case.kind.__name__ not in text] == []
    assert [name for name in LEFT_OUT if name not in text] == []
