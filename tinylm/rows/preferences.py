r"""Preference pairs: one prompt and two answers, of which the first is better.
DPO and reward models learn from them.

    {"prompt", "chosen", "rejected"}                 the prompt is text or messages; also instruction, input
    {"chosen": [messages], "rejected": [messages]}   whole conversations that differ in their last answer
    {"chosen": "\n\nHuman: ...", "rejected": "..."}  the same as text, in the format of Anthropic's
    hh-rlhf

    row ─▶ Preference (`parse_preference`) ─▶ PreferencePair: two examples, same prompt (`build_pairs`)

    chosen     prompt ... answer A <eos>         Only the last answers are trained; earlier ones
    rejected   prompt ... answer B <eos>         belong to the prompt.
               ..........^^^^^^^^^^^^^^          . seen only, ^ trained

Rows that do not say which answer is better are skipped: skipped_rows.py has the reasons.
"""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.rows.columns import (
    CORRECT,
    Columns,
    parse_turn,
    parse_turns,
    require_text,
    turn_keys,
    with_system,
)
from tinylm.rows.conversation import Conversation, Role, Turn
from tinylm.rows.row_files import read_rows
from tinylm.rows.skipped_rows import RowReport, SkipReason
from tinylm.rows.templates import Template
from tinylm.text.row_text import is_blank, kind_of
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import Example

# How Anthropic's hh-rlhf writes its turns.
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# The columns that a row of preferences is read from.
_READ = ("chosen", "rejected", "prompt", "instruction", "input", "system")


class Preference(NamedTuple):
    """A prompt and two answers, of which the first is better."""

    prompt: Conversation
    chosen: str
    rejected: str


class PreferencePair(NamedTuple):
    """A preference as tokens: the same prompt twice, and only the answers are trained."""

    chosen: Example
    rejected: Example
    reference: Sequence[float] | None = None
    """log p of both answers under the reference model, if it was computed before training"""


class Skip(Exception):
    """Raised for a valid row that does not say which answer is better."""

    def __init__(self, reason: SkipReason):
        super().__init__(reason)
        self.reason = reason


def build_pairs(
    data: DataConfig,
    which: Which,
    seed: int,
    template: Template,
    tokenizer: Tokenizer,
    seq_len: int,
) -> tuple[list[PreferencePair], RowReport]:
    """The pairs of a split in the order of its rows, both answers cut to seq_len inputs,
    and the report.

    Rows with an empty answer or two equal ones are skipped: they teach nothing,
    and published data have some.

    Raises:
        UserError: as `read_rows` and `parse_preference`; or no row is left.
    """
    report = RowReport(which, seq_len, max_bad=data.skip_bad_rows)
    pairs: list[PreferencePair] = []
    for location, row in read_rows(data, which, seed):
        try:
            preference = parse_preference(row, data)
            report.unread_columns |= dict.fromkeys(Columns(row, data.columns or {}).unread(*_READ))
            pair = encode_preference(preference, template, tokenizer, seq_len, location)
        except UserError as error:
            report.skip_bad(location, error)
            continue
        except Skip as skip:
            report.skip(skip.reason, location)
            continue
        report.count_system(preference.prompt)
        report.truncated += any(len(example.ids) > seq_len + 1 for example in pair[:2])
        pairs.append(PreferencePair(_cut(pair.chosen, seq_len), _cut(pair.rejected, seq_len)))
    report.kept = len(pairs)
    report.require_rows()
    return pairs, report


def parse_preference(row: dict[str, Any], data: DataConfig) -> Preference:
    """The prompt and the two answers in a row, by its keys; a null answer is empty.

    Raises:
        UserError: a key is missing or its value has another type; `where` is the key.
        Skip: the conversations differ before the last answer.
    """
    columns = Columns(row, data.columns or {})
    preference = _parse_answers(columns)
    return preference._replace(prompt=with_system(columns, preference.prompt))


def _parse_answers(columns: Columns) -> Preference:
    """The prompt and the two answers, without the column `system`."""
    chosen_name, chosen = columns.value("chosen")
    rejected_name, rejected = columns.value("rejected")
    if isinstance(chosen, list) or isinstance(rejected, list):
        history, better = _history_and_answer(chosen_name, chosen)
        other_history, worse = _history_and_answer(rejected_name, rejected)
        if history != other_history:
            raise Skip(SkipReason.DIFFERENT_PROMPTS)
        return Preference(history or _prompt(columns), better, worse)
    better, worse = _answer(chosen_name, chosen), _answer(rejected_name, rejected)
    if columns.find("instruction") is None and columns.find("prompt") is None:
        return _split_dialogues(better, worse)
    return Preference(_prompt(columns), better, worse)


