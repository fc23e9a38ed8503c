r"""Byte-pair encoding from scratch: which byte strings become tokens is learned from how often they stand in a text.

    1. words     text ─▶ words, never across a special token ─▶ {word: how often}                    `count_texts`, `count_corpus`
    2. merges    the pair of neighbours that is most frequent becomes a token; again and again       `learn_merges`
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
import multiprocessing
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import regex
from filelock import FileLock

from tinylm.config import DataConfig, TokenizerConfig
from tinylm.corpus import HubDataset, LocalFiles, Source, find_source
from tinylm.errors import UserError, printable, writing
from tinylm.mix import training_split
from tinylm.processes import Progress
from tinylm.tokenizer import BYTE_OF_CHARACTER, WELL_KNOWN_EOS, Tokenizer, load_hf_tokenizer, make_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# What a merge may not cross: the words of GPT-2 (Radford et al. 2019), and those of GPT-4 as tiktoken's cl100k_base has them,
# which keep numbers to three digits and ignore the case of contractions.
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SPECIAL = ("<|endoftext|>", "<|pad|>")
WELL_KNOWN_PAD = ("<|pad|>", "<pad>", "[PAD]", "<|padding|>")
FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")
CHARACTER_OF_BYTE = {byte[0]: character for character, byte in BYTE_OF_CHARACTER.items()}

# A file is counted in parts of about so many bytes, a stream of documents in batches of so many characters.
PART = 2**20
# Parts that one process counts before it hands its words over; also a bound on what it holds.
PARTS_A_JOB = 64
# A smaller text is counted before processes for it have started (half a second; 10 MB take one core 0.8 s).
WORTH_PROCESSES = 16 * PART
# Where a text can be cut and keeps its words under both patterns: behind a single line end, or before a single space.
CUT = regex.compile(rb"(?<=[!-~]\n)(?=[!-~])|(?<=[!-~])(?= [!-~])")
# Bytes searched for such a place.
WINDOW = 2**16
VERSION = 1


# --- step 1: words ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """How a text falls into words: the name of a pattern, and the special tokens, which belong to no word."""

    pattern: str = "gpt2"
    special: tuple[str, ...] = SPECIAL

    def words(self, text: str) -> Iterator[list[str]]:
        """The words of each stretch between special tokens; of special tokens that overlap the longest counts.

        >>> list(Rules().words("Hello world's<|endoftext|>  end"))
        [['Hello', ' world', "'s"], [' ', ' end']]
        """
        word, special = _compiled(self)
        for stretch in special.split(text) if special else (text,):
            yield word.findall(stretch)


@lru_cache
def _compiled(rules: Rules) -> tuple[regex.Pattern[str], regex.Pattern[str] | None]:
    longest_first = sorted(rules.special, key=len, reverse=True)
    special = regex.compile("|".join(map(regex.escape, longest_first))) if rules.special else None
    return regex.compile(PATTERNS[rules.pattern]), special


def count_texts(texts: Iterable[str], rules: Rules) -> Counter[str]:
    """How often each word stands in `texts`."""
    counts: Counter[str] = Counter()
    for text in texts:
        for words in rules.words(text):
            counts.update(words)
    return counts


@dataclass(frozen=True)
class FileJob:
    """Parts of a .txt file, from one border to the next."""

    path: Path
    borders: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.borders[-1] - self.borders[0]

    def texts(self) -> Iterator[str]:
        with _readable(self.path), open(self.path, "rb") as file:
            file.seek(self.borders[0])
            for start, stop in zip(self.borders, self.borders[1:], strict=False):
                yield self._text(file.read(stop - start), start)

    def _text(self, raw: bytes, start: int) -> str:
        mark = 3 if start == 0 and raw.startswith(b"\xef\xbb\xbf") else 0
        try:
            return raw[mark:].decode()
        except UnicodeDecodeError as error:
            at = start + mark + error.start
            raise UserError(f"{printable(self.path)}: not UTF-8 text: byte 0x{raw[at - start]:02x} at offset {at}. Save the file as UTF-8.") from None


@dataclass(frozen=True)
class TextJob:
    """Some documents."""

    documents: list[str]

    @property
    def size(self) -> int:
        return sum(map(len, self.documents))

    def texts(self) -> Iterable[str]:
        return self.documents


Job = FileJob | TextJob


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns errors of the operating system while `path` is read into UserErrors that name it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{printable(path)}: {error.strerror}. Give a file that can be read.") from None


def file_borders(path: Path) -> list[int]:
    """Where a file is cut, its start and end included: at the first good place behind each `PART` bytes.

    Without a good place in the window a part ends behind a line, and without a line end there it goes on into the next.
    The places depend on the file alone, so that any number of processes counts the same words.
    """
    if not path.is_file():
        raise UserError(f"{printable(path)}: not a regular file. Give the path of a file on disk.")
    borders = [0]
    with _readable(path), open(path, "rb") as file:
        size = os.path.getsize(path)
        for wanted in range(PART, size, PART):
            file.seek(wanted)
            window = file.read(WINDOW)
            found = CUT.search(window)
            place = found.start() if found else window.find(b"\n") + 1
            if place:
                borders.append(wanted + place)
    return [*borders, size]


def jobs_of(source: Source, processes: int) -> Iterator[Job]:
    """The source in portions for the processes: plain .txt files as they stand, other kinds by their documents."""
    if isinstance(source, HubDataset):
        yield from _text_jobs(source.documents())
        return
    for path in source.paths:
        if path.name.endswith(".txt") and source.separator is None:
            yield from _file_jobs(path, processes)
        else:
            yield from _text_jobs(LocalFiles(str(path), (path,), source.field, source.separator).documents())


def _file_jobs(path: Path, processes: int) -> Iterator[FileJob]:
    borders = file_borders(path)
    # Four portions a process, so that none waits long for the last one.
    parts = min(PARTS_A_JOB, max(1, (len(borders) - 1) // (4 * processes)))
    for start in range(0, len(borders) - 1, parts):
        yield FileJob(path, tuple(borders[start : start + parts + 1]))


def _text_jobs(documents: Iterable[str]) -> Iterator[TextJob]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= PART:
            yield TextJob(batch)
            batch, characters = [], 0
    if batch:
        yield TextJob(batch)


def count_job(job: Job, rules: Rules) -> Counter[str]:
    """The words of one job: what a process is asked."""
    return count_texts(job.texts(), rules)


def count_jobs(jobs: Iterable[Job], rules: Rules, *, processes: int = 1, progress: Progress | None = None) -> Counter[str]:
    """The words of all jobs, counted by `processes`, or by this one alone where the text is small.

    Raises:
        UserError: a file cannot be read or is not UTF-8, a process was killed, or there is no word at all.
    """
    jobs = iter(jobs)
    first: list[Job] = []
    while sum(job.size for job in first) < WORTH_PROCESSES and (job := next(jobs, None)) is not None:
        first.append(job)
    if sum(job.size for job in first) < WORTH_PROCESSES:
        processes = 1
    total, done = Counter[str](), 0
    for job, words in _counted(chain(first, jobs), rules, processes):
        total.update(words)
        done += job.size
        if progress is not None:
            progress("bytes", done, 0)
    if not total:
        raise UserError("the text has no words, so nothing can be learned from it. Give a file with text.")
    return total


def _counted(jobs: Iterator[Job], rules: Rules, processes: int) -> Iterator[tuple[Job, Counter[str]]]:
    """Each job with its words, as they come in; at most twice as many jobs as processes are under way."""
    if processes == 1:
        yield from ((job, count_job(job, rules)) for job in jobs)
        return
    # spawn: a fork of a process that runs threads (torch's, tokenizers') can stand still for ever.
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_leave_interrupts_to_the_parent)
    running: dict[Future[Counter[str]], Job] = {}
    try:
        for job in jobs:
            running[executor.submit(count_job, job, rules)] = job
            if len(running) >= 2 * processes:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool:
        raise UserError("a process that counted words was ended from outside, perhaps for want of memory. Free some, or use fewer processes.") from None
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _finished(running: dict[Future[Counter[str]], Job]) -> Iterator[tuple[Job, Counter[str]]]:
    """Takes out of `running` what is done, at least one job."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        yield running.pop(future), future.result()


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- step 2: merges ---------------------------------------------------------------------------------------------------

