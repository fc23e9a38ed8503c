"""A fine-tuned model's answers to questions of its own rows, beside the answers in the rows.

val_loss asks how probable the written answers are; this asks what a user asks: what does it answer?

    rows ─▶ read_questions ─▶ [Question] ─▶ answer_questions ─▶ [GivenAnswer]
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tinylm.checkpoint.load import Loaded
from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig, SamplingConfig
from tinylm.eval.metrics import exact_match, token_f1
from tinylm.eval.tasks.data import conversation_parser, requested_built_in_rows
from tinylm.generate.chat import format_prompt
from tinylm.generate.engine import Engine, Request
from tinylm.rows.columns import parse_conversation
from tinylm.rows.conversation import Conversation
from tinylm.rows.row_files import read_rows
from tinylm.text.sources import Which


@dataclass(frozen=True)
class Question:
    """The turns before the first answer of a row, and that answer."""

    conversation: Conversation
    expected: str

    @property
    def text(self) -> str:
        """The last turn before the answer, on one line."""
        return " ".join(self.conversation[-1].full_text.split())


@dataclass(frozen=True)
class GivenAnswer:
    """What a model answered."""

    question: Question
    text: str

    @property
    def is_exact(self) -> bool:
        """Whether it is the expected answer, letter for letter."""
        return exact_match(self.text, self.question.expected)

    @property
    def f1(self) -> float:
        """The overlap of its words with those of the expected answer, from 0 to 1."""
        return token_f1(self.text, self.question.expected)


def read_questions(data: DataConfig, which: Which, seed: int, limit: int) -> list[Question]:
    """The first `limit` questions of a split of a fine-tuning config, in the order of the rows.

    Raises:
        UserError: as `read_rows`.
    """
    built_in = requested_built_in_rows(data)
    rows = read_rows(data, which, seed, built_in)
    parse = conversation_parser(data) or (lambda row: parse_conversation(row, data))
    found = []
    for _, row in rows:
        if len(found) == limit:
            break
        try:
            question = first_question(parse(row))
        except UserError:  # counted and named where the run is trained
            continue
        if question is not None:
            found.append(question)
    return found


def first_question(conversation: Conversation) -> Question | None:
    """The first trained answer of a conversation and what is before it; None if it has none."""
    for number, turn in enumerate(conversation):
        if number and turn.role == "assistant" and turn.trained:
            return Question(conversation[:number], turn.text.strip())
    return None


def answer_questions(
    loaded: Loaded, questions: Sequence[Question], max_new_tokens: int
) -> list[GivenAnswer]:
    """The model's most probable answer to each question, in the template of its fine-tuning."""
    engine, template = Engine.of(loaded), loaded.make_template()
    assert template is not None, "a base model answers no questions"
    greedy = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0)
    requests = []
    for question in questions:
        turns = question.conversation
        system = None if turns[0].role == "system" else loaded.system
        formatted = format_prompt(engine, turns, template, system=system)
        requests.append(Request(formatted.prompt, greedy, formatted.stop_ids))
    answers = zip(questions, engine.complete(requests), strict=True)
    return [GivenAnswer(question, answer.text.strip()) for question, answer in answers]
