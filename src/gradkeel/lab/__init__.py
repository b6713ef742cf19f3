"""The same task under several policies, learning rates and seeds, side by side."""

from gradkeel.lab.compare import compare
from gradkeel.lab.plan import Comparison, Plan, make_command_plan, make_plan
from gradkeel.lab.run import Onset, Run, Trial, run_trial
from gradkeel.lab.summary import Row, summarize
from gradkeel.lab.task import BUILTIN, Task, TaskError, load_task

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
