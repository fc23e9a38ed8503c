"""Speed of BPE training and of encoding: this project and libraries in Rust, on the same text.

    pip install -r requirements-bench.txt
    python benchmarks/tokenizer.py [--megabytes 10 100 --vocab-size 8000 32000 --processes 2 --data TEXT]
    python benchmarks/tokenizer.py --encode [--tokenizer FOLDER --megabytes 20 --processes 2 --data TEXT]

Training: also `tokenizers` (BpeTrainer) and `rustbpe`, if it is installed (pip install rustbpe). The
time is from the call to the trained vocabulary. Bytes per token are measured on the first 5 MB.

Encoding: documents of about 4000 characters, with a tokenizer from a folder (for example GPT-2's
vocab.json and merges.txt) or one that is trained on the text. All implementations must give the same
ids. `corpus to token file` is the whole of `python -m tinylm encode`: read, split, encode, write, sync.

Each run has its own process and is timed without imports; the table has the best of --rounds. Memory
is the peak of the process and its workers, sampled every 20 ms; shared pages are counted twice. The
default text is the .py, .md, .rst and .txt files of installed packages, in the order of their paths.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

EOT = "<|endoftext|>"
SAMPLE = 5_000_000
DOCUMENT = 4000
# Characters per text that is passed to the other trainers.
BLOCK = 2**16


def train_tinylm(text: Path, vocab_size: int, processes: int, out: Path) -> float:
    """Training time of this project, in seconds."""
    from tinylm.text.chunks import word_chunks
    from tinylm.text.named_sources import sources_named
    from tinylm.tokenizer.bpe_fast import learn_bpe
    from tinylm.tokenizer.pretokenize import Pretokenizer

    start = time.perf_counter()
    learned = learn_bpe(
        word_chunks(sources_named([str(text)]), processes),
        vocab_size,
        Pretokenizer(special_tokens=(EOT,)),
        processes=processes,
    )
    seconds = time.perf_counter() - start
    learned.backend().save(str(out))
    return seconds


def train_tokenizers(
    text: Path, vocab_size: int, processes: int, out: Path, *, by_file: bool = False
) -> float:
    """Training time of `tokenizers`, in seconds; RAYON_NUM_THREADS limits its threads.

    With `by_file` it trains on single lines, so no token contains a line end and what follows it.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False
    )
    start = time.perf_counter()
    if by_file:
        backend.train([str(text)], trainer)
    else:
        with open(text, encoding="utf-8", newline="\n") as file:
            backend.train_from_iterator(iter(lambda: "".join(file.readlines(BLOCK)), ""), trainer)
    seconds = time.perf_counter() - start
    backend.save(str(out))
    return seconds


def train_rustbpe(text: Path, vocab_size: int, processes: int, out: Path) -> float:
    """Training time of `rustbpe`, in seconds."""
    import rustbpe

    from tinylm.tokenizer.pretokenize import PATTERNS

    start = time.perf_counter()
    with open(text, encoding="utf-8", newline="\n") as file:
        blocks = iter(lambda: "".join(file.readlines(BLOCK)), "")
        rustbpe.Tokenizer().train_from_iterator(
            blocks, vocab_size - 1, buffer_size=256, pattern=PATTERNS["gpt2"]
        )
    return time.perf_counter() - start


TRAINERS = {
    "tinylm": train_tinylm,
    "tokenizers": train_tokenizers,
    "tokenizers, by file": partial(train_tokenizers, by_file=True),
    "rustbpe": train_rustbpe,
}


def encode_arrays(documents: list[str], options: argparse.Namespace) -> tuple[float, Any]:
    """Time and ids of this project's tokenizer, on one thread."""
    from tinylm.tokenizer.factory import named_tokenizer

    tokenizer = named_tokenizer(str(options.tokenizer))
    start = time.perf_counter()
    ids = tokenizer.encode_arrays(documents)
    return time.perf_counter() - start, ids


