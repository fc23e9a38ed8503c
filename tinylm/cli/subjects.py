"""The models that `evaluate_checkpoints.py` ranks: checkpoints, and Hugging Face models."""

import argparse
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylm.cli.loading import choose_tokenizer
from tinylm.common.errors import UserError, printable
from tinylm.generate.engine import Engine
from tinylm.generate.weights import open_model, round_weights
from tinylm.model.hf_files import find_hf_model
from tinylm.rows.templates import Template
from tinylm.tokenizer.hf_files import load_hf_tokenizer


@dataclass(frozen=True)
class Subject:
    """A checkpoint with all its names, or a Hugging Face model by name or folder."""

    paths: tuple[Path, ...]
    """the first one is displayed"""
    is_hf: bool = False

    @property
    def label(self) -> str:
        """`checkpoints/step-000100.ckpt (best, last)`, or `hf:gpt2`."""
        if self.is_hf:
            return printable(f"hf:{self.paths[0]}")
        others = ", ".join(path.stem for path in self.paths[1:])
        return printable(f"{self.paths[0]} ({others})" if others else self.paths[0])

    @property
    def slug(self) -> str:
        """The path as a part of a file name."""
        return re.sub(r"[^\w.-]+", "_", str(self.paths[0].with_suffix(""))).strip("_.")


@dataclass(frozen=True)
class OpenedSubject:
    """A subject whose model is loaded."""

    subject: Subject
    engine: Engine
    template: Template | None
    """the one it was fine-tuned with; None for a base model"""
    step: int | None
    """None for a Hugging Face model, as is the loss"""
    val_loss: float | None

    @property
    def row(self) -> dict[str, Any]:
        """The columns that every table of results has."""
        return {
            "checkpoint": self.subject.label,
            "step": self.step,
            "val_loss": self.val_loss,
        }


def find_subjects(arguments: argparse.Namespace) -> list[Subject]:
    """The subjects that --checkpoints and --model name, each once.

    Raises:
        UserError: no file matches --checkpoints.
    """
    patterns = arguments.checkpoints or ([] if arguments.model else ["checkpoints/*.ckpt"])
    # `hf:` before a name, as in training.init_from, means the same model.
    names = dict.fromkeys(name.removeprefix("hf:") for name in arguments.model)
    models = [Subject((Path(name),), is_hf=True) for name in names]
    return [*find_checkpoints(patterns), *models]


def find_checkpoints(patterns: Sequence[str], flag: str = "--checkpoints") -> list[Subject]:
    """The checkpoints that match the patterns of `flag`; all names of one file
    (last, best, final) are one subject.
    """
    files: dict[tuple[int, ...] | Path, list[Path]] = {}
    for pattern in patterns:
        is_glob = glob.has_magic(pattern) and not os.path.exists(pattern)
        paths = sorted(glob.glob(pattern, recursive=True)) if is_glob else [pattern]
        for path in map(Path, paths):
            names = files.setdefault(file_identity(path), [])
            if path not in names:
                names.append(path)
    if patterns and not files:
        raise UserError(
            (flag, " ".join(patterns)),
            "no file matches",
            "Train a model first: python train.py --config config_smoke.yaml",
        )
    subjects = []
    for names in files.values():
        names.sort(key=lambda path: (not path.name.startswith("step-"), path))
        subjects.append(Subject(tuple(names)))
    return subjects


def file_identity(path: Path) -> tuple[int, ...] | Path:
    """A value that is equal for all names of one file."""
    try:
        status = os.stat(path)
    except OSError:  # reported when the file is opened
        return path
    return status.st_dev, status.st_ino


def open_subject(
    subject: Subject, device: str, arguments: argparse.Namespace, **engine_settings: Any
) -> OpenedSubject:
    """Load the model of a subject.

    Args:
        arguments: --tokenizer of a checkpoint, and --weights.
        engine_settings: of its `Engine`.

    Raises:
        UserError: it does not exist, is damaged, or has diverged.
    """
    if subject.is_hf:
        return open_hf_model(subject, device, arguments, **engine_settings)
    loaded = open_model(subject.paths[0], device, arguments.weights)
    tokenizer = choose_tokenizer(arguments.tokenizer, loaded.tokenizer)
    max_rise = arguments.max_bpb_rise
    round_weights(loaded.model, tokenizer, arguments.weights, max_rise=max_rise)
    engine = Engine.of(loaded, tokenizer, **engine_settings)
    template = loaded.make_template(tokenizer)
    return OpenedSubject(subject, engine, template, loaded.info.step, loaded.info.val_loss)


def open_hf_model(
    subject: Subject, device: str, arguments: argparse.Namespace, **engine_settings: Any
) -> OpenedSubject:
    """A Hugging Face model, which is prompted in plain text."""
    name = str(subject.paths[0])
    model = find_hf_model(name).load().to(device).eval()
    tokenizer = load_hf_tokenizer(name)
    n_embeddings = model.embedding.num_embeddings
    if n_embeddings < tokenizer.vocab_size:
        raise UserError(
            ("--model", name),
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model only {n_embeddings}",
            "Download both again",
        )
    round_weights(model, tokenizer, arguments.weights, max_rise=arguments.max_bpb_rise)
    engine = Engine(model, tokenizer, **engine_settings)
    return OpenedSubject(subject, engine, None, None, None)
