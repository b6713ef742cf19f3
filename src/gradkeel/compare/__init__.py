"""The same task under several policies, learning rates and seeds, side by side."""

from gradkeel.compare.engine import compare
from gradkeel.compare.plan import Comparison, Plan, make_command_plan, make_plan
from gradkeel.compare.run import Onset, Run, Trial, run_trial
from gradkeel.compare.summary import Row, summarize
from gradkeel.compare.task import BUILTIN, Task, TaskError, load_task

__all__ = [
    "BUILTIN",
    "Comparison",
    "Onset",
    "Plan",
    "Row",
    "Run",
    "Task",
    "TaskError",
    "Trial",
    "compare",
    "load_task",
    "make_command_plan",
    "make_plan",
    "run_trial",
    "summarize",
]
