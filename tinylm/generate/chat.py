"""A conversation with a model that was taught to answer: what was said so far, as a prompt that fits the context.

Knows nothing of terminals and pages: `infer.py --chat` and others show what an `Engine` makes of the prompts.
"""

from dataclasses import dataclass, field

from tinylm.generate.engine import Engine, Prompt
from tinylm.rows.conversation import Conversation, Turn
from tinylm.rows.templates import Template

# At least this share of the context is kept free for an answer, unless fewer tokens are wanted.
ROOM_FOR_ANSWER = 0.5


@dataclass(frozen=True)
class Question:
    """A question with what was said before it."""

    turn: Turn
    prompt: Prompt
    forgotten: int
    """exchanges that were dropped for it, the oldest first"""


@dataclass
class Chat:
    """The turns of a conversation; a question becomes one of them when it is answered."""

    engine: Engine
    template: Template
    max_new_tokens: int
    system: str | None = None
    exchanges: list[tuple[Turn, Turn]] = field(default_factory=list)
    """questions and answers that are remembered"""

    def ask(self, text: str) -> Question:
        """The prompt that asks for an answer to `text`; the oldest exchanges are forgotten where they leave no room for one.

        Raises:
            UserError: the template cannot write these turns, or the tokenizer a text; nothing is forgotten then.
        """
        turn = Turn("user", text)
        context = self.engine.model.config.max_seq_len
        room = context - min(self.max_new_tokens, int(context * ROOM_FOR_ANSWER))
        for start in range(len(self.exchanges) + 1):
            ids = self.template.prompt_ids(self._turns(start, turn), self.engine.tokenizer)
            if len(ids) <= room or start == len(self.exchanges):
                break
        self.exchanges = self.exchanges[start:]
        return Question(turn, self.engine.fit_prompt(ids), start)

    def remember(self, question: Question, answer: str) -> None:
        """Add an answered question; one without an answer is not part of the conversation."""
        if answer.strip():
            self.exchanges.append((question.turn, Turn("assistant", answer.strip())))

    def forget(self) -> None:
        """Begin anew; what the system says stays."""
        self.exchanges.clear()

    def _turns(self, start: int, question: Turn) -> Conversation:
        system = () if self.system is None else (Turn("system", self.system),)
        return (
            *system,
            *(turn for exchange in self.exchanges[start:] for turn in exchange),
            question,
        )