def encode_file(documents: list[str], options: argparse.Namespace) -> tuple[float, Any]:
    """Time and ids of encoding a corpus into a token file."""
    from tinylm.text.named_sources import sources_named
    from tinylm.text.sources import Split
    from tinylm.tokenizer.factory import named_tokenizer
    from tinylm.tokens import encode
    from tinylm.tokens.token_file import TokenFile

    tokenizer = named_tokenizer(str(options.tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder) / "corpus.txt", Path(folder) / "corpus.bin"
        corpus.write_text(EOT.join(documents), encoding="utf-8", newline="")
        start = time.perf_counter()
        spec = encode.EncodeSpec(
            Split("train", sources_named([str(corpus)], "text", EOT), None, None),
            tokenizer,
            separator=EOT,
        )
        encode.encode_file(out, spec, processes=options.processes)
        seconds = time.perf_counter() - start
        tokens = TokenFile.open(out).tokens
        return seconds, [tokens[tokens != tokenizer.eos_id]]


def encode_tiktoken(documents: list[str], options: argparse.Namespace) -> tuple[float, Any]:
    """Time and ids of tiktoken, with threads."""
    from tinylm.tokenizer.hf_files import load_hf_tokenizer

    fast = load_hf_tokenizer(str(options.tokenizer)).fast
    assert fast is not None, "tiktoken cannot encode with this tokenizer"
    start = time.perf_counter()
    ranks = fast.encoding.encode_ordinary_batch(documents, num_threads=options.processes)
    return time.perf_counter() - start, [fast.ids[document] for document in ranks]


def encode_tokenizers(documents: list[str], options: argparse.Namespace) -> tuple[float, Any]:
    """Time and ids of `tokenizers`; RAYON_NUM_THREADS limits its threads."""
    from tokenizers import Tokenizer

    from tinylm.tokenizer.hf_files import load_hf_tokenizer

    backend = Tokenizer.from_str(
        load_hf_tokenizer(str(options.tokenizer)).to_plain()["tokenizer_json"]
    )
    start = time.perf_counter()
    ids = [
        encoding.ids for encoding in backend.encode_batch_fast(documents, add_special_tokens=False)
    ]
    return time.perf_counter() - start, ids


def encode_transformers(documents: list[str], options: argparse.Namespace) -> tuple[float, Any]:
    """Time and ids of transformers, which calls `tokenizers`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from tinylm.tokenizer.hf_files import load_hf_tokenizer

    backend = Tokenizer.from_str(
        load_hf_tokenizer(str(options.tokenizer)).to_plain()["tokenizer_json"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    start = time.perf_counter()
    ids = tokenizer(documents, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return time.perf_counter() - start, ids


ENCODERS = {
    "tiktoken, encode_ordinary_batch": encode_tiktoken,
    "tinylm, encode_arrays, one thread": encode_arrays,
    "tinylm, corpus to token file": encode_file,
    "tokenizers, encode_batch_fast": encode_tokenizers,
    "transformers": encode_transformers,
}


def encoding_run(options: argparse.Namespace) -> int:
    """One encoding run in its own process: print seconds, peak megabytes and a hash of the ids as JSON."""
    import numpy as np

    documents = documents_of(options.data)
    with peak_memory() as megabytes:
        seconds, ids = ENCODERS[options.implementation](documents, options)
    digest = hashlib.sha256(
        np.concatenate([np.asarray(document, dtype="<u4") for document in ids]).tobytes()
    ).hexdigest()
    print(json.dumps({"seconds": seconds, "megabytes": max(megabytes), "ids": digest}))
    return 0


def documents_of(path: Path) -> list[str]:
    """Split the text into documents that a corpus file gives back unchanged.

    A corpus file has no carriage returns, and no line ends around a document.
    """
    with open(path, encoding="utf-8") as file:
        pieces = [
            "".join(lines).replace(EOT, "").strip("\n")
            for lines in iter(lambda: file.readlines(DOCUMENT), [])
        ]
    return [piece for piece in pieces if piece.strip()]


def run_one(options: argparse.Namespace) -> int:
    """One training run in its own process: print seconds, peak megabytes and bytes per token as JSON."""
    if options.encode:
        return encoding_run(options)
    (vocab_size,) = options.vocab_size
    with peak_memory() as megabytes:
        seconds = TRAINERS[options.implementation](
            options.data, vocab_size, options.processes, options.out
        )
    fit = bytes_per_token(options.out, options.data) if options.out.exists() else None
    print(json.dumps({"seconds": seconds, "megabytes": max(megabytes), "fit": fit}))
    return 0


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Sample the memory of this process and its children, in megabytes, into a list."""
    samples: list[float] = []
    done = threading.Event()

    def sample_memory() -> None:
        import psutil  # from requirements-bench.txt; --help does not need it

        this = psutil.Process()
        samples.append(resident(this) / 1e6)  # at least one sample
        while not done.wait(0.02):
            samples.append(
                sum(resident(process) for process in [this, *this.children(recursive=True)]) / 1e6
            )

    watcher = threading.Thread(target=sample_memory)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def resident(process: Any) -> int:
    """Resident bytes; 0 for a process that has just ended."""
    import psutil

    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def runs_of(
    name: str, text: Path, options: argparse.Namespace, *arguments: str
) -> list[dict[str, Any]]:
    """Run one implementation `--rounds` times; return its results."""
    command = [
        sys.executable,
        __file__,
        "--implementation",
        name,
        "--data",
        str(text),
        "--processes",
        str(options.processes),
        *arguments,
    ]
    threads = {"RAYON_NUM_THREADS": str(options.processes), "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(options.rounds):
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **threads}
        )
        runs.append(json.loads(done.stdout))
    return runs


