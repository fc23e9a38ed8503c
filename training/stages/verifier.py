"""The verifier: the data module; a row is a problem with right and wrong answers.

problems ─▶ row order ─▶ every answer of each problem as a pair of ids (B', T), wrong answers drawn by (seed, place)
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from data import RunData
from tinylm.common.errors import printable
from tinylm.config.schema import Config
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.verifier_data import (
    Problem,
    build_verifier_examples,
    collate_pairs,
    filter_problems,
    read_problems,
    without_validation_problems,
)
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.batches import Batch, RowDataset
from tinylm.tokens.packing import IGNORE_INDEX
from tinylm.tokens.row_order import Share


class VerifierData(RunData):
    """The batches of a verifier's run."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        assert config.verifier is not None
        self.n_wrong = config.verifier.n_wrong
        self.notes: list[str] = []
        """what the user should know about the rows, a line each"""
        self.train_problems: list[Problem] = []
        self.val_problems: list[Problem] = []

    def prepare(self, answer: Callable[[list[Problem]], list[Problem]] = list) -> None:
        """Read the rows of both splits; problems of validation are removed from training.

        Args:
            answer: adds sampled answers of a model to problems.

        Raises:
            UserError: see `read_problems` and `filter_problems`.
        """
        train_rows, val_rows = self._read("train"), self._read("val")
        seq_len = self.config.training.seq_len
        train = RowReport("train", seq_len, lost="the start of a problem")
        val = RowReport("val", seq_len, lost="the start of a problem")
        train_rows = without_validation_problems(train_rows, val_rows, train)
        self.train_problems = self._filter(answer(train_rows), train)
        self.val_problems = self._filter(answer(val_rows), val)
        self.notes = [*train.notes(), *val.notes()]

    def describe(self) -> str:
        """One line about the training and validation data."""
        n_train, n_val = self._n_answers(self.train_problems), self._n_answers(self.val_problems)
        n_right = 0
        for problem in self.train_problems:
            n_right += 1 + sum(sample.right for sample in problem.samples)
        return (
            f"data: {printable(self.config.data.dataset)}: train {len(self.train_problems):,} "
            f"problems with {n_train:,} answers ({n_right / n_train:.0%} of them right), validation "
            f"{len(self.val_problems):,} problems with {n_val:,} answers; tokenizer "
            f"{self.config.tokenizer.kind}, vocabulary {self.tokenizer.vocab_size}"
        )

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: two runs with equal fingerprints, settings and tokenizers see the same pairs."""
        return {
            "train": fingerprint_of_problems(self.train_problems),
            "val": fingerprint_of_problems(self.val_problems),
        }

    def train_dataset(self, share: Share | None = None) -> RowDataset:
        return self.training_rows(self.train_problems, self.collate("train"), share)

    def val_dataset(self, share: Share | None = None) -> RowDataset:
        """The wrong answers are the same in every validation."""
        return self.validation_rows(self.val_problems, self.collate("val"), share)

    def collate(self, which: Which) -> "partial[Batch]":
        """`collate_problems` with the settings of the run."""
        return partial(
            collate_problems,
            tokenizer=self.tokenizer,
            seq_len=self.config.training.seq_len,
            n_wrong=self.n_wrong,
            seed=f"{self.config.training.seed} {which}",
        )

    def inspect_row(self, heading: str, row: Problem, place: int) -> Iterator[InspectedRow]:
        """Each answer to print; the labels mark where a wrong answer differs from the right one."""
        batch = self.collate("train")([row], [place])
        for number, seen in enumerate(batch["attention_mask"]):
            ids, errors = batch["input_ids"][number][seen], batch["error_mask"][number][seen]
            labels = torch.where(errors, ids, IGNORE_INDEX).roll(-1)
            right = "right" if batch["label"][number] else "wrong"
            name = f"{heading}, answer {number + 1}, {right}: {row.place}"
            yield InspectedRow(name, ids.tolist(), labels.tolist(), None)

    def _read(self, which: Which) -> list[Problem]:
        data = self.config.data
        return read_problems(
            data,
            which,
            self.config.training.seed,
            to_conversation=conversation_parser(data),
            built_in=requested_built_in_rows(data),
        )

    def _filter(self, problems: list[Problem], report: RowReport) -> list[Problem]:
        return filter_problems(problems, report, self.tokenizer, n_wrong=self.n_wrong)

    def _n_answers(self, problems: list[Problem]) -> int:
        return sum(1 + self.n_wrong + len(problem.samples) for problem in problems)


def collate_problems(
    rows: Sequence[Problem | None],
    places: Sequence[int],
    *,
    tokenizer: Tokenizer,
    seq_len: int,
    n_wrong: int,
    seed: str,
) -> Batch:
    """`collate_pairs` of every answer to every problem; no pairs where there is only padding.

    Args:
        rows: the problems.
        places: their places in the run, which also decide the wrong answers: each pass has other ones.
        tokenizer: encodes problems and answers.
        seq_len: tokens of the longest pair.
        n_wrong: wrong answers of each problem.
        seed: the rest of what the wrong answers depend on.
    """
    pairs = []
    origin = []
    for problem, place in zip(rows, places, strict=True):
        if problem is None:
            continue
        origin.append(problem.place)
        pairs += build_verifier_examples(
            problem, tokenizer, seq_len, n_wrong=n_wrong, seed=f"{seed} {place}"
        )
    return collate_pairs(pairs, tokenizer.pad_id) | {"origin": origin}


def fingerprint_of_problems(problems: Sequence[Problem]) -> str:
    """12 hex digits that identify problems and their answers, in their order."""
    plain = [(problem.question.full_text, problem.answer, problem.samples) for problem in problems]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]