def encode_preference(
    preference: Preference, template: Template, tokenizer: Tokenizer, seq_len: int, location: str
) -> PreferencePair:
    """The two examples of a preference, not cut yet.

    Raises:
        Skip: within `seq_len` inputs the pair does not say which answer is better.
    """
    if is_blank(preference.chosen) or is_blank(preference.rejected):
        raise Skip(SkipReason.EMPTY_ANSWER)
    if preference.chosen == preference.rejected:
        raise Skip(SkipReason.EQUAL_ANSWERS)
    n_prompt = len(template.prompt_ids(preference.prompt, tokenizer))
    if n_prompt > seq_len:
        raise Skip(SkipReason.PROMPT_TOO_LONG)
    examples = []
    for answer in (preference.chosen, preference.rejected):
        whole = template.encode((*preference.prompt, Turn("assistant", answer)), tokenizer)
        # Earlier answers of the conversation belong to the prompt.
        trained = whole.trained & (np.arange(len(whole.ids)) >= n_prompt)
        examples.append(Example(whole.ids, trained, location))
    chosen, rejected = examples
    if np.array_equal(chosen.ids[: seq_len + 1], rejected.ids[: seq_len + 1]):
        raise Skip(SkipReason.EQUAL_IN_CONTEXT)
    return PreferencePair(chosen, rejected)


def answers_of(pairs: Sequence[PreferencePair]) -> list[Example]:
    """Both examples of each pair."""
    return [example for pair in pairs for example in (pair.chosen, pair.rejected)]


def _cut(example: Example, seq_len: int) -> Example:
    """The first seq_len + 1 ids: the last is only a target."""
    return Example(example.ids[: seq_len + 1], example.trained[: seq_len + 1], example.location)


# --- the shapes of rows ---


def _prompt(columns: Columns) -> Conversation:
    """The prompt, if it is in a column of its own."""
    if columns.find("instruction") is not None:
        return (Turn("user", columns.text("instruction"), columns.optional_text("input")),)
    name, prompt = columns.value("prompt")
    if not isinstance(prompt, list):
        return (Turn("user", require_text(name, prompt)),)
    return _require_question(name, parse_turns(name, prompt))


def _history_and_answer(name: str, items: Any) -> tuple[Conversation, str]:
    """The turns of a list before the last one, and the text of the last one,
    an answer that may be empty.
    """
    if not isinstance(items, list) or not items:
        got = "an empty list" if items == [] else kind_of(items)
        fix = "Write both answers as text, or both as lists of turns"
        raise UserError(name, f"must be a list of turns, got {got}", fix)
    where = f"{name}[{len(items) - 1}]"
    last = items[-1]
    is_empty = False
    if isinstance(last, dict):
        text_key = turn_keys(last)[1]
        is_empty = last.get(text_key) is None or is_blank(str(last[text_key]))
        if is_empty:
            last = {**last, text_key: "-"}  # parse_turn wants a text
    answer = parse_turn(last, where)
    if answer.role != "assistant":
        problem = f"the last turn must be the assistant's, got {answer.role}"
        raise UserError(f"{where}.role", problem, "Add the answer, or remove the row")
    if not answer.trained:
        problem = "must be 1, since a preference is between two last answers, got 0"
        raise UserError(f"{where}.weight", problem, CORRECT)
    history = parse_turns(name, items[:-1])
    if history:
        _require_question(name, history)
    return history, "" if is_empty else answer.text


def _require_question(name: str, turns: Conversation) -> Conversation:
    if not turns or turns[-1].role != "user":
        problem = "an answer must follow a user turn"
        raise UserError(name, problem, "Add the question, or remove the row")
    return turns


def _answer(name: str, value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise UserError(name, f"must be a string, got {kind_of(value)}", CORRECT)
    return value or ""


def _split_dialogues(chosen: str, rejected: str) -> Preference:
    r"""Two dialogues as their common prompt and their last answers.

    >>> _split_dialogues("\n\nHuman: 2+2?\n\nAssistant: 4", "\n\nHuman: 2+2?\n\nAssistant: 5").chosen
    '4'
    """
    n_common = len(os.path.commonprefix([chosen, rejected]))
    end = chosen.rfind(_ASSISTANT, 0, n_common)  # the last answer begins within what is common
    if end < 0:
        form = '"\\n\\nHuman: ...\\n\\nAssistant: ..."'
        raise UserError(
            "chosen, rejected",
            f"the row has no prompt, and as dialogues ({form}) they have no common question",
            "Add prompt, or correct the row",
        )
    start = end + len(_ASSISTANT)
    if _HUMAN in chosen[start:] or _HUMAN in rejected[start:]:
        raise Skip(SkipReason.DIFFERENT_PROMPTS)
    prompt = _require_question("chosen", _dialogue_turns(chosen[:end]))
    return Preference(prompt, chosen[start:].strip(), rejected[start:].strip())


def _dialogue_turns(text: str) -> Conversation:
    """The turns of a dialogue; consecutive turns of one side are joined."""
    turns: list[Turn] = []
    for part in text.replace(_ASSISTANT, f"{_HUMAN}{_ASSISTANT}").split(_HUMAN)[1:]:
        role: Role = "assistant" if part.startswith(_ASSISTANT) else "user"
        message = part.removeprefix(_ASSISTANT).strip()
        if not message:
            continue
        if turns and turns[-1].role == role:
            turns[-1] = Turn(role, f"{turns[-1].text}\n\n{message}")
        else:
            turns.append(Turn(role, message))
    return tuple(turns)
