"""Rows of training.eval_tasks that a run trains on, found before the first step.

    rows of a task ─▶ their runs of 13 words ─▶ searched for in the training documents ─▶ a warning for each task

The comparison is that of `data clean --against` (tinylm/text/contamination.py). Bounded: documents of
at most 2^22 tokens together are read, evenly chosen, which takes some seconds of one core; memory is 16
bytes for each word of the rows. The rows that a run holds out are compared by its stage.
"""

import glob
import os
import shlex
from dataclasses import dataclass, field

from data import RunData
from tinylm.config.schema import SMOKE, Config, DataConfig
from tinylm.eval.tasks.data import evaluation_texts
from tinylm.text.contamination import NgramIndex, Overlap, ngram_index
from tinylm.text.shingles import word_hashes, words_of
from tinylm.text.sources import TOKEN_FILES
from training.task_scores import VALIDATION, TaskScores

MOST_TOKENS = 2**22


@dataclass
class FoundRows:
    """The rows of a task that are in the training text."""

    index: NgramIndex
    rows: set[str] = field(default_factory=set)
    """where they are"""
    example: Overlap | None = None
    location: str = ""
    """the training document of the example"""


def notes_on_tasks(config: Config, stage: str, scores: TaskScores, data: RunData) -> list[str]:
    """A warning for each task with rows in the training text.

    Args:
        config: the settings; training.eval_tasks names the tasks and their files.
        stage: of the run; only pretraining reads documents, which `data clean` can remove.
        scores: the rows of the tasks.
        data: prepared.
    """
    found: dict[str, FoundRows] = {}
    n_rows: dict[str, int] = {}
    named = zip((config.training.eval_tasks or {}).items(), scores.tasks, strict=True)
    for (name, source), (_, examples) in named:
        if source not in (VALIDATION, SMOKE):
            found[name] = FoundRows(ngram_index(evaluation_texts(examples)))
            n_rows[name] = len(examples)
    read = read_part(*find_rows(found, data)) if found else ""
    notes = []
    for name, task in found.items():
        if task.example is None:
            continue
        n_short = n_rows[name] - len({*task.index.names})
        short = f" ({n_short:,} too short to compare)" if n_short else ""
        notes.append(
            f"warning: {len(task.rows)} of {n_rows[name]} rows{short} of training.eval_tasks.{name} are in "
            f"the training text{read}, for example {task.example.row} in {task.location}: "
            f'"{task.example.words}"; scores look better than they are. {fix_of(config, stage, name)}'
        )
    return notes


def find_rows(found: dict[str, FoundRows], data: RunData) -> tuple[int, bool]:
    """Search the training documents for the rows of each task. Returns n: every n-th document was
    read; and whether a single document was, and only its first MOST_TOKENS.
    """
    tokenizer = data.tokenizer
    token_bytes = [tokenizer.token_bytes(id) for id in range(tokenizer.vocab_size)]
    sample_interval, documents = data.sampled_documents(MOST_TOKENS)
    is_cut = False
    for location, ids in documents:
        is_cut |= len(ids) > MOST_TOKENS
        ids = ids[:MOST_TOKENS]
        text = b"".join([token_bytes[id] for id in ids.tolist()]).decode("utf-8", "replace")
        words = words_of(text)
        hashes = word_hashes(words)
        for task in found.values():
            task.rows |= task.index.rows_in(hashes)
            if task.rows and task.example is None:
                task.example, task.location = task.index.find(words, hashes), location
    return sample_interval, is_cut


def read_part(sample_interval: int, is_cut: bool) -> str:
    """Which part of the training text was read, for the warning; "": all."""
    if is_cut:
        return f" (only the first {MOST_TOKENS:,} tokens of one document were read)"
    return "" if sample_interval == 1 else f" (1 of {sample_interval} documents was read)"


def fix_of(config: Config, stage: str, name: str) -> str:
    """What removes the rows of a task from the training text."""
    data, training = config.data, config.training
    sources = [data.dataset] if data.mix is None else [part.dataset for part in data.mix]
    if stage != "pretrain":
        return f"Remove such rows from {', '.join(sources)}"
    assert training.eval_tasks is not None
    words = ["python", "-m", "tinylm", "data", "clean", "--data"]
    words += [_as_argument(source, data) for source in sources]
    words += ["--out", "clean.jsonl", "--against", f"{name}={training.eval_tasks[name]}"]
    if data.text_field != "text":
        words += ["--text-field", data.text_field]
    if data.document_separator is not None:
        words += ["--separator", data.document_separator]
    return f"To remove them: {shlex.join(words)}"


def _as_argument(source: str, data: DataConfig) -> str:
    """A source of a run as --data names it; TEXT for tokens, which cannot be cleaned."""
    if source.endswith(TOKEN_FILES):
        return "TEXT"
    if os.path.lexists(source) or glob.has_magic(source):
        return source
    return f"hf:{source}:{data.dataset_config or ''}:{data.split}"
