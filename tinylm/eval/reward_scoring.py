"""A trained reward model at work, and the choice between it and a verifier where answers are scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from tinylm.checkpoint.format import read
from tinylm.checkpoint.load import LoadedRewardModel, reward_model_of, verifier_of
from tinylm.eval.verifier_scoring import VerifierScorer
from tinylm.model.reward_model import RewardModel
from tinylm.rows.reward_pairs import pad_texts, reward_ids
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import Template
from tinylm.tokenizer.base import Tokenizer

# Texts that are scored in one forward pass.
BATCH_SIZE = 32


class AnswerScorer(Protocol):
    """What --verifier names: a verifier or a reward model."""

    name: ClassVar[str]
    measure: ClassVar[str]
    """what a score is: probability or reward"""

    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The score of each answer to the prompt at the same place; higher is better."""


def load_scorer(path: Path, device: str) -> AnswerScorer:
    """The verifier or reward model of a checkpoint.

    Raises:
        UserError: it is neither; or as `format.read`.
    """
    state = read(path)
    if state["stage"] == "reward_model":
        return RewardScorer.of(reward_model_of(path, state, device))
    return VerifierScorer.of(verifier_of(path, state, device))


@dataclass(frozen=True)
class RewardScorer:
    """A reward model with its tokenizer and template."""

    name: ClassVar[str] = "reward model"
    measure: ClassVar[str] = "reward"
    model: RewardModel
    """in evaluation mode"""
    tokenizer: Tokenizer
    template: Template
    seq_len: int
    """tokens of a prompt with its answer in training"""

    @classmethod
    def of(cls, loaded: LoadedRewardModel) -> "RewardScorer":
        """With the template and the lengths that it was trained with."""
        config = loaded.config
        template = make_template(config.data.template, loaded.tokenizer, tools=config.data.tools)
        return cls(loaded.model, loaded.tokenizer, template, config.training.seq_len)

    @torch.inference_mode()
    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The reward of each answer to the prompt at the same place."""
        device = next(self.model.parameters()).device
        texts = [
            reward_ids(prompt, answer, self.template, self.tokenizer, self.seq_len)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        rewards: list[float] = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = pad_texts(texts[start : start + BATCH_SIZE], self.tokenizer.pad_id)
            found = self.model(batch["input_ids"].to(device), batch["lengths"].to(device))
            rewards += found.tolist()
        return rewards
