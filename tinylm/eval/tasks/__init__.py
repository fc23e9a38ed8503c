"""The tasks by name; task.py says what one is."""

from tinylm.tasks.alpaca import ALPACA
from tinylm.tasks.gsm8k import GSM8K
from tinylm.tasks.pairs import PAIRS
from tinylm.tasks.samsum import SAMSUM
from tinylm.tasks.sms import SMS
from tinylm.tasks.sst2 import SST2
from tinylm.tasks.task import Example, Task

__all__ = ["NAMED", "PAIRS", "Example", "Task"]

# The names are those of the setting data.task. PAIRS is for rows of a user's own, and so has no name on the hub.
NAMED: dict[str, Task] = {task.name: task for task in (SST2, SAMSUM, GSM8K, SMS, ALPACA)}