def training_row(name: str, text: Path, vocab_size: int, options: argparse.Namespace) -> list[str]:
    """Cells: seconds, peak megabytes, bytes per token."""
    out = text.with_name(f"{name}.json")
    runs = runs_of(name, text, options, "--out", str(out), "--vocab-size", str(vocab_size))
    best = min(run["seconds"] for run in runs)
    fit = runs[0]["fit"]
    return [
        f"{best:.2f}",
        f"{max(run['megabytes'] for run in runs):,.0f}",
        "-" if fit is None else f"{fit:.3f}",
    ]


def encoding_rows(text: Path, tokenizer: Path, options: argparse.Namespace) -> Iterator[list[str]]:
    """Cells: implementation, MB/s, speed relative to the first, peak megabytes."""
    first: dict[str, Any] = {}
    for name in ENCODERS:
        runs = runs_of(name, text, options, "--encode", "--tokenizer", str(tokenizer))
        run = min(runs, key=lambda run: run["seconds"])
        first = first or run
        if run["ids"] != first["ids"]:
            sys.exit(f"{name}: its ids differ from those of {next(iter(ENCODERS))}")
        speed = text.stat().st_size / 1e6 / run["seconds"]
        yield [
            name,
            f"{speed:.1f}",
            f"{first['seconds'] / run['seconds']:.2f}",
            f"{max(run['megabytes'] for run in runs):,.0f}",
        ]


def bytes_per_token(tokenizer: Path, text: Path) -> float:
    """Bytes per token on the first SAMPLE bytes of the text."""
    from tokenizers import Tokenizer

    with open(text, "rb") as file:
        sample = file.read(SAMPLE)
    encoding = Tokenizer.from_file(str(tokenizer)).encode(
        sample.decode("utf-8", "ignore"), add_special_tokens=False
    )
    return len(sample) / len(encoding.ids)


