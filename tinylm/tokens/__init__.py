"""Text to tokens, and tokens to batches. Read `run_files` first: the token files of a run.

`mixture`, `overlap`, `sampled_documents`, `shared_runs`, `stream` and `workers` are imported at
their first use, as `tokens.mixture`: most runs have one source of text, as files, hold out documents
of it, score no tasks, and make batches in the process that trains.
"""

from types import ModuleType

from tinylm.common.lazy import lazy_module


def __getattr__(name: str) -> ModuleType:
    names = ("mixture", "overlap", "sampled_documents", "shared_runs", "stream", "workers")
    return lazy_module(__name__, name, *names)
