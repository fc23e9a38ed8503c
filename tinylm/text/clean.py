"""A corpus without what should not be trained on, and a report of what was removed and why.

    1. each document is examined, in chunks, by several processes        `examine_chunk`
       quality rules, evaluation rows in it, a digest, a MinHash signature
    2. of those that pass, the later ones of equal and of near documents `find_duplicates`
    3. the source is read again, and the rest is written                 `clean`

Reasons are asked in this order, so that a removed document never removes another. Memory holds about
50 bytes for each document and a few chunks; the signatures, 448 bytes for each document, are in a
temporary file. The result does not depend on the number of processes.
"""

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.files import atomic_path, writing
from tinylm.common.processes import in_order
from tinylm.text.contamination import NgramIndex
from tinylm.text.documents import SpanChunk, TextChunk
from tinylm.text.minhash import N_HASHES, near_duplicates, signature, similarity
from tinylm.text.quality import RULES, Measured, RuleSet, first_failure
from tinylm.text.shingles import word_hashes
from tinylm.text.sources import TextSource

EXACT, NEAR, EVALUATION = "duplicate", "near_duplicate", "evaluation_row"
# Examples of each reason in the report, and how much of their text is shown.
MAX_EXAMPLES, EXAMPLE_CHARACTERS = 5, 200
# A smaller text is examined sooner by one process.
WORTH_PROCESSES = 8 * 2**20


@dataclass(frozen=True)
class Examined:
    """A chunk after its documents were examined."""

    reasons: list[str]
    """of each document, "" for one that passes"""
    details: dict[int, str]
    """of documents that do not pass: what exactly"""
    digests: np.ndarray
    """of each text, (D,) uint64"""
    signatures: np.ndarray
    """(D, 112) uint32; zeros for documents that do not pass, or without near duplicates"""
    size: int
    error: UserError | None


@dataclass(frozen=True)
class CleanSpec:
    """What to remove."""

    rules: RuleSet = "basic"
    near: float | None = 0.8
    """similarity from which a document is a near duplicate of an earlier one; None: only equal
    ones are removed"""
    evaluation: NgramIndex | None = None


@dataclass
class Report:
    """What was kept and removed."""

    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    """documents by reason"""
    removed_characters: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    not_compared: int = 0
    """evaluation rows that are too short"""

    def add_example(self, reason: str, number: int, text: str, detail: str) -> None:
        """Show a removed document, if there are few of its reason."""
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            begin = text[:EXAMPLE_CHARACTERS]
            shown.append({"document": number + 1, "detail": detail, "text": begin})


def examine_chunk(chunk: SpanChunk | TextChunk, *, spec: CleanSpec) -> Examined:
    """The documents of a chunk, up to the first that cannot be read; each process does this."""
    rules = RULES[spec.rules]
    reasons: list[str] = []
    details: dict[int, str] = {}
    digests: list[bytes] = []
    signatures: list[np.ndarray] = []
    error = None
    try:
        for text in chunk.texts():
            number, reason = len(reasons), ""
            digests.append(hashlib.blake2b(text.encode(), digest_size=8).digest())
            made = np.zeros(N_HASHES, dtype=np.uint32)
            measured = Measured(text)
            failed = first_failure(measured, rules)
            if failed is not None:
                reason, details[number] = failed.name, failed.what
            elif spec.evaluation is not None or spec.near is not None:
                words = measured.lower_words
                hashes = word_hashes(words)
                overlap = None if spec.evaluation is None else spec.evaluation.find(words, hashes)
                if overlap is not None:
                    reason, details[number] = EVALUATION, f"{overlap.row}: {overlap.words}"
                elif spec.near is not None:
                    made = signature(hashes)
            signatures.append(made)
            reasons.append(reason)
    except UserError as problem:
        error = problem
    stacked = np.array(signatures, dtype=np.uint32).reshape(-1, N_HASHES)
    joined = np.frombuffer(b"".join(digests), dtype="<u8")
    return Examined(reasons, details, joined, stacked, chunk.size, error)