def build_text(path: Path, n_bytes: int) -> None:
    """Write `n_bytes` of text from installed packages and from Python itself."""
    remaining = n_bytes
    with open(path, "wb") as out:
        for root in ("purelib", "stdlib"):
            for file in sorted(Path(sysconfig.get_path(root)).rglob("*")):
                if file.suffix in (".py", ".md", ".rst", ".txt") and file.is_file():
                    text = file.read_bytes().decode("utf-8", "ignore").encode()[:remaining]
                    out.write(text.decode("utf-8", "ignore").encode())
                    remaining -= len(text)
                if not remaining:
                    return
    sys.exit(
        f"the installed packages have {remaining / 1e6:.0f} MB of text less than needed; give --data"
    )


def cut_text(source: Path, path: Path, n_bytes: int) -> None:
    """Write the first `n_bytes` of a file, without a cut character at the end."""
    with open(source, "rb") as file:
        path.write_bytes(file.read(n_bytes).decode("utf-8", "ignore").encode())


def main(argv: list[str] | None = None) -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[8000, 32000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", type=Path, help="a .txt file with the text")
    parser.add_argument("--implementation", choices=[*TRAINERS, *ENCODERS], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--encode", action="store_true", help="compare encoding, not training")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FOLDER",
        help="tokenizer for --encode (default: train one with 32000 tokens)",
    )
    options = parser.parse_args(argv)
    if options.implementation:
        return run_one(options)
    from rich.console import Console

    with tempfile.TemporaryDirectory() as folder:
        Console().print(
            encoding_table(Path(folder), options)
            if options.encode
            else training_table(Path(folder), options)
        )
    return 0


def texts_of(folder: Path, options: argparse.Namespace) -> Iterator[Path]:
    """Write the text in each size and yield its path."""
    text = folder / "text.txt"
    for megabytes in options.megabytes:
        if options.data is None:
            build_text(text, megabytes * 10**6)
        else:
            cut_text(options.data, text, megabytes * 10**6)
        yield text


def training_table(folder: Path, options: argparse.Namespace) -> "Table":
    """The table of all trainers, text sizes and vocabulary sizes."""
    from rich.table import Table

    names = [name for name in TRAINERS if name != "rustbpe" or find_spec("rustbpe")]
    table = Table(
        "text", "vocabulary", "trainer", title=f"training BPE with {options.processes} processes"
    )
    for column in ("seconds", "peak MB", "bytes per token"):
        table.add_column(column, justify="right")
    for text in texts_of(folder, options):
        size = f"{text.stat().st_size / 1e6:.0f} MB"
        for vocab_size in options.vocab_size:
            for name in names:
                row = training_row(name, text, vocab_size, options)
                table.add_row(size, f"{vocab_size:,}", name, *row, end_section=name == names[-1])
                sys.stderr.write(f"{size} {vocab_size} {name}: {row[0]} s\n")
    return table


def encoding_table(folder: Path, options: argparse.Namespace) -> "Table":
    """The table of all encoders and text sizes."""
    from rich.table import Table

    from tinylm.text.chunks import word_chunks
    from tinylm.text.named_sources import sources_named
    from tinylm.tokenizer.bpe_fast import learn_bpe
    from tinylm.tokenizer.pretokenize import Pretokenizer

    table = Table(
        "text", "implementation", title=f"encoding on {options.processes} threads or processes"
    )
    for column in ("MB/s", "times", "peak MB"):
        table.add_column(column, justify="right")
    tokenizer = options.tokenizer
    for text in texts_of(folder, options):
        if tokenizer is None:
            tokenizer = folder / "tokenizer"
            learn_bpe(
                word_chunks(sources_named([str(text)]), options.processes),
                32000,
                Pretokenizer(special_tokens=(EOT,)),
                processes=options.processes,
            ).save(tokenizer)
        size = f"{text.stat().st_size / 1e6:.0f} MB"
        for row in encoding_rows(text, tokenizer, options):
            table.add_row(size, *row)
            sys.stderr.write(f"{size} {row[0]}: {row[1]} MB/s\n")
        table.add_section()
    return table


if __name__ == "__main__":
    sys.exit(main())
