"""Training under Lightning. Read `run` first: a run from top to bottom.

`tokenizer`, `settle`, `instruments`, `loggers`, `task_scores` and `task_overlap` are imported at
their first use, as `training.tokenizer`: most runs do not need all of them.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module, postpone

# Lightning imports two classes of torchmetrics, for isinstance checks of what no run of ours has.
# torchmetrics imports scipy, matplotlib and transformers: half of the time until the first step.
postpone(
    "torchmetrics", Metric=type("Metric", (), {}), MetricCollection=type("MetricCollection", (), {})
)


def __getattr__(name: str) -> ModuleType:
    names = ("tokenizer", "settle", "instruments", "loggers", "task_scores", "task_overlap")
    return lazy_module(__name__, name, *names)
