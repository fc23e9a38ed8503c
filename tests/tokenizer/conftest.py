"""A text to learn from, and the same text as a file that several processes share."""

import random
from pathlib import Path

import pytest

from tinylm.text import chunks
from tinylm.tokenizer import bpe_fast

EOT = "<|endoftext|>"


def random_text(n_bytes: int, seed: int = 1) -> str:
    """A text of invented words, frequent ones and rare ones, with numbers, punctuation and letters beyond ASCII."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "en", "ör")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    ends = [".\n", ", 12 and 345\n", "!\n\n", "  \n", f"{EOT}\n"]
    pieces: list[str] = []
    size = 0
    while size < n_bytes:
        line = " ".join(draw.choices(words, weights, k=draw.randint(3, 12))) + draw.choice(ends)
        pieces.append(line)
        size += len(line.encode())
    return "".join(pieces).encode()[:n_bytes].decode("utf-8", "ignore")


@pytest.fixture(scope="session")
def small_text() -> str:
    return random_text(130_000)


@pytest.fixture
def file_in_parts(tmp_path, small_text, monkeypatch) -> Path:
    """A file with more parts than four processes, so that all of them have work."""
    monkeypatch.setattr(chunks, "PART_BYTES", 13_001)
    monkeypatch.setattr(chunks, "WINDOW_BYTES", 200)
    monkeypatch.setattr(bpe_fast, "MIN_SIZE_FOR_PROCESSES", 0)
    path = tmp_path / "parts.txt"
    path.write_text(small_text, encoding="utf-8", newline="")
    return path
