"""Hand-made step reports: what a guard would hand to its recorders, with numbers that follow from the step."""

import pytest
import torch

from gradkeel.guard.report import SelectionReport, StepReport
from gradkeel.norms import Decision, GradientNorms


@pytest.fixture(scope="session")
def make_report():
    """A report of step ``step``: parameter i has the norm ``step + i / 10``, and the bound is 50."""

    def make(step, names=("a.weight", "b.weight", "b.bias"), norms=None, stepped=True, **scalars):
        given = [step + i / 10 for i in range(len(names))] if norms is None else norms
        values = torch.tensor(given, dtype=torch.float64)
        total = torch.linalg.vector_norm(values)
        coefficient = 50 / torch.maximum(total, torch.tensor(50.0, dtype=torch.float64))
        measured = GradientNorms(names, values, total, 2.0, (0,) * len(names), step, sizes=(4,) * len(names))
        decision = Decision(coefficients=coefficient, bound=torch.tensor(50.0, dtype=torch.float64))
        selection = SelectionReport(
            "main", "ClipByGlobalNorm(max_norm=50.0)", measured, decision, (True,) * len(names)
        )
        return StepReport(step, (selection,), 1.0, scalars, stepped)

    return make
