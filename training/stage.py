"""Stage: the parts of a run that differ from one kind of training to another;
each is made in `training/stages/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data import RunData
from model import TrainingModule
from tinylm.config.schema import Config
from tinylm.tokenizer.base import Tokenizer
from training.context import RunContext
from training.resume import ResumeState

if TYPE_CHECKING:
    from tinylm.checkpoint.initial import InitialModel


@dataclass(frozen=True)
class Stage:
    """One kind of training. What it cannot be combined with is in `support.py`, under its name."""

    name: str
    """recorded in checkpoints"""
    find_data: Callable[[Config], None]
    """called first: raises a UserError if data that a setting names are not there"""
    learn_tokenizer: Callable[[Config], Tokenizer]
    """a tokenizer of kind bpe or char, learned from the training data of the settings"""
    open_data: Callable[[RunContext, Tokenizer], RunData]
    """the data module, prepared; logs what it contains"""
    build_module: Callable[
        [RunContext, RunData, ResumeState | None, InitialModel | None], TrainingModule
    ]
    """the LightningModule, with the weights that the run starts from"""
    next_command: str | None
    """what to run with the finished model; `{model}` is its path, `{prompt}` a text to continue;
    None: nothing is suggested"""
    open_rows: Callable[[RunContext, Tokenizer], RunData] | None = None
    """for --show-rows: the data module without its validation data; None: as `open_data`"""
