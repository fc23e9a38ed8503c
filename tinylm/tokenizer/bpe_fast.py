r"""Byte-pair encoding from scratch: which byte strings become tokens is learned from how often they stand in a text.

    1. words     text ─▶ words, never across a special token ─▶ {word: how often}                    `count_jobs`
    2. merges    the pair of neighbours that is most frequent becomes a token; again and again       `learn_merges`, `merge_pairs`
    3. files     vocab.json, merges.txt, tokenizer.json, tokenizer_config.json                       `Bpe`

The method is Sennrich et al. 2016 on bytes (Radford et al. 2019): the 256 bytes are the first tokens, so that every text can
be written. Four words are enough to see it. In `low low low lower` the pair `l o` stands four times, as does `o w`; of equally
frequent pairs the greatest in the order of bytes wins, here `o w`. Now `l ow` stands four times:

>>> learn_merges({"low": 3, "lower": 1}, 3)
[(b'o', b'w'), (b'l', b'ow'), (b'low', b'e')]

The rest of the file is about doing this fast on a large text. Pairs are counted in distinct words, each as often as it
stands in the text; words are counted by several processes; and a merge touches the places of its pair, nothing else. The
result depends on the text alone, never on the number of processes. Encoding with the result is tokenizer.py's work.
"""

import hashlib
import heapq
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from tinylm.common.errors import UserError, printable, writing
from tinylm.common.processes import Progress, in_order
from tinylm.config.schema import COUNT_LIMIT, DataConfig, TokenizerConfig
from tinylm.text.chunks import RawChunk, TextChunk, limit_processes, text_chunks
from tinylm.text.source_chunks import word_chunks
from tinylm.text.sources import HubDataset, Source
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import make_tokenizer
from tinylm.tokenizer.hf import WELL_KNOWN_EOS, load_hf_tokenizer
from tinylm.tokenizer.pretokenize import BYTE_OF_CHARACTER, PATTERNS, CountWords, Rules
from tinylm.tokens.mixture import training_split

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


WELL_KNOWN_PAD = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
CHARACTER_OF_BYTE = {byte[0]: character for character, byte in BYTE_OF_CHARACTER.items()}

# A smaller text is counted before a process for it has started (half a second; 10 MB take one core 0.8 s).
WORTH_PROCESSES = 2**24
VERSION = 1


# --- step 1: words ----------------------------------------------------------------------------------------------------


def count_jobs(
    jobs: Iterable[RawChunk | TextChunk],
    rules: Rules,
    *,
    processes: int = 1,
    progress: Progress | None = None,
) -> Counter[str]:
    """The words of all jobs, counted by `processes`, or by this one alone where the text is small.

    Raises:
        UserError: a file cannot be read or is not UTF-8, a process was killed, or there is no word at all.
    """
    jobs, processes = limit_processes(jobs, processes, WORTH_PROCESSES)
    total, done = Counter[str](), 0
    for size, words in in_order(CountWords(rules), jobs, processes):
        total.update(words)
        done += size
        if progress is not None:
            progress("bytes", done, 0)
    if not total:
        raise UserError(
            "the text has no words, so nothing can be learned from it. Give a file with text."
        )
    return total


# --- step 2: merges ---------------------------------------------------------------------------------------------------

# In `Words.tokens`: between words, and where a token began that is now inside a longer one.
NONE = -1
# A byte that UTF-8 never has.
BETWEEN = 0xFF
# Only pairs at most so many times rarer than the most frequent one are held in memory, until that one is rarer than they are.
RARER = 16
# The table is searched for pairs in so many steps, so that each needs little memory.
STEPS = 8


