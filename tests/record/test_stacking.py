"""What is stacked on a device must be there: some of it the host may know already."""

import gc

import torch

from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.norms import GradientNorms
from gradkeel.record import Reader, Recorder
from gradkeel.record.rows import _coefficients


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
