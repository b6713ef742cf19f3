"""What is stacked on a device must be there: some of it the host may know already."""

import gc
import itertools

import pytest
import torch

from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.norms import Decision, GradientNorms
from gradkeel.record import Reader, Recorder
from gradkeel.record.kept import Kept, _coefficients


def test_coefficients_that_the_host_knows_stand_beside_those_on_the_device():
    norms = torch.empty(4, dtype=torch.float64, device="meta")
    for values in ([None, None], [0.5, None], [torch.empty((), dtype=torch.float64, device="meta"), 1.0]):
        found = _coefficients(values, norms)
        assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 4), torch.float64)
    here = _coefficients([None, 0.5], torch.zeros(3, dtype=torch.float64))
    assert here.tolist() == [[1.0] * 3, [0.5] * 3]


def test_steps_that_wait_are_not_kept_alive_as_objects(tmp_path, make_report):
    """What is alive for long, the garbage collection goes through again and again, with all else that there is."""
    kinds = StepReport | SelectionReport | GradientNorms

    def alive():
        gc.collect()
        return sum(issubclass(type(one), kinds) for one in gc.get_objects())

    before = alive()
    recorder = Recorder(tmp_path / "run.keel", flush_seconds=600)
    for step in range(1, 101):
        recorder.record(make_report(step))
    assert alive() - before <= 10
    recorder.close()
    with Reader(tmp_path / "run.keel") as run:
        assert run.steps().tolist() == list(range(1, 101))


DECISIONS = {
    "one": lambda new: Decision(coefficients=new(()), bound=new(())),
    "each": lambda new: Decision(coefficients=new(3), bound=new(3)),
    "units": lambda new: Decision(unit_coefficients=new(5), bound=new(5)),
    "clamp": lambda new: Decision(clamp=(-1.0, 1.0)),
    "nothing": lambda new: Decision(),
}


@pytest.mark.parametrize("kinds", list(itertools.product(DECISIONS, repeat=2)), ids="-".join)
def test_steps_of_an_accelerator_are_stacked_there(kinds):
    """Whatever a policy decides at one step and at the next; the host knows no number of theirs."""

    def new(*shape, dtype=torch.float64):
        return torch.empty(*shape, dtype=dtype, device="meta")

    def norms(names, **more):
        return GradientNorms(names, new(len(names)), new(()), 2.0, (0,) * len(names), 1, **more)

    def report(step, kind):
        units = {"units": new(5), "unit_counts": (2, 2, 1), "unit_sizes": (2, 2, 4)}
        main = norms(("a", "b", "c"), weights=new(3), peaks=new(3, 2), **units)
        selections = (
            SelectionReport("main", "p", main, DECISIONS[kind](new), (True, True, step > 1)),
            SelectionReport("group 1", "q", norms(("d",)), Decision(coefficients=new(())), (True,)),
            SelectionReport("excluded", "None", norms(()), Decision(), ()),
        )
        made = new((), dtype=torch.bool)
        return StepReport(step, selections, scalars={"loss": new(())}, stepped_or_pending=made)

    kept = Kept(report(1, kinds[0]))
    for step, kind in enumerate(kinds, 1):
        kept.steps.append(kept.taken(report(step, kind), 0.0, 0.1, None))
    series = kept.stacked()
    outcomes = sum(kind in ("units", "clamp") for kind in kinds)
    for name, values in series.items():
        wide = {"norms": (2, 4), "coefficients": (2, 4), "weights": (2, 4), "peaks": (2, 4, 2)}
        rows = outcomes if name.startswith("outcome_") else 2
        assert (name, values.device.type, values.shape) == (name, "meta", wide.get(name, (rows,)))
        assert values.dtype == torch.float64
    assert ("outcome_total" in series) == (outcomes > 0)
    assert [own.present().tolist() for own in kept.columns()] == [[[1, 1, 0], [1, 1, 1]], [[1], [1]]]
