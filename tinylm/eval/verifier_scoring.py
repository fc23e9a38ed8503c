"""A verifier at work, and the batches it is given: pairs of a problem and an answer (problems.py) as padded rows of ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tinylm.checkpoint.load import load_verifier
from tinylm.model.verifier import Verifier
from tinylm.rows.verifier_data import pad_pairs, pair_ids, remove_annotations
from tinylm.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class VerifierScorer:
    """A verifier at work."""

    model: Verifier
    """in evaluation mode"""
    tokenizer: Tokenizer
    seq_len: int
    """tokens of a pair that it was trained on"""

    @classmethod
    def load(cls, path: Path, device: str) -> "VerifierScorer":
        """The verifier of a checkpoint; raises as `load_verifier`."""
        loaded = load_verifier(path, device)
        return cls(loaded.model, loaded.tokenizer, loaded.config.training.seq_len)

    @torch.inference_mode()
    def probabilities(self, problem: str, answers: Sequence[str]) -> list[float]:
        """How likely each of at least one answer is right."""
        device, asked = self.model.suspicion.weight.device, self.tokenizer.encode(problem)
        rows = [
            pair_ids(
                asked,
                self.tokenizer.encode(remove_annotations(answer).strip()),
                self.tokenizer,
                self.seq_len,
            )
            for answer in answers
        ]
        batch = pad_pairs(rows, self.tokenizer.pad_id)
        return torch.sigmoid(
            self.model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        ).tolist()
