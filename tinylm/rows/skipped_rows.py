"""Why was my row skipped? The path of a row from file to batch, every reason to skip it,
and the report.

    1. read     row_files.read_rows             file ─▶ (location, dict); blank lines are ignored
    2. split    text.sources.is_held_out        by a hash of the row: validation (data.val_fraction)
                                                or training; at most data.train_docs or val_docs
    3. parse    columns.parse_conversation      dict ─▶ turns               sft; a task has its own
                preferences.parse_preference    dict ─▶ prompt, 2 answers   dpo
                verifier_data.parse_problem     turns ─▶ problem, answer    verifier
    4. encode   templates.Template.encode       turns ─▶ ids, and which of them are trained
    5. fit      sft.build_examples              cut to training.seq_len + 1 ids   ◀── rows are SKIPPED here,
                preferences.build_pairs         the same for both answers         for a `SkipReason`
                verifier_data.filter_problems   the start of a problem is cut; before that,
                                                training problems that are in validation are removed
    6. pack     tokens.example_rows.pack_examples      examples ─▶ rows of a batch (data.packing)
    7. collate  tokens.example_rows.collate_examples   rows ─▶ tensors; dpo and verifier: training/stages/

There are two ways to be skipped. A row with a mistake (steps 3 and 4) is an error that names file,
line and key and ends the run; with data.skip_bad_rows: N up to N such rows of a split are skipped
and named. A valid row that teaches nothing (step 5) is always skipped, counted in a `RowReport`.
The run prints its notes before it trains:

    training: kept 29 of 30 rows
    training: skipped 1 row: an answer is empty (rows.jsonl:3). Give pairs with two answers.

`finetune.py --show-rows 3` prints rows as step 7 hands them to training.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tinylm.common.errors import UserError
from tinylm.rows.conversation import Conversation
from tinylm.rows.tool_calls import calls_in
from tinylm.text.row_text import some_of
from tinylm.text.sources import NAMES, Which

# Rows named in a message; the others are counted.
MAX_NAMED_ROWS = 3


class SkipReason(Enum):
    """Why a valid row is skipped, and what a user can do about it."""

    PROMPT_TOO_LONG = (
        "the prompt fills the context of {seq_len} tokens",
        "Raise training.seq_len, or shorten the prompts",
    )
    NOTHING_TRAINED = (
        "every answer has weight 0",
        "Give rows with an answer of weight 1",
    )
    NO_ROOM_FOR_ANSWER = (
        "the prompt has more than {seq_len} tokens, which leaves no room for an answer",
        "Raise training.seq_len, lower grpo.max_new_tokens, or shorten the prompts",
    )
    # preferences
    EMPTY_ANSWER = ("an answer is empty", "Give pairs with two answers")
    EQUAL_ANSWERS = ("the two answers are equal", "Give pairs in which one answer is better")
    EQUAL_IN_CONTEXT = (
        "the two answers differ only after the context of {seq_len} tokens",
        "Raise training.seq_len",
    )
    DIFFERENT_PROMPTS = (
        "the two conversations differ before the last answer",
        "Give pairs of answers to the same prompt",
    )
    # a verifier
    ANSWER_TOO_LONG = (
        "the answer fills the context of {seq_len} tokens",
        "Raise training.seq_len, or give other rows",
    )
    NO_NUMBER = (
        "the answer has no number to change into a wrong one",
        "Set verifier.n_wrong to 0, or give other rows",
    )
    IN_VALIDATION = (
        "the same problem is in validation",
        "Give different rows for training and validation",
    )

    @property
    def fix(self) -> str:
        """What to do about it."""
        return self.value[1]

    def text(self, seq_len: int) -> str:
        """The reason as a user reads it."""
        return self.value[0].format(seq_len=seq_len)


@dataclass
class RowReport:
    """What happened to the rows of a split: kept, truncated, skipped."""

    which: Which
    seq_len: int
    source: str = ""
    """the dataset, if it is one of several"""
    kept: int = 0
    truncated: int = 0
    """rows of those kept that lost tokens to the context"""
    lost: str = "their end"
    """the part that a truncated row lost"""
    skipped: dict[SkipReason, list[str]] = field(default_factory=dict)
    """the locations of skipped rows"""
    unread_columns: dict[str, None] = field(default_factory=dict)
    """columns with a value that is in no turn, in order of appearance"""
    systems: Counter[str] = field(default_factory=Counter)
    """how often each text of a system turn occurs; "" counts rows without one"""
    calls: Counter[bool] | None = None
    """calls of data.tools in the answers, by whether the calculator has the same result; None:
    not counted"""
    max_bad: int = 0
    """data.skip_bad_rows"""
    bad: list[str] = field(default_factory=list)
    """rows with a mistake that were skipped: location and problem"""

    def count_system(self, conversation: Conversation) -> None:
        """Count the system turn of a row that is kept."""
        is_system = conversation and conversation[0].role == "system"
        self.systems[conversation[0].full_text if is_system else ""] += 1

    def count_calls(self, conversation: Conversation) -> None:
        """Count the tool calls in the answers of a row that is kept."""
        if self.calls is None:
            self.calls = Counter()
        for turn in conversation:
            if turn.role == "assistant":
                self.calls.update(call.is_right for call in calls_in(turn.text))

    @property
    def most_common_system(self) -> str | None:
        """The most common text of a system turn; None if most rows have none."""
        return most_common_system([self])

    def skip(self, reason: SkipReason, location: str) -> None:
        """Count the row at `location` as skipped."""
        self.skipped.setdefault(reason, []).append(location)

    def skip_bad(self, location: str, error: UserError) -> None:
        """Count the row at `location`, which `error` is about, as skipped;
        raise the error if there are too many.
        """
        if len(self.bad) < self.max_bad:
            self.bad.append(": ".join((location, *error.where, error.problem)))
            return
        hint = "data.skip_bad_rows=N skips up to N such rows"
        if self.max_bad:
            hint = f"data.skip_bad_rows: {self.max_bad} rows are already skipped"
        fix = f"{error.fix}. {hint}" if error.fix else hint
        raise error.within(location, fix=fix) from None

    def notes(self) -> list[str]:
        """Notes for the user, one line each."""
        split = NAMES[self.which] + (f" ({self.source})" if self.source else "")
        notes = []
        n_skipped = len(self.bad) + sum(map(len, self.skipped.values()))
        if n_skipped:
            notes.append(f"{split}: kept {self.kept} of {count_rows(self.kept + n_skipped)}")
        for reason in self.skipped:
            notes.append(f"{split}: skipped {self._text(reason)}. {reason.fix}.")
        if self.bad:
            notes.append(f"{split}: {self._bad_text()}")
        if self.unread_columns:
            names = some_of(self.unread_columns)
            notes.append(f"{split}: columns not read: {names}; data.columns names those that are")
        if self.calls is not None:
            notes.append(f"{split}: {self._calls_text(self.calls)}")
        if self.truncated:
            counts = f"{self.truncated} of {self.kept} rows"
            notes.append(
                f"{split}: {counts} lost {self.lost} to the context of {self.seq_len} tokens"
            )
        return notes

    def require_rows(self) -> None:
        """Raise a UserError if no row was kept: the loss over no targets is not a number."""
        if self.kept:
            return
        split = NAMES[self.which]
        if not self.skipped:
            problem = f"no {split} rows are left: {self._bad_text()}"
            raise UserError("data.dataset", problem, "Correct the rows, or give others")
        most = max(self.skipped, key=lambda reason: len(self.skipped[reason]))
        texts = "; ".join(self._text(reason) for reason in self.skipped)
        problem = f"no {split} rows are left: skipped {texts}"
        raise UserError("data.dataset", problem, most.fix)

    def _calls_text(self, calls: Counter[bool]) -> str:
        """How many calls there are, and how many have a result that the calculator would not give."""
        text = f"{calls.total():,} calls of the calculator"
        if not calls:
            return f"{text} in {count_rows(self.kept)}, as <<6*4=24>>: data.tools has no effect"
        return (
            f"{text}, {calls[False]:,} with another result than it gives" if calls[False] else text
        )

    def _bad_text(self) -> str:
        """The first rows with a mistake by name, the rest as a number."""
        n_more = len(self.bad) - MAX_NAMED_ROWS
        named = "; ".join(self.bad[:MAX_NAMED_ROWS]) + (
            f"; and {n_more} more" if n_more > 0 else ""
        )
        allowed = f"data.skip_bad_rows {self.max_bad}"
        return f"skipped {count_rows(len(self.bad))} with a mistake ({allowed}): {named}"

    def _text(self, reason: SkipReason) -> str:
        """How many rows were skipped for a reason, and the first of them."""
        locations = self.skipped[reason]
        return f"{count_rows(len(locations))}: {reason.text(self.seq_len)} ({list_locations(locations)})"


def most_common_system(reports: Iterable[RowReport]) -> str | None:
    """The most common text of a system turn in the rows of several sources; None if most have none."""
    systems: Counter[str] = Counter()
    for report in reports:
        systems += report.systems
    return max(systems, key=systems.__getitem__, default="") or None


def count_rows(n: int) -> str:
    return "1 row" if n == 1 else f"{n} rows"


def list_locations(locations: Sequence[str]) -> str:
    """The first locations by name, the rest as a number.

    >>> list_locations(["a.jsonl:1", "a.jsonl:2"]), list_locations(["a:1", "a:2", "a:3", "a:4", "a:5"])
    ('a.jsonl:1, a.jsonl:2', 'a:1, a:2, a:3 and 2 more')
    """
    n_more = len(locations) - MAX_NAMED_ROWS
    return ", ".join(locations[:MAX_NAMED_ROWS]) + (f" and {n_more} more" if n_more > 0 else "")
