"""A verifier at work, and the batches it is given: pairs of a problem and an answer (problems.py) as padded rows of ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint.load import load_verifier
from tinylm.model.verifier import Verifier
from tinylm.rows.verifier_data import JudgedPair, pair_ids, without_annotations
from tinylm.tokenizer.base import Tokenizer

# Padding is masked, so that any id does; a batch is padded to a multiple of this, so that fewer shapes are met.
LENGTH_STEP = 32


def pair_batch(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Any]:
    """`input_ids` (B, T) int64 and `attention_mask` (B, T) bool of rows of ids, padded on the right to the longest of them."""
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full(
        (len(rows), -(-longest // LENGTH_STEP) * LENGTH_STEP), pad_id, dtype=torch.long
    )
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.arange(ids.size(1)) < lengths[:, None]}


def training_batch(pairs: Sequence[JudgedPair], pad_id: int) -> dict[str, Any]:
    """`pair_batch` with `label` (B,) int64, 1 for right, and `departs` (B, T) bool."""
    batch = pair_batch([pair.ids for pair in pairs], pad_id)
    departs = torch.zeros_like(batch["attention_mask"])
    for number, pair in enumerate(pairs):
        departs[number, list(pair.departs)] = True
    return batch | {
        "label": torch.tensor([int(pair.right) for pair in pairs], dtype=torch.long),
        "departs": departs,
    }


@dataclass(frozen=True)
class Judge:
    """A verifier at work."""

    model: Verifier
    """in evaluation mode"""
    tokenizer: Tokenizer
    seq_len: int
    """tokens of a pair that it was trained on"""

    @classmethod
    def load(cls, path: Path, device: str) -> "Judge":
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
                self.tokenizer.encode(without_annotations(answer).strip()),
                self.tokenizer,
                self.seq_len,
            )
            for answer in answers
        ]
        batch = pair_batch(rows, self.tokenizer.pad_id)
        return torch.sigmoid(
            self.model(batch["input_ids"].to(device), batch["attention_mask"].to(device))
        ).tolist()
