"""Learning a vocabulary: this project's trainer beside two written in Rust, on the same text with as many processes.

    pip install -r requirements-bench.txt
    python benchmarks/tokenizer.py [--megabytes 10 100 --vocab-size 8000 32000 --processes 2 --data TEXT]

Contestants: `tokenizers`' BpeTrainer and, where it is installed (pip install rustbpe), `rustbpe`. Each run is a process of its
own; its time is from the call to the learned vocabulary, without imports, the best of --rounds. Memory is the most that it
and its workers held together, looked at every 20 ms, so that pages they share count twice. Bytes per token: of the first 5 MB.
Without --data the text is what installed packages bring along: .py, .md, .rst and .txt files in the order of their paths.
"""

import argparse
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
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

EOT = "<|endoftext|>"
SAMPLE = 5_000_000
# Characters that the other trainers are given at a time.
BLOCK = 2**16


def ours(text: Path, vocab_size: int, processes: int, out: Path) -> float:
    """Seconds of this project's trainer."""
    from tinylm.bpe import Rules, learn_bpe, sources_of

    start = time.perf_counter()
    learned = learn_bpe(sources_of([str(text)]), vocab_size, Rules(special=(EOT,)), processes=processes)
    seconds = time.perf_counter() - start
    learned.backend().save(str(out))
    return seconds


def tokenizers(text: Path, vocab_size: int, processes: int, out: Path, *, by_file: bool = False) -> float:
    """Seconds of `tokenizers`' trainer, whose threads the environment bounds.

    By file it learns from single lines, the shorter way to call it: their ends are then in no token with what follows.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOT], initial_alphabet=alphabet, show_progress=False)
    start = time.perf_counter()
    if by_file:
        backend.train([str(text)], trainer)
    else:
        with open(text, encoding="utf-8", newline="\n") as file:
            backend.train_from_iterator(iter(lambda: "".join(file.readlines(BLOCK)), ""), trainer)
    seconds = time.perf_counter() - start
    backend.save(str(out))
    return seconds


def rustbpe(text: Path, vocab_size: int, processes: int, out: Path) -> float:
    """Seconds of `rustbpe`."""
    import rustbpe

    from tinylm.bpe import PATTERNS

    start = time.perf_counter()
    with open(text, encoding="utf-8", newline="\n") as file:
        blocks = iter(lambda: "".join(file.readlines(BLOCK)), "")
        rustbpe.Tokenizer().train_from_iterator(blocks, vocab_size - 1, buffer_size=256, pattern=PATTERNS["gpt2"])
    return time.perf_counter() - start


CONTESTANTS = {"tinylm": ours, "tokenizers": tokenizers, "tokenizers, by file": partial(tokenizers, by_file=True), "rustbpe": rustbpe}


def contest(options: argparse.Namespace) -> int:
    """One run, in the process that was started for it: seconds, peak megabytes before the encoding, bytes per token, as JSON."""
    (vocab_size,) = options.vocab_size
    with peak() as megabytes:
        seconds = CONTESTANTS[options.contestant](options.data, vocab_size, options.processes, options.out)
    fit = bytes_per_token(options.out, options.data) if options.out.exists() else None
    print(json.dumps({"seconds": seconds, "megabytes": max(megabytes), "fit": fit}))
    return 0


@contextmanager
def peak() -> Iterator[list[float]]:
    """A list that grows by what this process and its children hold."""
    held: list[float] = []
    done = threading.Event()

    def look() -> None:
        import psutil  # of requirements-bench.txt; --help does without

        this = psutil.Process()
        while not done.wait(0.02):
            held.append(sum(resident(process) for process in [this, *this.children(recursive=True)]) / 1e6)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield held
    finally:
        done.set()
        watcher.join()


def resident(process: Any) -> int:
    """Bytes in memory, none for a process that has just ended."""
    import psutil

    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def measure(name: str, text: Path, vocab_size: int, options: argparse.Namespace, folder: Path) -> list[str]:
    """A row of the table."""
    out = folder / f"{name}.json"
    command = [sys.executable, __file__, "--contestant", name, "--data", str(text), "--out", str(out), "--vocab-size", str(vocab_size)]
    command += ["--processes", str(options.processes)]
    threads = {"RAYON_NUM_THREADS": str(options.processes), "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(options.rounds):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **threads})
        runs.append(json.loads(done.stdout))
    best = min(run["seconds"] for run in runs)
    fit = runs[0]["fit"]
    return [f"{best:.2f}", f"{max(run['megabytes'] for run in runs):,.0f}", "-" if fit is None else f"{fit:.3f}"]


def bytes_per_token(tokenizer: Path, text: Path) -> float:
    """How many bytes of the sample a token stands for."""
    from tokenizers import Tokenizer

    with open(text, "rb") as file:
        sample = file.read(SAMPLE)
    encoding = Tokenizer.from_file(str(tokenizer)).encode(sample.decode("utf-8", "ignore"), add_special_tokens=False)
    return len(sample) / len(encoding.ids)


def build_text(path: Path, n_bytes: int) -> None:
    """Write so many bytes of the text that installed packages and Python itself bring along."""
    left = n_bytes
    with open(path, "wb") as out:
        for root in ("purelib", "stdlib"):
            for file in sorted(Path(sysconfig.get_path(root)).rglob("*")):
                if file.suffix in (".py", ".md", ".rst", ".txt") and file.is_file():
                    text = file.read_bytes().decode("utf-8", "ignore").encode()[:left]
                    out.write(text.decode("utf-8", "ignore").encode())
                    left -= len(text)
                if not left:
                    return
    sys.exit(f"the installed packages have {left / 1e6:.0f} MB of text too few; give --data")


def cut_text(source: Path, path: Path, n_bytes: int) -> None:
    """Write the first bytes of a file, without half a character at their end."""
    with open(source, "rb") as file:
        path.write_bytes(file.read(n_bytes).decode("utf-8", "ignore").encode())


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--vocab-size", type=int, nargs="+", default=[8000, 32000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--data", type=Path, help="a .txt file to take the text from")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.contestant:
        return contest(options)
    from rich.console import Console
    from rich.table import Table

    names = [name for name in CONTESTANTS if name != "rustbpe" or find_spec("rustbpe")]
    table = Table("text", "vocabulary", "trainer", title=f"learning BPE with {options.processes} processes")
    for column in ("seconds", "peak MB", "bytes per token"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        for megabytes in options.megabytes:
            if options.data is None:
                build_text(text, megabytes * 10**6)
            else:
                cut_text(options.data, text, megabytes * 10**6)
            for vocab_size in options.vocab_size:
                for name in names:
                    row = measure(name, text, vocab_size, options, Path(folder))
                    table.add_row(f"{text.stat().st_size / 1e6:.0f} MB", f"{vocab_size:,}", name, *row, end_section=name == names[-1])
                    sys.stderr.write(f"{megabytes} MB {vocab_size} {name}: {row[0]} s\n")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
