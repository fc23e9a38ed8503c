"""Small things that many tests need: a corpus, a config, a run."""

import functools
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from lightning.fabric.utilities import registry

import training  # noqa: F401  (before Lightning, which would import libraries of metrics)
from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.files import locked
from tinylm.common.platform import STOP_SIGNALS
from tinylm.config.schema import Config, DataConfig
from tinylm.model.decoder import Decoder
from tinylm.text.data_source import data_sources, find_split
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens.encode import encode_documents
from tinylm.tokens.overlap import Overlap, split_overlap
from tinylm.tokens.token_file_writer import TokenFileWriter

# An example has no time limit of its own: other programs may hold the cores.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")

# No test cuts the power: what is written need not reach the disk, which would take a third of a run.
os.fsync = os.fstat
# Each Trainer asks every installed package for callbacks of its own.
registry.entry_points = functools.cache(registry.entry_points)

# What a user has set must not decide a test. The libraries of the hub read it when they are
# imported, and the modules above import none of them.
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

ROOT = Path(__file__).parent.parent
# Every shipped YAML file that is the settings of a run; the others are lists of stages, for align.py.
CONFIGS = sorted(
    path
    for path in (*ROOT.glob("*.yaml"), *ROOT.glob("configs/**/*.yaml"))
    if path.stem not in ("align", "align-smoke")
)

# They take minutes: begun last, each would keep one of two processes waiting for the other.
LONGEST = (
    "test_the_commands_of_the_readme_run_as_they_are_typed",
    "test_killed_at_every_seam_of_a_save_the_run_resumes_exactly",
)


gc.disable()  # until all tests are collected: it would look at every module and test again and again


def pytest_collection_finish() -> None:
    """The modules and the tests stay to the end, and are not looked at again."""
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first."""
    items.sort(key=lambda item: not item.name.startswith(LONGEST))


WORDS = [
    "the",
    "model",
    "reads",
    "a",
    "token",
    "and",
    "guesses",
    "what",
    "comes",
    "next",
    "from",
    "all",
    "it",
    "has",
    "seen",
]


def state_of(config: Config, model: Decoder, stage: str, step: int = 1) -> dict[str, Any]:
    """The state of a checkpoint of a model with a tokenizer of bytes."""
    return {
        "format": checkpoint_format.FORMAT,
        "schema": checkpoint_format.SCHEMA,
        "stage": stage,
        "step": step,
        "tokens": 1,
        "train_loss": 2.5,
        "val_loss": None,
        "created": 1.0,
        "config": config.to_plain(),
        "tokenizer": ByteTokenizer().to_plain(),
        "weights": model.state_dict(),
    }


def write_token_file(path: Path, documents: Iterable[str], tokenizer: Tokenizer) -> None:
    """Writes documents as a token file, a document in each chunk."""
    write_token_chunks(path, encode_documents(documents, tokenizer, None), tokenizer)


def write_token_chunks(path: Path, chunks: Iterable[np.ndarray], tokenizer: Tokenizer) -> None:
    """Writes the tokens of documents, each closed by EOS, as a token file."""
    with locked(path, "data.cache_dir"), TokenFileWriter(path, tokenizer, "test") as writer:
        for tokens in chunks:
            writer.append(tokens, np.array([len(tokens)]))
        writer.finish("test")


def val_documents(data: DataConfig, seed: int) -> Iterator[str]:
    """The validation documents in their order."""
    return find_split(data, "val", seed).documents()


def overlap_of(data: DataConfig, seed: int) -> Overlap:
    """The documents of data.val_dataset that are training documents too."""
    train, val = (
        [(s, None) for s in data_sources(data, which, seed)] for which in ("train", "val")
    )
    return split_overlap(train, val)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are faster on one thread, and results do not depend on the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def keep_signals() -> Iterator[None]:
    """Training handles the stop signals for the life of its process, which here is pytest's.

    Programs that a test starts inherit an ignored SIGINT, and keep ignoring it: a background shell ignores it.
    """
    before = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """121 different one-line documents."""
    path = tmp_path / "corpus.txt"
    path.write_text(
        "".join(
            f"{i} "
            + " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(8 + i % 5))
            + ".\n"
            for i in range(121)
        ),
        encoding="utf-8",
    )
    return path


@pytest.fixture
def make_config(tmp_path: Path, corpus: Path) -> Callable[..., Path]:
    """Writes a config of a tiny run into the test's folder; keyword arguments are sections whose settings are added."""

    def make(name: str = "config.yaml", **sections: dict) -> Path:
        settings: dict[str, dict] = {
            "model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "max_seq_len": 32},
            "data": {"dataset": str(corpus), "cache_dir": str(tmp_path / "cache")},
            "training": {
                "seq_len": 16, "micro_batch_size": 4, "max_steps": 6, "val_every_steps": 3, "log_every_steps": 1, "save_every_steps": 2,
                "lr": 1e-2, "checkpoint_dir": str(tmp_path / "checkpoints"), "log_dir": str(tmp_path / "logs"), "run_name": "tiny",
            },
            "hardware": {"accelerator": "cpu", "threads": 1},
        }  # fmt: skip
        for section, values in sections.items():
            settings.setdefault(section, {}).update(values)
        path = tmp_path / name
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        return path

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes | str], Path]:
    """Writes a file into the test's folder."""

    def write(name: str, content: bytes | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def lines(write) -> Path:
    """1000 documents; the last 200 repeat the first 200."""
    return write("lines.txt", "".join(f"document {i % 800}\n" for i in range(1000)))


CHILD = """
import resource, sys, time
from pathlib import Path
from tinylm.common.errors import UserError
from tinylm.config.schema import DataConfig
from tinylm.text import data_source, documents, named_sources, sources
from tinylm.tokenizer.byte_char import ByteTokenizer
from tinylm.tokens import encode, run_files, token_file_writer
BYTES, args = ByteTokenizer(), sys.argv[1:]
"""


@pytest.fixture
def child() -> Iterator[Callable[..., subprocess.Popen]]:
    """Starts code, after `CHILD`, as a Python process in the project's folder; killed at the end of the test."""
    started: list[subprocess.Popen] = []

    def start(code: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-c", CHILD + code, *map(str, arguments)]
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