def find_duplicates(
    digests: np.ndarray, passed: np.ndarray, signatures: np.ndarray | None, near: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents to remove as duplicates, (N,), the earlier document that is kept of each, (N,),
    and whether they are equal, (N,).

    Args:
        digests: of all documents, (D,) uint64.
        passed: the numbers of those that passed the rules, ascending, (P,).
        signatures: (D, 112) uint32.
        near: see `CleanSpec`.
    """
    _, place, group = np.unique(digests[passed], return_index=True, return_inverse=True)
    first = passed[place[group]]  # the first document with the same text, (P,)
    is_equal = first != passed
    if near is not None and signatures is not None:
        different = passed[~is_equal]
        first[~is_equal] = near_duplicates(signatures, different, near)
    repeated = first != passed
    return passed[repeated], first[repeated], is_equal[repeated]


def clean(
    source: TextSource,
    out: Path,
    spec: CleanSpec,
    *,
    processes: int = 1,
    setting: str = "--out",
    on_progress: OnProgress | None = None,
) -> Report:
    """Write the documents of a source that are to be kept, as {"text": ...} in the lines of `out`.

    Args:
        source: it is read twice.
        out: a new .jsonl file, written whole or not at all.
        spec: what to remove.
        processes: that examine.
        setting: the flag that decides where `out` is, for errors.
        on_progress: called after each chunk of the first reading.

    Raises:
        UserError: a document cannot be read, `out` cannot be written, or the source has changed.
    """
    with writing(out, setting), atomic_path(out) as temporary:
        with tempfile.TemporaryFile(dir=temporary.parent) as held:
            reasons, details, digests = _examine(source, spec, held, processes, on_progress)
            passed = np.flatnonzero(np.array([not reason for reason in reasons], dtype=bool))
            held.flush()
            signatures = None
            if held.tell():
                shape = (len(reasons), N_HASHES)
                signatures = np.memmap(held, dtype=np.uint32, mode="r", shape=shape)
            numbers, first, equal = find_duplicates(digests, passed, signatures, spec.near)
            for number, is_equal in zip(numbers.tolist(), equal.tolist(), strict=True):
                reasons[number] = EXACT if is_equal else NEAR
            for number in [
                *np.flatnonzero(equal)[:MAX_EXAMPLES],
                *np.flatnonzero(~equal)[:MAX_EXAMPLES],
            ]:
                detail = f"of document {first[number] + 1}"
                if not equal[number] and signatures is not None:
                    pair = signatures[numbers[number]], signatures[first[number]]
                    detail += f", similarity {similarity(*pair):.2f}"
                details[int(numbers[number])] = detail
        report = _write(source, temporary, reasons, details)
    if spec.evaluation is not None:
        report.not_compared = spec.evaluation.n_short
    return report


def _examine(
    source: TextSource,
    spec: CleanSpec,
    held: BinaryIO,
    processes: int,
    on_progress: OnProgress | None,
) -> tuple[list[str], dict[int, str], np.ndarray]:
    """The reason, the first details and the digest of each document; signatures go to `held`."""
    reasons: list[str] = []
    details: dict[int, str] = {}
    digests = bytearray()
    counts: Counter[str] = Counter()
    done, total = 0, source.size()
    work = partial(examine_chunk, spec=spec)
    for chunk in in_order(work, source.chunks(), processes, min_size=WORTH_PROCESSES):
        if chunk.error is not None:
            raise chunk.error
        for number, detail in chunk.details.items():
            reason = chunk.reasons[number]
            counts[reason] += 1
            if counts[reason] <= MAX_EXAMPLES:
                details[len(reasons) + number] = detail
        reasons.extend(chunk.reasons)
        digests += chunk.digests.tobytes()
        if spec.near is not None:
            held.write(chunk.signatures.tobytes())
        done += chunk.size
        if on_progress is not None:
            on_progress("reading, bytes", done, total)
    return reasons, details, np.frombuffer(bytes(digests), dtype="<u8")


def _write(
    source: TextSource, path: Path, reasons: Sequence[str], details: dict[int, str]
) -> Report:
    """Write the documents without a reason."""
    report = Report()
    number = -1
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for number, text in enumerate(source.documents()):
            if number == len(reasons):
                break
            reason = reasons[number]
            report.documents += 1
            report.characters += len(text)
            if reason:
                report.removed[reason] += 1
                report.removed_characters[reason] += len(text)
                report.add_example(reason, number, text, details.get(number, ""))
            else:
                report.kept += 1
                report.kept_characters += len(text)
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    if number + 1 != len(reasons):
        problem = f"had {len(reasons)} documents when it was first read, and now has others"
        raise UserError(source.name, problem, "Clean it again, while nothing writes to it")
    return report
