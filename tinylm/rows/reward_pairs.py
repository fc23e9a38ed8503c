"""What a reward model reads: whole texts, a prompt with an answer, padded on the right.

PreferencePair (preferences.py) ─▶ `collate_reward_pairs`: ids (2B, T) and lengths (2B,)
prompt and answer               ─▶ `reward_ids`: the same tokens, at scoring time
"""

from collections.abc import Sequence

import numpy as np
import torch

from tinylm.rows.conversation import Turn
from tinylm.rows.preferences import PreferencePair
from tinylm.rows.templates import Template
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import Batch


def collate_reward_pairs(
    rows: Sequence[PreferencePair | None], places: Sequence[int], *, seq_len: int, pad_id: int
) -> Batch:
    """`input_ids` (2B, seq_len) int64, the chosen answers, then the rejected ones, each after its
    prompt; `lengths` (2B,), 0 in a row of padding.
    """
    empty = np.empty(0, dtype=np.int64)
    texts = [
        empty if pair is None else pair[number].ids[:seq_len] for number in (0, 1) for pair in rows
    ]
    origin = [None if pair is None else pair.chosen.location for pair in rows]
    return {"origin": origin, **pad_texts(texts, pad_id, seq_len)}


def pad_texts(
    texts: Sequence[np.ndarray], pad_id: int, seq_len: int | None = None
) -> dict[str, torch.Tensor]:
    """`input_ids` (B, T) and `lengths` (B,) of texts of at most T = seq_len ids;
    None: the longest.
    """
    lengths = [len(text) for text in texts]
    input_ids = np.full((len(texts), seq_len or max(lengths)), pad_id, dtype=np.int64)
    for row, text in zip(input_ids, texts, strict=True):
        row[: len(text)] = text
    return {"input_ids": torch.from_numpy(input_ids), "lengths": torch.tensor(lengths)}


def reward_ids(
    prompt: str, answer: str, template: Template, tokenizer: Tokenizer, seq_len: int
) -> np.ndarray:
    """The last seq_len ids of a prompt with its answer: the end, where the reward is read, stays."""
    conversation = (Turn("user", prompt), Turn("assistant", answer))
    return template.encode(conversation, tokenizer).ids[-seq_len:]
