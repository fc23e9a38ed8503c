"""A trained verifier at work: how probably is each answer right?"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from tinylm.checkpoint.load import LoadedVerifier, load_verifier
from tinylm.model.verifier import Verifier
from tinylm.rows.verifier_data import pad_pairs, pair_ids, remove_annotations
from tinylm.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class VerifierScorer:
    """A verifier with its tokenizer."""

    name: ClassVar[str] = "verifier"
    measure: ClassVar[str] = "probability"
    model: Verifier
    """in evaluation mode"""
    tokenizer: Tokenizer
    seq_len: int
    """tokens of a problem with its answer in training"""

    @classmethod
    def load(cls, path: Path, device: str) -> "VerifierScorer":
        """The verifier of a checkpoint; raises as `load_verifier`."""
        return cls.of(load_verifier(path, device))

    @classmethod
    def of(cls, loaded: LoadedVerifier) -> "VerifierScorer":
        """With the lengths that it was trained with."""
        return cls(loaded.model, loaded.tokenizer, loaded.config.training.seq_len)

    def probabilities(self, problem: str, answers: Sequence[str]) -> list[float]:
        """The probability that each of at least one answer to the problem is right."""
        return self.score_texts([problem] * len(answers), answers)

    @torch.inference_mode()
    def score_texts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The probability that each of at least one answer is right, to the problem at the same
        place.
        """
        rows = []
        for problem, answer in zip(prompts, answers, strict=True):
            question_ids = self.tokenizer.encode(problem)
            answer_ids = self.tokenizer.encode(remove_annotations(answer).strip())
            rows.append(pair_ids(question_ids, answer_ids, self.tokenizer, self.seq_len))
        batch = pad_pairs(rows, self.tokenizer.pad_id)
        device = next(self.model.parameters()).device
        logits = self.model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        return torch.sigmoid(logits).tolist()
