"""The guard around one optimizer's step, and what it reports of each step."""

from gradkeel.guard.guard import Guard
from gradkeel.guard.pipeline import NonFinite
from gradkeel.guard.report import Recorder, SelectionReport, SkipReason, StepReport

__all__ = ["Guard", "NonFinite", "Recorder", "SelectionReport", "SkipReason", "StepReport"]
