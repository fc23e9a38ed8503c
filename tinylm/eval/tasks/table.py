"""The tasks by name. A new task is one file beside this one and one entry here;
task.py says what a task is.
"""

from tinylm.common.errors import UserError
from tinylm.eval.tasks.alpaca import ALPACA
from tinylm.eval.tasks.gsm8k import GSM8K
from tinylm.eval.tasks.pairs import PAIRS
from tinylm.eval.tasks.samsum import SAMSUM
from tinylm.eval.tasks.sms import SMS
from tinylm.eval.tasks.sst2 import SST2
from tinylm.eval.tasks.task import Task

# The names are the values of the setting data.task.
TASKS: dict[str, Task] = {task.name: task for task in (SST2, SAMSUM, GSM8K, SMS, ALPACA)}
# PAIRS is for a user's own rows, so it has no rows on the hub and is not a value of data.task.
EVALUATED_TASKS = {**TASKS, PAIRS.name: PAIRS}


def find_task(name: str) -> Task:
    """The task to evaluate.

    Raises:
        UserError: there is no such task.
    """
    if name not in EVALUATED_TASKS:
        fix = f"Give one of {', '.join(EVALUATED_TASKS)}"
        raise UserError(("--tasks", name), "no such task", fix)
    return EVALUATED_TASKS[name]
