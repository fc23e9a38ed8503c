"""Prompts for a fine-tuned model: one question, or a conversation that fits the context.

    format_prompt   a text or conversation in the model's template, with the tokens that end its answer
    Chat            the turns so far; `ask` gives the prompt of the next question, `remember` adds its answer
    StreamingStrip  the answer without the whitespace of its template, while it is written

Knows nothing of terminals and pages: `infer.py --chat` and the server show what an `Engine`
generates from these prompts.
"""

from dataclasses import dataclass, field

from tinylm.generate.engine import Engine
from tinylm.generate.output import Prompt
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.templates import Template

# At least this share of the context is kept free for an answer, unless fewer tokens are asked for.
ROOM_FOR_ANSWER = 0.5


@dataclass(frozen=True)
class FormattedPrompt:
    """What `Engine.stream` and `Engine.generate` need to answer a question."""

    prompt: Prompt
    stop_ids: tuple[int, ...]
    """tokens that end the answer, in addition to EOS"""


def format_prompt(
    engine: Engine,
    prompt: str | Conversation,
    template: Template | None,
    *,
    system: str | None = None,
) -> FormattedPrompt:
    """The prompt as the model reads it: in the template that it was fine-tuned with,
    or as plain text.

    Args:
        prompt: a text, or a conversation that ends with a user's turn.
        template: None for a base model, which continues the text as it is.
        system: the system's turn before the first question.

    Raises:
        UserError: the template cannot format these turns, or the tokenizer cannot encode them.
    """
    if template is None:
        assert isinstance(prompt, str), "a conversation needs a template"
        return FormattedPrompt(engine.encode_prompt(prompt), ())
    conversation = (Turn("user", prompt),) if isinstance(prompt, str) else prompt
    if system is not None:
        conversation = (Turn("system", system), *conversation)
    ids = template.prompt_ids(conversation, engine.tokenizer)
    return FormattedPrompt(engine.fit_prompt(ids), template.stop_ids(engine.tokenizer))


@dataclass(frozen=True)
class Question(FormattedPrompt):
    """A question, formatted with the conversation before it."""

    turn: Turn
    n_forgotten: int
    """exchanges that were dropped to make room for it, the oldest first"""


@dataclass
class Chat:
    """The turns of a conversation; a question is added to them when it has been answered."""

    engine: Engine
    template: Template
    max_new_tokens: int
    system: str | None = None
    exchanges: list[tuple[Turn, Turn]] = field(default_factory=list)
    """the questions and answers that the model is shown again"""

    def ask(self, text: str) -> Question:
        """The prompt for an answer to `text`; the oldest exchanges are dropped
        if they leave no room for an answer.

        Raises:
            UserError: as `format_prompt`; nothing is dropped then.
        """
        turn = Turn("user", text)
        context = self.engine.model.config.max_seq_len
        room = context - min(self.max_new_tokens, int(context * ROOM_FOR_ANSWER))
        for n_forgotten in range(len(self.exchanges) + 1):
            before = (turn for exchange in self.exchanges[n_forgotten:] for turn in exchange)
            formatted = format_prompt(
                self.engine, (*before, turn), self.template, system=self.system
            )
            n_tokens = len(formatted.prompt.ids) + formatted.prompt.truncated
            if n_tokens <= room:
                break
        self.exchanges = self.exchanges[n_forgotten:]
        return Question(formatted.prompt, formatted.stop_ids, turn, n_forgotten)

    def remember(self, question: Question, answer: str) -> None:
        """Add an answered question; a question with a blank answer does not become part of the
        conversation.
        """
        if answer.strip():
            self.exchanges.append((question.turn, Turn("assistant", answer.strip())))

    def forget(self) -> None:
        """Drop all exchanges; the system's turn stays."""
        self.exchanges.clear()


class StreamingStrip:
    """`str.strip` for a text that arrives in parts.

    >>> strip = StreamingStrip()
    >>> [strip(part) for part in (" ", " red,", " ", "blue ", "")]
    ['', 'red,', '', ' blue', '']
    """

    def __init__(self) -> None:
        self._held = ""  # whitespace that is part of the text only if more text follows
        self._has_started = False

    def __call__(self, text: str) -> str:
        text = self._held + text if self._has_started else text.lstrip()
        stripped = text.rstrip()
        self._has_started = self._has_started or bool(stripped)
        self._held = text[len(stripped) :]
        return stripped
