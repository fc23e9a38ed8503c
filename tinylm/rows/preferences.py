import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tinylm.common.errors import UserError, printable
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import _Columns, _keys_of_turn, _text, _turn, _turns_in
from tinylm.rows.conversation import Conversation, Role, Turn
from tinylm.rows.row_files import NAMED_PLACES, read_rows
from tinylm.rows.sft import _ASSISTANT, _HUMAN
from tinylm.rows.templates import Template
from tinylm.text.documents import is_blank, kind_of
from tinylm.text.splits import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import Example


class Preference(NamedTuple):
    """A question, and two answers of which the first is better."""

    prompt: Conversation
    chosen: str
    rejected: str


class PreferencePair(NamedTuple):
    """A preference as tokens: the same prompt twice, and only what is answered to it is trained."""

    chosen: Example
    rejected: Example
    reference: Sequence[float] | None = None
    """log p of both answers under the reference model, where they are known before training"""


class _Skip(Exception):
    """A row that sound data may have, and that says nothing of which answer is better; the message says what is wrong with such rows."""


def parse_preference(row: dict[str, Any], data: DataConfig) -> Preference:
    """The prompt and the two answers in a row, told by its keys; an answer that is null is empty.

    Raises:
        UserError: naming the key and what is wrong.
    """
    columns = _Columns(row, data.columns or {})
    (chosen_name, chosen), (rejected_name, rejected) = (
        columns.value("chosen"),
        columns.value("rejected"),
    )
    if isinstance(chosen, list) or isinstance(rejected, list):
        told, better = _told_and_answer(chosen_name, chosen)
        other, worse = _told_and_answer(rejected_name, rejected)
        if told != other:
            raise _Skip("conversations that part before the last answer")
        return Preference(told or _prompt_of(columns), better, worse)
    better, worse = _answer(chosen_name, chosen), _answer(rejected_name, rejected)
    if columns.find("instruction") is None and columns.find("prompt") is None:
        return _of_dialogues(better, worse)
    return Preference(_prompt_of(columns), better, worse)


def _prompt_of(columns: _Columns) -> Conversation:
    """What is asked, where it stands apart from the answers."""
    if columns.find("instruction") is not None:
        return (Turn("user", columns.text("instruction"), columns.optional_text("input")),)
    name, prompt = columns.value("prompt")
    if not isinstance(prompt, list):
        return (Turn("user", _text(name, prompt)),)
    return _ends_with_question(name, _turns_in(name, prompt))


def _told_and_answer(name: str, items: Any) -> tuple[Conversation, str]:
    """The turns of a list before its last, and the text of that, which is the assistant's and may be empty."""
    if not isinstance(items, list) or not items:
        found = "no turn" if items == [] else kind_of(items)
        raise UserError(
            f"{printable(name)}: expected a list of turns, found {found}. Write both answers as text, or both as lists of turns."
        )
    where = f"{printable(name)}[{len(items) - 1}]"
    last = items[-1]
    text_key = _keys_of_turn(last)[1] if isinstance(last, dict) else ""
    empty = isinstance(last, dict) and (last.get(text_key) is None or is_blank(str(last[text_key])))
    answer = _turn({**last, text_key: "-"} if empty else last, where)
    if answer.role != "assistant":
        raise UserError(
            f"{where}.role: the last turn is the {answer.role}'s, and it should be an answer. Add it, or take the row out."
        )
    told = _turns_in(name, items[:-1])
    return (_ends_with_question(name, told) if told else told), "" if empty else answer.text


def _ends_with_question(name: str, turns: Conversation) -> Conversation:
    if not turns or turns[-1].role != "user":
        raise UserError(
            f"{printable(name)}: the answer follows on no turn of the user. Add the question, or take the row out."
        )
    return turns


