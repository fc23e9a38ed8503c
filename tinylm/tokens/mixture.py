"""What a run reads: the token files of its sources, one or several with weights, and which of them each row comes from.

    data.dataset or data.mix ─▶ a token file a source, made where it is missing        `training_files`, `validation_file`
    (seed, place of a row in the run) ─▶ the source, and which of its rows it is       `Allocation`

Each source of a mixture has rows of its own and goes through them pass after pass; the weights say how many of the run's
rows come from it, not how many tokens it has. This file knows nothing of batches.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, compress, zip_longest
from typing import Any

import numpy as np

from tinylm.common.errors import UserError, printable, rename_settings
from tinylm.common.processes import Progress
from tinylm.config.schema import DataConfig
from tinylm.text.sources import Source, is_token_file
from tinylm.text.splits import Split, find_split, mix_parts
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.encode import cached_token_file, notes_on_text
from tinylm.tokens.packing import count_rows, row_at
from tinylm.tokens.row_order import MIXTURE, RowOrder
from tinylm.tokens.token_file import Shared, TokenFile, shared_documents

# Rows that are dealt to the sources together: enough to mix a batch well.
BLOCK_ROWS = 1024


# --- which rows come from which source --------------------------------------------------------------------------------


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """The weights divided by their sum, exactly.

    >>> [str(share) for share in shares_of([0.3, 0.1])]
    ['3/4', '1/4']
    """
    exact = [
        Fraction(str(weight)) for weight in weights
    ]  # 0.1 is a tenth, and not the binary number next to it
    return [weight / sum(exact) for weight in exact]


class Allocation:
    """Which source the row at a place of the run comes from, and which of that source's rows it is, from (seed, place) alone.

    Rows are dealt in blocks. With W the share of the sources up to one of them, and V that of those before it, this one has
    floor(W n) - floor(V n) of the first n rows: at each border of blocks the counts add up to n, and none is a whole row from
    its share. Within a block the order of the sources is a permutation by (seed, block), and a source's rows keep theirs.

    >>> allocation = Allocation([3, 1], seed=1)
    >>> [allocation.counts(n) for n in (4, 6, 4096)]
    [[3, 1], [4, 2], [3072, 1024]]
    """

    def __init__(self, weights: Sequence[float], seed: int):
        shares = shares_of(weights)
        self.bounds, self.seed = list(accumulate(shares)), seed
        # With at least one row of each source a block, no count can fall from one block to the next.
        self.block_rows = max(BLOCK_ROWS, math.ceil(1 / min(shares)))
        self._block: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0), np.empty(0))

    def row(self, place: int) -> tuple[int, int]:
        """The source of the row at `place`, and its number among the rows that the run takes from there."""
        block, offset = divmod(place, self.block_rows)
        if self._block[0] != block:
            self._block = (block, *self._deal(block))
        return int(self._block[1][offset]), int(self._block[2][offset])

    def counts(self, n: int) -> list[int]:
        """How many of the first `n` rows come from each source, where `n` ends a block."""
        ends = [math.floor(bound * n) for bound in self.bounds]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of the rows of a block, and their numbers."""
        before, after = (
            self.counts(block * self.block_rows),
            self.counts((block + 1) * self.block_rows),
        )
        in_turn = np.repeat(np.arange(len(before)), np.subtract(after, before))
        sources = np.random.default_rng((self.seed, MIXTURE, block)).permutation(in_turn)
        numbers = np.empty(self.block_rows, dtype=np.int64)
        for source, (start, stop) in enumerate(zip(before, after, strict=True)):
            numbers[sources == source] = np.arange(start, stop)
        return sources, numbers


def mixture_row(allocation: Allocation, orders: Sequence[RowOrder], place: int) -> tuple[int, int]:
    """The source at a place of the run, and the row of that source: each source has an order of its own."""
    source, number = allocation.row(place)
    return source, orders[source](number)


