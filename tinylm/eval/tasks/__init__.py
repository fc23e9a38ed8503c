"""The tasks by name; task.py says what one is."""

from tinylm.eval.tasks.alpaca import ALPACA
from tinylm.eval.tasks.gsm8k import GSM8K
from tinylm.eval.tasks.pairs import PAIRS
from tinylm.eval.tasks.samsum import SAMSUM
from tinylm.eval.tasks.sms import SMS
from tinylm.eval.tasks.sst2 import SST2
from tinylm.eval.tasks.task import Task, TaskExample

__all__ = ["TASKS", "PAIRS", "TaskExample", "Task"]

# The names are those of the setting data.task. PAIRS is for rows of a user's own, and so has no name on the hub.
TASKS: dict[str, Task] = {task.name: task for task in (SST2, SAMSUM, GSM8K, SMS, ALPACA)}
