"""A conversation: turns of a system, a user and an assistant. Knows nothing of tokens."""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
# Training stages whose models are prompted with the template of their config;
# others continue plain text.
CHAT_STAGES = ("sft", "dpo", "grpo")
# Training stages whose models score texts and cannot write any.
SCORING_STAGES = ("verifier", "reward_model")


@dataclass(frozen=True)
class Turn:
    """One message of one side."""

    role: Role
    text: str
    input: str = ""
    """what an instruction is applied to, if the data keep the two apart (Alpaca's `input`)"""
    trained: bool = True
    """False: an answer that the model sees but does not learn (OpenAI's `"weight": 0`)"""

    @property
    def full_text(self) -> str:
        """Text and input together, for templates without a separate field for the input."""
        return f"{self.text}\n\n{self.input}" if self.input else self.text


Conversation = tuple[Turn, ...]
