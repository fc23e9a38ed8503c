"""Documents to rows of one length: the tokens that the model sees, and the labels that it must predict.

    N number of tokens · T positions of a row

The tokens of all documents follow each other, each document closed by EOS. A row is T + 1 of them: the first T are
inputs, the last T labels, so position t must predict token t + 1. With T = 4, documents a (3 tokens) and b (4 tokens):

    tokens           a0  a1  a2 EOS  b0  b1  b2  b3 EOS             (N,)
    row 0  inputs    a0  a1  a2 EOS                                 (T,)
           labels    a1  a2 EOS  b0                                 (T,)
    row 1  inputs                    b0  b1  b2  b3                 starts at the last label of row 0
           labels                    b1  b2  b3 EOS
    document_ids      0   0   0   1 | 0   0   0   0                 from 0 in each row; with data.document_mask

So every token but the very first is a label exactly once (with the default stride T). EOS closes a document and, as an
input, opens the next one: the first token of a document is predicted from EOS alone, which is also how sampling from an
empty prompt begins. After the last token a row is filled with padding, whose labels are IGNORE_INDEX.

Examples of fine-tuning are put into rows in example_rows.py, documents that are streamed in stream.py. Knows nothing of
text.
"""

from dataclasses import dataclass

import numpy as np

from tinylm.tokens.token_file import JoinedFiles, TokenFile

# Labels with this value are not trained; it is also the default of torch's cross entropy.
IGNORE_INDEX = -100


def count_rows(n_tokens: int, seq_len: int, stride: int) -> int:
    """The number of rows that start every `stride` tokens and together have every token but the first as a label.

    >>> count_rows(9, 4, 4), count_rows(10, 4, 4), count_rows(9, 4, 1)
    (2, 3, 5)
    """
    n_labels = n_tokens - 1
    # Row 0 has the first T labels; every other row adds `stride` of them (rounded up: the last row may be short).
    n_more = -(-(n_labels - seq_len) // stride)
    return 1 + max(0, n_more)


def row_at(
    tokens: np.ndarray, start: int, seq_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels (T,) int64 of the row that starts at `start`, padded after the last token.

    >>> [part.tolist() for part in row_at(np.array([5, 6, 7, 8]), 2, 3, pad_id=0)]
    [[7, 8, 0], [8, -100, -100]]
    """
    # one token more than inputs: the last label
    window = np.asarray(tokens[start : start + seq_len + 1], dtype=np.int64)  # (at most T + 1,)
    missing = seq_len + 1 - len(window)
    # the same tokens, padded, then shifted by one
    inputs = np.pad(window, (0, missing), constant_values=pad_id)[:-1]  # (T,)
    labels = np.pad(window, (0, missing), constant_values=IGNORE_INDEX)[1:]  # (T,)
    return inputs, labels


def document_ids(input_ids: np.ndarray, eos_id: int) -> np.ndarray:
    """The number of the document of each input (..., T): it grows by one at each EOS, which opens the next document.

    >>> document_ids(np.array([7, 7, 2, 8, 8]), eos_id=2).tolist()
    [0, 0, 1, 1, 1]
    """
    return np.cumsum(input_ids == eos_id, axis=-1)


@dataclass(frozen=True)
class TokenRows:
    """The rows of a token file: row i starts at token i * stride.

    A worker process reopens the file, so its tokens are never copied.
    """

    file: TokenFile | JoinedFiles
    seq_len: int
    stride: int
    pad_id: int

    def __len__(self) -> int:
        return count_rows(len(self.file), self.seq_len, self.stride)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Inputs and labels (T,) int64, and the first token."""
        start = number * self.stride
        return *row_at(self.file.tokens, start, self.seq_len, self.pad_id), start
