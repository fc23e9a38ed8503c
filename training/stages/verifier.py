"""The verifier: the data module; a row is a problem with right and wrong answers."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from data import Batch, ExampleBatches, RowsInMemory, Share, ValidationExamples
from tinylm.common.errors import printable
from tinylm.config.schema import Config
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.verifier_data import (
    Problem,
    ProblemReport,
    build_verifier_examples,
    collate_pairs,
    filter_problems,
    read_problems,
)
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX


class ProblemBatches(ExampleBatches):
    """Micro-batches of problems, each with all its answers, in the order that examples have; other wrong answers in each pass."""

    split = "train"

    def __init__(self, rows: Sequence[Any], config: Config, tokenizer: Tokenizer, share: Share):
        super().__init__(rows, config, tokenizer.pad_id, share)
        assert config.verifier is not None
        self.tokenizer, self.n_wrong = tokenizer, config.verifier.n_wrong

    def __getitem__(self, k: int) -> Batch:
        places = self.share.places(k)
        rows = [self.rows[self._row(place)] for place in places]
        return self.pairs(rows, places) | {"origin": [problem.place for problem in rows]}

    def pairs(self, rows: Sequence[Problem], places: Iterable[int]) -> Batch:
        """`collate_pairs` of every answer to every problem; wrong ones are drawn by (seed, place)."""
        drawn = zip(rows, (f"{self.seed} {self.split} {place}" for place in places), strict=True)
        made = [
            pair
            for problem, seed in drawn
            for pair in build_verifier_examples(
                problem, self.tokenizer, self.seq_len, n_wrong=self.n_wrong, seed=seed
            )
        ]
        return collate_pairs(made, self.pad_id)

    def shown(self, heading: str, row: Any, place: int) -> list["InspectedRow"]:
        """Each answer; as a target counts where a wrong one differs from the right one."""
        batch = self.pairs([row], [place])
        rows = []
        for number, (ids, seen, error_mask) in enumerate(
            zip(batch["input_ids"], batch["attention_mask"], batch["error_mask"], strict=True),
            start=1,
        ):
            ids, error_mask = ids[seen], error_mask[seen]
            labels = torch.where(error_mask, ids, IGNORE_INDEX).roll(-1)
            right = "right" if batch["label"][number - 1] else "wrong"
            rows.append(
                InspectedRow(
                    f"{heading}, answer {number}, {right}: {row.place}",
                    ids.tolist(),
                    labels.tolist(),
                    None,
                )
            )
        return rows


class ValidationProblems(ProblemBatches, ValidationExamples):
    """Problems in their order, this rank's share of them; the wrong answers are the same in every validation."""

    split = "val"

    def __getitem__(self, k: int) -> Batch:
        if k >= self.n_batches:
            raise IndexError(k)  # ends a plain `for batch in batches`
        places = [place for place in self.share.places(k) if place < len(self.rows)]
        return self.pairs([self.rows[place] for place in places], places)


class VerifierData(RowsInMemory):
    """The batches of one verifier's run; a row is a problem with all its answers."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        assert config.verifier is not None
        self.n_wrong = config.verifier.n_wrong
        self.train_problems: list[Problem] = []
        self.val_problems: list[Problem] = []

    def prepare(self, answer: Callable[[list[Problem]], list[Problem]] = list) -> None:
        """Read the rows of both splits; `answer` adds what a model answers. A problem of validation is none of training.

        Raises:
            UserError: as `problems.problems` and `problems.usable`.
        """
        built_in = requested_built_in_rows(self.config.data)
        found = {
            which: read_problems(
                self.config.data,
                which,
                self.config.training.seed,
                to_conversation=conversation_parser(self.config.data),
                built_in=built_in,
            )
            for which in ("train", "val")
        }
        held_out = {problem.question for problem in found["val"]}
        apart = [problem for problem in found["train"] if problem.question not in held_out]
        shared = len(found["train"]) - len(apart)
        self.train_problems, train = self._usable(answer(apart), "train")
        self.val_problems, val = self._usable(answer(found["val"]), "val")
        self.notes = (
            [f"training: left out {shared} problems that are validation problems"] * bool(shared)
            + train.notes()
            + val.notes()
        )

    def _usable(self, found: list[Problem], which: Which) -> tuple[list[Problem], ProblemReport]:
        return filter_problems(
            found, which, self.tokenizer, self.config.training.seq_len, n_wrong=self.n_wrong
        )

    def describe(self) -> str:
        """One line on what is trained on and validated on."""
        train, val = (
            f"{len(made):,} problems with {self._n_answers(made):,} answers"
            for made in (self.train_problems, self.val_problems)
        )
        n_right = sum(
            1 + sum(sample.right for sample in problem.samples) for problem in self.train_problems
        )
        share = f"{n_right / self._n_answers(self.train_problems):.0%} of them right"
        tokenizer = (
            f"tokenizer {self.config.tokenizer.kind}, vocabulary {self.tokenizer.vocab_size}"
        )
        return f"data: {printable(self.config.data.dataset)}: train {train} ({share}), validation {val}; {tokenizer}"

    def _n_answers(self, made: list[Problem]) -> int:
        return sum(1 + self.n_wrong + len(problem.samples) for problem in made)

    def fingerprints(self) -> dict[str, str]:
        """What identifies the data: two runs with equal ones, and equal settings and tokenizers, see the same pairs."""
        return {
            "train": _fingerprint_of_problems(self.train_problems),
            "val": _fingerprint_of_problems(self.val_problems),
        }

    def train_batches(self) -> ExampleBatches:
        return ProblemBatches(self.train_problems, self.config, self.tokenizer, self._share())

    def val_batches(self) -> ExampleBatches:
        return ValidationProblems(self.val_problems, self.config, self.tokenizer, self._share())


def _fingerprint_of_problems(made: list[Problem]) -> str:
    plain = [(problem.question.full_text, problem.answer, problem.samples) for problem in made]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:12]