class Words:
    """All distinct words behind each other, as tokens that grow.

    `low` and `lower` after the merge `o w`, with 256 for the new token; a token is named at its first and at its last byte,
    so that both of its neighbours find it:

        tokens   . l 256 256 . l 256 256 e r .           (. is NONE)
        begins     1   1       1   1     1 1             (where a token begins)
        counts   0 3   3   3 3 1   1   1 1 1 1           (how often the word stands in the text)

    Positions are indices into these arrays. A pair is at the position of its left token.
    """

    def __init__(self, words: Mapping[str, int], vocab_size: int):
        raw = bytearray((BETWEEN,))
        for word in words:
            raw += word.encode()
            raw.append(BETWEEN)
        self.tokens = np.frombuffer(raw, dtype=np.uint8).astype(np.int32)
        self.begins = self.tokens != BETWEEN
        borders = np.flatnonzero(~self.begins)
        self.tokens[borders] = NONE
        counts = np.fromiter(words.values(), dtype=np.int64, count=len(words))
        counts = counts.astype(np.min_scalar_type(counts.max(initial=0)))
        self.counts = np.concatenate([counts[:1], np.repeat(counts, np.diff(borders))])
        # Each merge takes a token away, so that there are fewer new ones than bytes, whatever was asked for.
        self.sizes = np.ones(min(vocab_size, 256 + len(raw)), dtype=np.int32)
        """bytes of each token"""

    def pairs(self, least: int = 1) -> Iterator["Pair"]:
        """The pairs that stand in the text `least` times or more."""
        n = len(self.sizes)
        for step in range(STEPS):
            places = np.flatnonzero(self.begins & (self.tokens % STEPS == step)).astype(np.int32)
            left = self.tokens[places]
            right = self.tokens[places + self.sizes[left]]
            inside = right != NONE
            yield from (
                Pair(*divmod(key, n), count, positions)
                for key, count, positions in self._grouped(
                    left[inside] * np.int64(n) + right[inside], places[inside], least
                )
            )

    def still_there(self, pair: "Pair") -> "Pair":
        """The pair at the positions where later merges left it, with its count now.

        A position where a merge took one of its tokens can never hold the same pair again: a longer token begins there, or
        none.
        """
        places = pair.positions
        places = places[
            (self.tokens[places] == pair.left)
            & (self.tokens[places + self.sizes[pair.left]] == pair.right)
        ]
        return Pair(pair.left, pair.right, self._count(places), places)

    def merge(self, pair: "Pair", new: int, least: int) -> Iterator["Pair"]:
        """Write the token `new` wherever `pair` is; the pairs that come to be and stand in the text `least` times.

        Each of them has `new` on one side or on both.
        """
        tokens, left_size = self.tokens, self.sizes[pair.left]
        self.sizes[new] = left_size + self.sizes[pair.right]
        starts = (
            _without_overlaps(pair.positions, left_size)
            if pair.left == pair.right
            else pair.positions
        )
        ends = starts + (self.sizes[new] - 1)
        tokens[starts + left_size] = NONE
        tokens[starts] = tokens[ends] = new
        self.begins[starts + left_size] = False
        before, after = tokens[starts - 1], tokens[ends + 1]
        has_before = before != NONE
        has_after = (after != NONE) & (
            after != new
        )  # `new new` is counted from its right side, once
        n = len(self.sizes)
        keys = np.concatenate([before[has_before], n + after[has_after]])
        positions = np.concatenate(
            [starts[has_before] - self.sizes[before[has_before]], starts[has_after]]
        )
        for key, count, places in self._grouped(keys, positions, least):
            yield Pair(key, new, count, places) if key < n else Pair(new, key - n, count, places)

    def _count(self, places: np.ndarray) -> int:
        return int(self.counts[places].sum(dtype=np.int64))

    def _grouped(
        self, keys: np.ndarray, positions: np.ndarray, least: int
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each key, the counts at its positions added up if that gives `least`, and the positions in their order."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        starts = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [len(keys)]])
        counts = np.add.reduceat(self.counts[positions], starts[:-1], dtype=np.int64)
        for group in np.flatnonzero(counts >= least):
            start, stop = starts[group : group + 2]
            yield (
                int(keys[start]),
                int(counts[group]),
                positions[start:stop].copy(),
            )  # a view would keep the positions of all


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tokens beside each other: where, and how often in the text."""

    left: int
    right: int
    count: int
    positions: np.ndarray


def _without_overlaps(positions: np.ndarray, size: int) -> np.ndarray:
    """The positions at which `x x` is replaced: in a run of x, from the left, the first and second, third and fourth, ..."""
    number = np.arange(len(positions))
    begins = np.concatenate([[True], np.diff(positions) != size])
    run_start = np.maximum.accumulate(np.where(begins, number, 0))
    return positions[(number - run_start) % 2 == 0]


def learn_merges(
    words: Mapping[str, int], n_merges: int, *, progress: Progress | None = None
) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges for words that stand in a text so often, fewer if every word is one token before.

    Each merge is the most frequent pair; of equally frequent ones the lexicographically greatest pair of byte strings.
    """
    return merge_pairs(Words(words, 256 + n_merges), n_merges, progress=progress)


def merge_pairs(
    table: Words, n_merges: int, *, progress: Progress | None = None
) -> list[tuple[bytes, bytes]]:
    """`learn_merges` of the words in a table, which is used up.

    A pair comes into being all at once, when the younger of its tokens does, and from then on it can only become rarer. So
    its count at that time is a bound for ever: the heap holds bounds, and only a pair that reaches the top is counted again.

    Most pairs are too rare to be ever merged. The heap holds those that stand `least` times in the text; when none is left,
    `least` is lowered and the whole table is searched again, which happens a few times.
    """
    spelled = [bytes((byte,)) for byte in range(256)]
    mirrored = [_mirrored(token) for token in spelled]
    heap: list[Entry] = []
    least = max((pair.count for pair in table.pairs()), default=0) + 1
    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges and (heap or least > 1):
        if not heap:
            least = max(least // RARER, 1)
            heap = [_entry(pair, mirrored) for pair in table.pairs(least)]
            heapq.heapify(heap)
            continue
        bound, _, _, pair = heap[0]
        pair = table.still_there(pair)
        if pair.count < -bound:
            if pair.count >= least:
                heapq.heapreplace(heap, _entry(pair, mirrored))
            else:
                heapq.heappop(heap)
            continue
        heapq.heappop(heap)
        merges.append((spelled[pair.left], spelled[pair.right]))
        spelled.append(spelled[pair.left] + spelled[pair.right])
        mirrored.append(_mirrored(spelled[-1]))
        for new in table.merge(pair, len(spelled) - 1, least):
            heapq.heappush(heap, _entry(new, mirrored))
        if progress is not None:
            progress("merges", len(merges), n_merges)
    return merges


Entry = tuple[int, str, str, Pair]


def _entry(pair: Pair, mirrored: Sequence[str]) -> Entry:
    """What the heap, whose top is its least, sorts by: the highest count first, then the greatest bytes."""
    return -pair.count, mirrored[pair.left], mirrored[pair.right], pair


FLIPPED = bytes(range(255, -1, -1))


def _mirrored(token: bytes) -> str:
    """A string that sorts the other way round: the end comes behind every byte, so that `ab` stands before `a`."""
    return token.translate(FLIPPED).decode("latin-1") + "\u0100"


# --- step 3: files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bpe:
    """What was learned: the merges in their order, and the rules of the words they were learned in.

    Ids are the 256 bytes, then one for each merge, then the special tokens.
    """

    merges: tuple[tuple[bytes, bytes], ...]
    rules: Rules

    @classmethod
    def learn(
        cls,
        words: Mapping[str, int],
        vocab_size: int,
        rules: Rules,
        *,
        progress: Progress | None = None,
    ) -> "Bpe":
        """The vocabulary of `vocab_size` tokens for these words; it is smaller where they allow no more merges."""
        return cls(
            tuple(learn_merges(words, vocab_size - smallest_vocabulary(rules), progress=progress)),
            rules,
        )

    @classmethod
    def count_and_learn(
        cls,
        jobs: Iterable[RawChunk | TextChunk],
        vocab_size: int,
        rules: Rules,
        *,
        processes: int = 1,
        progress: Progress | None = None,
    ) -> "Bpe":
        """`learn` from the words of all jobs; they are let go before the merges begin.

        Raises:
            UserError: as `count_jobs`.
        """
        n_merges = vocab_size - smallest_vocabulary(rules)
        table = Words(
            count_jobs(jobs, rules, processes=processes, progress=progress), 256 + n_merges
        )
        return cls(tuple(merge_pairs(table, n_merges, progress=progress)), rules)

    @property
    def vocab_size(self) -> int:
        return smallest_vocabulary(self.rules) + len(self.merges)

    @property
    def eos(self) -> str:
        """The special token that ends a text: one that is known for it, else the first."""
        return next(
            (name for name in WELL_KNOWN_EOS if name in self.rules.special), self.rules.special[0]
        )

    @property
    def pad(self) -> str | None:
        """The special token that fills rows, if one is known for it."""
        return next((name for name in WELL_KNOWN_PAD if name in self.rules.special), None)

    def vocabulary(self) -> dict[str, int]:
        """The tokens in GPT-2's printable form, and their ids."""
        learned = [left + right for left, right in self.merges]
        ids = {
            gpt2_form(token): id
            for id, token in enumerate([*(bytes((byte,)) for byte in range(256)), *learned])
        }
        for name in self.rules.special:
            if name in ids:
                raise UserError(
                    f"special token {printable(name)}: the files write another token so. Choose another name for it."
                )
            ids[name] = len(ids)
        return ids

    def backend(self) -> "Backend":
        """The same tokenizer of the `tokenizers` library."""
        from tokenizers import Regex, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Backend

        merges = [(gpt2_form(left), gpt2_form(right)) for left, right in self.merges]
        backend = Backend(models.BPE(self.vocabulary(), merges))
        if self.rules.pattern == "gpt2":
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        else:
            words = pre_tokenizers.Split(Regex(PATTERNS[self.rules.pattern]), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
            )
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(self.rules.special))
        return backend

    def save(self, folder: Path, setting: str = "where it goes") -> None:
        """Write `FILES` into the new folder `folder`, whole or not at all; an error calls its place `setting`.

        `load_hf_tokenizer` and transformers' AutoTokenizer open it.
        """
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eos,
            "clean_up_tokenization_spaces": False,
        }
        settings |= {"pad_token": self.pad} if self.pad else {}
        texts = (
            json.dumps(self.vocabulary(), ensure_ascii=False),
            "".join(
                [
                    "#version: 0.2\n",
                    *(f"{gpt2_form(left)} {gpt2_form(right)}\n" for left, right in self.merges),
                ]
            ),
            json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
            self.backend().to_str(pretty=True),
        )
        with writing(folder, setting):
            temporary = _folder_beside(folder)
            try:
                for name, text in zip(FILES, texts, strict=True):
                    with open(temporary / name, "w", encoding="utf-8", newline="\n") as file:
                        file.write(text)
                        file.flush()
                        os.fsync(file.fileno())
                temporary.chmod(0o755)  # mkdtemp's is for its owner alone
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def _folder_beside(folder: Path) -> Path:
    """A new folder where what shall become `folder` is made."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))


def gpt2_form(token: bytes) -> str:
    """A token in visible characters, as GPT-2's files write it.

    >>> gpt2_form(b" a\\n")
    'ĠaĊ'
    """
    return "".join(CHARACTER_OF_BYTE[byte] for byte in token)


def smallest_vocabulary(rules: Rules) -> int:
    """The size without any merge."""
    return 256 + len(rules.special)


def check_request(vocab_size: int, rules: Rules) -> None:
    """UserError for a vocabulary that cannot be, before any time is spent on it."""
    if not rules.special:
        raise UserError(
            "special tokens: none, and one has to end a text. Name one, such as <|endoftext|>."
        )
    for name in rules.special:
        if (
            len(name) < 2
            or any(character.isspace() for character in name)
            or not name.isprintable()
        ):
            raise UserError(
                f"special token '{printable(name)}': expected two or more visible characters. Choose another, such as <|endoftext|>."
            )
        if rules.special.count(name) > 1:
            raise UserError(f"special token {printable(name)}: named twice. Name it once.")
    least = smallest_vocabulary(rules)
    if vocab_size < least:
        raise UserError(
            f"tokenizer.vocab_size: {vocab_size} is less than 256 bytes and {len(rules.special)} special tokens. Ask for {least} or more."
        )
    if vocab_size > COUNT_LIMIT:
        raise UserError(
            f"tokenizer.vocab_size: {vocab_size} is more than {COUNT_LIMIT}, the largest that is possible. Ask for less, such as 32000."
        )


def require_new(folder: Path) -> None:
    """UserError where `Bpe.save` would have to replace something: said before the learning, not after it."""
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"{printable(folder)}: is there already. Delete it, or choose another folder."
        )


def require_writable(folder: Path, setting: str) -> None:
    """`require_new`, and UserError where the operating system lets nobody write there: it is tried before the learning."""
    require_new(folder)
    with writing(folder, setting):
        _folder_beside(folder).rmdir()


def learn_bpe(
    source: Source,
    vocab_size: int,
    rules: Rules,
    *,
    docs: int | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Bpe:
    """The vocabulary learned from a source, or from its first `docs` documents, the same for any number of processes.

    Raises:
        UserError: as `check_request` and `count_jobs`.
    """
    check_request(vocab_size, rules)
    return Bpe.count_and_learn(
        word_chunks(source, processes, docs),
        vocab_size,
        rules,
        processes=processes,
        progress=progress,
    )


# --- the tokenizer of a run -------------------------------------------------------------------------------------------


def tokenizer_for(
    config: TokenizerConfig, data: DataConfig, seed: int, *, progress: Progress | None = None
) -> Tokenizer:
    """The tokenizer that a run's settings ask for: `make_tokenizer`'s, or for bpe one that is learned from the training documents.

    Of a mixture it is learned from the documents of all sources, whatever their weights. What bpe learned is kept in
    data.cache_dir, in a folder named by all that it depends on.

    Raises:
        UserError: as `training_split`, `load_hf_tokenizer` and `check_request`, or a stream without end would be read.
    """
    if config.kind in ("byte", "hf"):
        return make_tokenizer(config, lambda: ())
    split = training_split(data, seed)
    if (
        isinstance(split.source, HubDataset)
        and data.streaming
        and split.limit is None
        and config.learn_docs is None
    ):
        raise UserError(
            f"tokenizer.learn_docs: kind {config.kind} would read all of a streamed dataset. Set tokenizer.learn_docs, for example 100000."
        )
    if config.kind == "char":
        return make_tokenizer(config, lambda: islice(split.documents(), config.learn_docs))
    assert config.vocab_size is not None  # TokenizerConfig checks it
    rules = Rules(config.pattern or "gpt2")
    check_request(config.vocab_size, rules)
    text = [
        split.source.fingerprint(),
        data.text_field,
        data.document_separator,
        split.held_out,
        split.limit,
        config.learn_docs,
    ]
    key = hashlib.sha256(
        json.dumps(
            [VERSION, text, config.vocab_size, PATTERNS[rules.pattern], rules.special]
        ).encode()
    ).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"bpe-{key}"
    with writing(folder, "data.cache_dir"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    try:
        if not folder.exists():
            documents = islice(split.documents(), config.learn_docs)
            processes = os.cpu_count() or 1
            Bpe.count_and_learn(
                text_chunks(documents),
                config.vocab_size,
                rules,
                processes=processes,
                progress=progress,
            ).save(folder)
    finally:
        lock.release()
    return load_hf_tokenizer(str(folder))


def learned_from(config: TokenizerConfig, texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """The tokenizer that the settings ask for, learned from texts that are not documents where it is learned at all; kept nowhere.

    Raises:
        UserError: as `make_tokenizer` and `check_request`.
    """
    if config.kind != "bpe":
        return make_tokenizer(config, lambda: islice(texts(), config.learn_docs))
    assert config.vocab_size is not None  # TokenizerConfig checks it
    rules = Rules(config.pattern or "gpt2")
    check_request(config.vocab_size, rules)
    with tempfile.TemporaryDirectory() as folder:
        Bpe.count_and_learn(
            text_chunks(islice(texts(), config.learn_docs)), config.vocab_size, rules
        ).save(Path(folder) / "bpe")
        return load_hf_tokenizer(str(Path(folder) / "bpe"))