@dataclass(frozen=True)
class TokenRows:
    """The rows of a token file: row i starts at token i * stride.

    A worker process reopens the file, so its tokens are never copied.
    """

    file: "TokenFile | Joined"
    seq_len: int
    stride: int
    pad_id: int

    def __len__(self) -> int:
        return count_rows(len(self.file), self.seq_len, self.stride)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Inputs and labels (T,) int64, and the first token."""
        start = number * self.stride
        return *row_at(self.file.tokens, start, self.seq_len, self.pad_id), start


@dataclass(frozen=True)
class MixtureRows:
    """The rows of several sources, by (source, row)."""

    sources: Sequence[TokenRows]

    def __getitem__(self, number: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, Any]:
        """As of the source; in a mixture the first token has the number of its source before it."""
        source, row = number
        inputs, labels, start = self.sources[source][row]
        return inputs, labels, start if len(self.sources) == 1 else (source, start)


# --- the token files of a run -----------------------------------------------------------------------------------------


def weights_of(data: DataConfig) -> list[float]:
    """The weights of the sources as the settings have them; one source has them all."""
    return [1.0] if data.mix is None else [part.weight for part in data.mix]


def name_of(data: DataConfig) -> str:
    """What a message calls the data of a run."""
    if data.mix is None:
        return printable(data.dataset)
    shares = shares_of(weights_of(data))
    return "mix of " + ", ".join(
        f"{printable(part.dataset)} ({float(share):.1%})"
        for part, share in zip(data.mix, shares, strict=True)
    )


def _naming(data: DataConfig, number: int) -> AbstractContextManager[None]:
    """Turns what an error says of data.dataset, when a source of a mixture is read as the data of a run, into the setting that named it."""
    return (
        nullcontext()
        if data.mix is None
        else rename_settings({"data.dataset": f"data.mix[{number}].dataset"})
    )


def training_files(
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    *,
    needed: int,
    progress: Progress | None = None,
) -> tuple[TokenFile, ...]:
    """The training tokens of each source.

    Raises:
        UserError: as `cached_token_file`, or a source has fewer than `needed` tokens.
    """
    files = []
    for number, part in enumerate(mix_parts(data)):
        with _naming(data, number):
            files.append(cached_token_file(part, "train", tokenizer, seed, progress=progress))
            if len(files[-1]) < needed:
                found = f"{printable(part.dataset)} gives {len(files[-1])} training tokens"
                raise UserError(
                    f"data.dataset: {found}, and one row of training.seq_len needs {needed}. Give more text or lower training.seq_len."
                )
    return tuple(files)


@dataclass(frozen=True)
class Joined:
    """Token files read one behind the other, as if they were one."""

    files: tuple[TokenFile, ...]

    def __len__(self) -> int:
        return sum(len(file) for file in self.files)

    @property
    def tokens(self) -> "JoinedTokens":
        """The tokens of all of them."""
        return JoinedTokens(tuple(file.tokens for file in self.files))

    @property
    def fingerprint(self) -> str:
        """12 hex digits that identify the tokens."""
        return hashlib.sha256(
            " ".join(file.fingerprint for file in self.files).encode()
        ).hexdigest()[:12]


@dataclass(frozen=True)
class JoinedTokens:
    """Arrays (N,) that are sliced as if they were one; a slice is read, the whole never is.

    >>> JoinedTokens((np.arange(3), np.arange(10, 13)))[1:5].tolist()
    [1, 2, 10, 11]
    """

    parts: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, places: slice) -> np.ndarray:
        start, stop, step = places.indices(len(self))
        if step != 1:
            raise ValueError(f"a step of {step}: joined tokens are read as they stand")
        starts = accumulate(map(len, self.parts[:-1]), initial=0)
        return np.concatenate(
            [
                part[max(start - first, 0) : max(stop - first, 0)]
                for first, part in zip(starts, self.parts, strict=True)
            ]
        )


def validation_file(
    data: DataConfig, tokenizer: Tokenizer, seed: int, *, progress: Progress | None = None
) -> TokenFile | Joined:
    """The validation tokens: those of data.val_dataset, or what is held out of each source, one behind the other.

    So a source has as much of val_loss as it has tokens, whatever its weight.
    """
    parts = list(enumerate(mix_parts(data)))
    if (
        data.val_dataset is not None
    ):  # the same for all of them; the settings for its text are those of a source that is text
        parts = sorted(parts, key=lambda part: is_token_file(part[1].dataset))[:1]
    files = []
    for number, part in parts:
        with _naming(data, number):
            files.append(cached_token_file(part, "val", tokenizer, seed, progress=progress))
    return files[0] if len(files) == 1 else Joined(tuple(files))


def shared_in_token_files(
    data: DataConfig, train: Sequence[TokenFile], val: TokenFile | Joined
) -> Shared:
    """`shared_documents` of the token files that the settings name on both sides; their texts are `corpus.shared_documents`' business."""
    vals = val.files if isinstance(val, Joined) else (val,)
    parts = [is_token_file(part.dataset) for part in mix_parts(data)]
    given = parts if data.val_dataset is None else [is_token_file(data.val_dataset)]
    sides = [list(compress(files, named)) for files, named in ((train, parts), (vals, given))]
    return shared_documents(*sides) if all(sides) else Shared(0, 0)


def notes_on_texts(
    data: DataConfig, train: Sequence[TokenFile], val: TokenFile | Joined, tokenizer: Tokenizer
) -> list[str]:
    """What a user should know of the texts that were encoded for a run, a line each; token files that the settings name were not."""
    made = [(part.dataset, file) for part, file in zip(mix_parts(data), train, strict=False)]
    if (
        data.val_dataset is not None or not train
    ):  # or else it was divided, and encoded, as the training text was
        made += [
            (data.val_dataset or data.dataset, file)
            for file in (val.files if isinstance(val, Joined) else (val,))
        ]
    texts = [(name, file) for name, file in made if not is_token_file(name)]
    return [
        note
        for name, file in texts
        for note in notes_on_text(
            name, file, tokenizer, data.document_separator, "data.document_separator"
        )
    ]


def training_fingerprint(data: DataConfig, files: Sequence[TokenFile]) -> str:
    """What identifies the training tokens of a run; of a mixture also in which shares they are mixed.

    Shares, and not weights: with 2 and 1 in place of 20 and 10 the rows of the run are the same.
    """
    if data.mix is None:
        return files[0].fingerprint
    return " + ".join(
        f"{share} {file.fingerprint}"
        for share, file in zip(shares_of(weights_of(data)), files, strict=True)
    )


# --- what tokenizers learn from ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixture:
    """The documents of several sources, one of each in turn, so that the first few are of all of them; weights do not count."""

    sources: tuple[Source, ...]

    @property
    def name(self) -> str:
        return ", ".join(source.name for source in self.sources)

    def documents(self) -> Iterator[str]:
        """Every document that is not blank."""
        for turn in zip_longest(*(source.documents() for source in self.sources)):
            yield from (text for text in turn if text is not None)

    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the sources."""
        return hashlib.sha256(
            " ".join(source.fingerprint() for source in self.sources).encode()
        ).hexdigest()


def training_split(data: DataConfig, seed: int) -> Split:
    """The training documents of all sources; raises as `find_split` does."""
    splits = []
    for number, part in enumerate(mix_parts(data)):
        with _naming(data, number):
            splits.append(find_split(part, "train", seed))
    if data.mix is None:
        return splits[0]
    return Split(
        "train", Mixture(tuple(split.source for split in splits)), splits[0].held_out, None
    )