def _answer(name: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(
            f"{printable(name)}: expected a string, found {kind_of(value)}. Correct the row, or take it out."
        )
    return value or ""


def _of_dialogues(chosen: str, rejected: str) -> Preference:
    r"""What two dialogues have in common up to an answer, and how each goes on.

    >>> _of_dialogues("\n\nHuman: 2+2?\n\nAssistant: 4", "\n\nHuman: 2+2?\n\nAssistant: 5").chosen
    '4'
    """
    common = len(os.path.commonprefix([chosen, rejected]))
    start = chosen.rfind(_ASSISTANT, 0, common)
    if start < 0:
        form = '"\\n\\nHuman: ...\\n\\nAssistant: ..."'
        raise UserError(
            f"chosen, rejected: no prompt beside them, and as dialogues ({form}) they have no question in common. Add prompt, or correct the row."
        )
    start += len(_ASSISTANT)
    if _HUMAN in chosen[start:] or _HUMAN in rejected[start:]:
        raise _Skip("conversations that part before the last answer")
    prompt = _turns_of_dialogue(chosen[: start - len(_ASSISTANT)])
    return Preference(
        _ends_with_question("chosen", prompt), chosen[start:].strip(), rejected[start:].strip()
    )


def _turns_of_dialogue(text: str) -> Conversation:
    """The turns of a dialogue; several of one side in a row are one."""
    turns: list[Turn] = []
    for piece in text.replace(_ASSISTANT, f"{_HUMAN}{_ASSISTANT}").split(_HUMAN)[1:]:
        role: Role = "assistant" if piece.startswith(_ASSISTANT) else "user"
        said = piece.removeprefix(_ASSISTANT).strip()
        if said and turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n\n{said}")
        elif said:
            turns.append(Turn(role, said))
    return tuple(turns)


@dataclass
class PairReport:
    """What became of the preference rows of a split."""

    which: Which
    seq_len: int
    kept: int = 0
    cut: int = 0
    """of those kept, in how many an answer lost its end"""
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """what is wrong with rows that were left out: where they stand"""

    @property
    def name(self) -> str:
        """The split in words."""
        return "validation" if self.which == "val" else "training"

    @property
    def skipped_rows(self) -> str:
        """The skipped rows in words."""
        named = {
            why: places[:NAMED_PLACES] + ["..."] * (len(places) > NAMED_PLACES)
            for why, places in self.skipped.items()
        }
        return ", ".join(
            f"{len(places)} rows with {why} ({', '.join(named[why])})"
            for why, places in self.skipped.items()
        )

    def notes(self) -> list[str]:
        """What a user should know of it, a line each."""
        notes = [f"warning: {self.name}: skipped {self.skipped_rows}"] if self.skipped else []
        return notes + (
            [
                f"{self.name}: in {self.cut} of {self.kept} pairs the context of {self.seq_len} tokens cut the end of an answer"
            ]
            if self.cut
            else []
        )


def build_pairs(
    data: DataConfig,
    which: Which,
    seed: int,
    template: Template,
    tokenizer: Tokenizer,
    seq_len: int,
) -> tuple[list[PreferencePair], PairReport]:
    """The preferences of a split in the order of its rows, both answers cut to seq_len inputs, and what was cut and left out.

    Rows with an empty answer, or with answers that are equal, are left out: they say nothing, and there are some in published data.

    Raises:
        UserError: as `read_rows` and `parse_preference`; or no row is left.
    """
    kept: list[PreferencePair] = []
    report = PairReport(which, seq_len)
    for place, row in read_rows(data, which, seed):
        try:
            pair = _pair(parse_preference(row, data), template, tokenizer, seq_len, place)
        except UserError as problem:
            raise UserError(f"{place}: {problem}") from None
        except _Skip as why:
            report.skipped.setdefault(str(why), []).append(place)
            continue
        report.cut += any(len(example.ids) > seq_len + 1 for example in pair[:2])
        kept.append(_cut(pair, seq_len))
    report.kept = len(kept)
    if not kept:
        mend = "Give pairs of which one answer is better, or raise training.seq_len"
        raise UserError(
            f"data.dataset: {report.name}: nothing is left without {report.skipped_rows}. {mend}."
        )
    return kept, report


def _pair(
    preference: Preference, template: Template, tokenizer: Tokenizer, seq_len: int, place: str
) -> PreferencePair:
    """The tokens of a preference, not cut yet."""
    if is_blank(preference.chosen) or is_blank(preference.rejected):
        raise _Skip("an empty answer")
    if preference.chosen == preference.rejected:
        raise _Skip("two equal answers")
    asked = len(template.prompt_ids(preference.prompt, tokenizer))
    if asked > seq_len:
        raise _Skip(f"a prompt that fills the context of {seq_len} tokens")
    examples = []
    for answer in (preference.chosen, preference.rejected):
        whole = template.encode((*preference.prompt, Turn("assistant", answer)), tokenizer)
        # Answers that were given before belong to the prompt.
        examples.append(
            Example(whole.ids, whole.trained & (np.arange(len(whole.ids)) >= asked), place)
        )
    pair = PreferencePair(*examples)
    if np.array_equal(*(example.ids[: seq_len + 1] for example in examples)):
        raise _Skip(f"answers that differ only behind the context of {seq_len} tokens")
    return pair


def _cut(pair: PreferencePair, seq_len: int) -> PreferencePair:
    """The last token of a row is only a target."""
    return PreferencePair(
        *(
            Example(example.ids[: seq_len + 1], example.trained[: seq_len + 1], example.place)
            for example in pair[:2]
        )
    )