# In `Words.tokens`: between words, and where a token began that is now inside a longer one.
NONE = -1


class Words:
    """All distinct words behind each other, as tokens that grow.

    `low` and `lower` after the merge `o w`, with 256 for the new token; a token is named at its first and at its last byte,
    so that both of its neighbours find it:

        tokens   . l 256 256 . l 256 256 e r .           (. is NONE)
        counts   0 3   3   3 3 1   1   1 1 1 1           (how often the word stands in the text)

    Positions are indices into these arrays. A pair is at the position of its left token.
    """

    def __init__(self, words: Mapping[str, int], vocab_size: int):
        spelled = [word.encode() for word in words]
        sizes = np.fromiter(map(len, spelled), dtype=np.int64, count=len(spelled))
        counts = np.fromiter(words.values(), dtype=np.int64, count=len(spelled))
        n_bytes = int(sizes.sum())
        self.tokens = np.full(n_bytes + len(spelled) + 1, NONE, dtype=np.int32)
        # One place more for each word before.
        self.tokens[np.arange(1, n_bytes + 1) + np.repeat(np.arange(len(spelled)), sizes)] = np.frombuffer(b"".join(spelled), dtype=np.uint8)
        self.counts = np.concatenate([[0], np.repeat(counts, sizes + 1)])
        self.sizes = np.ones(vocab_size, dtype=np.int32)
        """bytes of each token"""

    def byte_pairs(self) -> Iterator["Pair"]:
        """The pairs before any merge."""
        left, right = self.tokens[:-1], self.tokens[1:]
        positions = np.flatnonzero((left != NONE) & (right != NONE)).astype(np.int32)
        keys = (left[positions] * 256 + right[positions]).astype(np.uint16)  # NumPy sorts 16 bits in linear time
        for key, count, places in self._grouped(keys, positions):
            yield Pair(*divmod(key, 256), count, places)

    def still_there(self, pair: "Pair") -> "Pair":
        """The pair at the positions where later merges left it, with its count now.

        A position where a merge took one of its tokens can never hold the same pair again: a longer token begins there, or
        none.
        """
        places = pair.positions
        places = places[(self.tokens[places] == pair.left) & (self.tokens[places + self.sizes[pair.left]] == pair.right)]
        return Pair(pair.left, pair.right, int(self.counts[places].sum()), places)

    def merge(self, pair: "Pair", new: int) -> Iterator["Pair"]:
        """Write the token `new` wherever `pair` is; the pairs that come to be, each with `new` on one side or both."""
        tokens, left_size = self.tokens, self.sizes[pair.left]
        self.sizes[new] = left_size + self.sizes[pair.right]
        starts = _without_overlaps(pair.positions, left_size) if pair.left == pair.right else pair.positions
        ends = starts + (self.sizes[new] - 1)
        tokens[starts + left_size] = NONE
        tokens[starts] = tokens[ends] = new
        before, after = tokens[starts - 1], tokens[ends + 1]
        has_before = before != NONE
        has_after = (after != NONE) & (after != new)  # `new new` is counted from its right side, once
        n = len(self.sizes)
        keys = np.concatenate([before[has_before], n + after[has_after]])
        positions = np.concatenate([starts[has_before] - self.sizes[before[has_before]], starts[has_after]])
        for key, count, places in self._grouped(keys, positions):
            yield Pair(key, new, count, places) if key < n else Pair(new, key - n, count, places)

    def _grouped(self, keys: np.ndarray, positions: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        """Each key, the counts at its positions added up, and the positions in their order."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        keys, positions = keys[order], positions[order]
        starts = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1])
        counts = np.add.reduceat(self.counts[positions], starts)
        borders = [*starts.tolist(), len(keys)]
        for number, (key, count) in enumerate(zip(keys[starts].tolist(), counts.tolist(), strict=True)):
            yield key, count, positions[borders[number] : borders[number + 1]]


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


def learn_merges(words: Mapping[str, int], n_merges: int, *, progress: Progress | None = None) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges for words that stand in a text so often, fewer if every word is one token before.

    Each merge is the most frequent pair; of equally frequent ones the lexicographically greatest pair of byte strings.

    A pair comes into being all at once, when the younger of its tokens does, and from then on it can only become rarer. So
    its count at that time is a bound for ever: the heap holds bounds, and only a pair that reaches the top is counted again.
    """
    table = Words(words, 256 + n_merges)
    spelled = [bytes((byte,)) for byte in range(256)]
    mirrored = [_mirrored(token) for token in spelled]
    heap = [_entry(pair, mirrored) for pair in table.byte_pairs()]
    heapq.heapify(heap)
    merges: list[tuple[bytes, bytes]] = []
    while heap and len(merges) < n_merges:
        bound, _, _, pair = heap[0]
        pair = table.still_there(pair)
        if pair.count < -bound:
            if pair.count:
                heapq.heapreplace(heap, _entry(pair, mirrored))
            else:
                heapq.heappop(heap)
            continue
        heapq.heappop(heap)
        merges.append((spelled[pair.left], spelled[pair.right]))
        spelled.append(spelled[pair.left] + spelled[pair.right])
        mirrored.append(_mirrored(spelled[-1]))
        for new in table.merge(pair, len(spelled) - 1):
            heapq.heappush(heap, _entry(new, mirrored))
        if progress is not None:
            progress("merges", len(merges), n_merges)
    return merges


def _entry(pair: Pair, mirrored: Sequence[str]) -> tuple[int, str, str, Pair]:
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
    def learn(cls, words: Mapping[str, int], vocab_size: int, rules: Rules, *, progress: Progress | None = None) -> "Bpe":
        """The vocabulary of `vocab_size` tokens for these words; it is smaller where they allow no more merges."""
        return cls(tuple(learn_merges(words, vocab_size - smallest_vocabulary(rules), progress=progress)), rules)

    @property
    def vocab_size(self) -> int:
        return smallest_vocabulary(self.rules) + len(self.merges)

    @property
    def eos(self) -> str:
        """The special token that ends a text: one that is known for it, else the first."""
        return next((name for name in WELL_KNOWN_EOS if name in self.rules.special), self.rules.special[0])

    @property
    def pad(self) -> str | None:
        """The special token that fills rows, if one is known for it."""
        return next((name for name in WELL_KNOWN_PAD if name in self.rules.special), None)

    def vocabulary(self) -> dict[str, int]:
        """The tokens in GPT-2's printable form, and their ids."""
        learned = [left + right for left, right in self.merges]
        ids = {gpt2_form(token): id for id, token in enumerate([*(bytes((byte,)) for byte in range(256)), *learned])}
        for name in self.rules.special:
            if name in ids:
                raise UserError(f"special token {printable(name)}: the files write another token so. Choose another name for it.")
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
            backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(list(self.rules.special))
        return backend

    def save(self, folder: Path) -> None:
        """Write `FILES` into the new folder `folder`, whole or not at all.

        `load_hf_tokenizer` and transformers' AutoTokenizer open it.
        """
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": self.eos, "clean_up_tokenization_spaces": False}
        settings |= {"pad_token": self.pad} if self.pad else {}
        texts = (
            json.dumps(self.vocabulary(), ensure_ascii=False),
            "".join(["#version: 0.2\n", *(f"{gpt2_form(left)} {gpt2_form(right)}\n" for left, right in self.merges)]),
            json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
            self.backend().to_str(pretty=True),
        )
        with writing(folder, "where it goes"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
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
        raise UserError("special tokens: none, and one has to end a text. Name one, such as <|endoftext|>.")
    for name in rules.special:
        if len(name) < 2 or any(character.isspace() for character in name) or not name.isprintable():
            raise UserError(f"special token '{printable(name)}': expected two or more visible characters. Choose another, such as <|endoftext|>.")
        if rules.special.count(name) > 1:
            raise UserError(f"special token {printable(name)}: named twice. Name it once.")
    least = smallest_vocabulary(rules)
    if vocab_size < least:
        raise UserError(f"vocabulary size: {vocab_size} is less than 256 bytes and {len(rules.special)} special tokens. Ask for {least} or more.")


def require_new(folder: Path) -> None:
    """UserError where `Bpe.save` would have to replace something: said before the learning, not after it."""
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{printable(folder)}: is there already. Delete it, or choose another folder.")


def learn_bpe(sources: Sequence[Source], vocab_size: int, rules: Rules, *, processes: int = 1, progress: Progress | None = None) -> Bpe:
    """The vocabulary learned from all of `sources`, the same for any number of processes.

    Raises:
        UserError: as `check_request` and `count_jobs`.
    """
    check_request(vocab_size, rules)
    jobs = chain.from_iterable(jobs_of(source, processes) for source in sources)
    words = count_jobs(jobs, rules, processes=processes, progress=progress)
    return Bpe.learn(words, vocab_size, rules, progress=progress)


def sources_of(names: Sequence[str]) -> list[Source]:
    """What each name stands for: a file, a folder, a glob, or a dataset on the hub.

    Raises:
        UserError: as `find_source`.
    """
    return [find_source(DataConfig(), "dataset", name, "train") for name in names]


def texts_of(names: Sequence[str]) -> Iterator[str]:
    """The text behind the names in pieces, cut where no word is."""
    for source in sources_of(names):
        for job in jobs_of(source, processes=1):
            yield from job.texts()


# --- the tokenizer of a run -------------------------------------------------------------------------------------------


def tokenizer_for(config: TokenizerConfig, data: DataConfig, seed: int, *, progress: Progress | None = None) -> Tokenizer:
    """The tokenizer that a run's settings ask for: `make_tokenizer`'s, or for bpe one that is learned from the training documents.

    Of a mixture it is learned from the documents of all sources, whatever their weights. What bpe learned is kept in
    data.cache_dir, in a folder named by all that it depends on.

    Raises:
        UserError: as `training_split`, `load_hf_tokenizer` and `check_request`, or a stream without end would be read.
    """
    if config.kind in ("byte", "hf"):
        return make_tokenizer(config, lambda: ())
    split = training_split(data, seed)
    if isinstance(split.source, HubDataset) and data.streaming and split.limit is None and config.learn_docs is None:
        raise UserError(f"tokenizer.learn_docs: kind {config.kind} would read all of a streamed dataset. Set tokenizer.learn_docs, for example 100000.")
    if config.kind == "char":
        return make_tokenizer(config, lambda: islice(split.documents(), config.learn_docs))
    assert config.vocab_size is not None  # TokenizerConfig checks it
    rules = Rules(config.pattern or "gpt2")
    check_request(config.vocab_size, rules)
    text = [split.source.fingerprint(), data.text_field, data.document_separator, split.held_out, split.limit, config.learn_docs]
    key = hashlib.sha256(json.dumps([VERSION, text, config.vocab_size, PATTERNS[rules.pattern], rules.special]).encode()).hexdigest()[:16]
    folder = Path(data.cache_dir) / f"bpe-{key}"
    with writing(folder, "data.cache_dir"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        lock.acquire()
    try:
        if not folder.exists():
            documents = islice(split.documents(), config.learn_docs)
            words = count_jobs(_text_jobs(documents), rules, processes=os.cpu_count() or 1, progress=progress)
            Bpe.learn(words, config.vocab_size, rules, progress=progress).save(folder)
    finally:
        lock.release()
    return load_hf_tokenizer(str(folder))
