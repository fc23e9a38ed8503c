"""Stage dpo: the model learns to prefer the chosen of two answers to a prompt
(DPO, IPO, SLiC, ORPO, SimPO).

pairs ─▶ row order ─▶ micro-batch: chosen and rejected (B, T), and their reference log-probabilities (B,)
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import RunData
from model import BatchLoss, TrainingModule
from tinylm.checkpoint.initial import InitialModel, reference_to
from tinylm.common.device import autocast_dtype
from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import adapters_off
from tinylm.objectives.preferences import (
    METRICS,
    Answers,
    Comparison,
    PairScores,
    compare_pairs,
    score_pairs,
)
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.preferences import PreferencePair, answers_of, build_pairs
from tinylm.rows.row_files import resolve_dataset
from tinylm.rows.sft import count_shared_examples, fingerprint_of_examples
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.template_factory import make_template
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.example_rows import row_of_examples
from tinylm.tokens.packing import Batch, RankShare, RowDataset
from training.build import build_initial, build_model
from training.context import RunContext
from training.resume import ResumeState, require_same_model
from training.run import Stage
from training.stages.cached_array import cache_path, cached_array
from training.stages.pretrain import learn_tokenizer
from training.stages.reference_log_probs import pair_log_probs
from training.stages.sft import find_data, inspect_examples, log_contents

logger = logging.getLogger(__name__)


class PreferenceData(RunData):
    """The batches of a run on preferences.

    Args:
        config: the settings; data.template defines how prompts and answers are formatted.
        tokenizer: encodes the rows.
    """

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self.template = make_template(config.data.template, tokenizer, tools=config.data.tools)
        self.notes: list[str] = []
        """what the user should know about the rows, a line each"""
        self.train_pairs: list[PreferencePair] = []
        self.val_pairs: list[PreferencePair] = []

    def prepare(self) -> None:
        """Read and encode the rows of both splits.

        Raises:
            UserError: see `build_pairs`.
        """
        dataset = self.config.data.dataset
        if resolve_dataset(self.config.data)[0].dataset != dataset:  # the tiny rows, no preferences
            raise UserError(
                ("data.dataset", dataset),
                "has no file of rows",
                "Give a file of preferences, such as data/tiny_preferences.jsonl",
            )
        self.train_pairs, train = self._pairs("train")
        self.val_pairs, val = self._pairs("val")
        self.system = train.most_common_system
        self.notes = [*train.notes(), *val.notes()]
        shared = count_shared_examples(
            [pair.chosen for pair in self.train_pairs], [pair.chosen for pair in self.val_pairs]
        )
        if shared:
            self.notes.append(
                f"warning: {shared} validation prompts with their chosen answers are also training "
                "rows; val_loss will be too low"
            )

    def located_rows(self) -> list[tuple[str, np.ndarray]]:
        return [(pair.chosen.location, pair.chosen.ids) for pair in self.train_pairs]

    def describe(self) -> str:
        """One line about the training and validation data."""
        n_targets = [int(example.trained.sum()) for example in answers_of(self.train_pairs)]
        return (
            f"data: {self.config.data.dataset}: train {len(self.train_pairs)} pairs of "
            f"answers of {sum(n_targets) / len(n_targets):.0f} tokens, validation "
            f"{len(self.val_pairs)} pairs; template {self.template.name}"
        )

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: two runs with equal fingerprints see the same tokens and targets."""
        return {
            "train": fingerprint_of_examples(answers_of(self.train_pairs)),
            "val": fingerprint_of_examples(answers_of(self.val_pairs)),
        }

    def train_dataset(self, share: RankShare | None = None) -> RowDataset:
        return self.training_rows(self.train_pairs, self.collate(), share)

    def val_dataset(self, share: RankShare | None = None) -> RowDataset:
        return self.validation_rows(self.val_pairs, self.collate(), share)

    def collate(self) -> "partial[Batch]":
        """`collate_preferences` with the settings of the run."""
        return partial(
            collate_preferences,
            seq_len=self.config.training.seq_len,
            pad_id=self.tokenizer.pad_id,
            cached=self.train_pairs[0].reference is not None,
        )

    def all_batches(self) -> Iterator[Batch]:
        """All pairs in their order, validation after training; every rank gets all of them."""
        pairs = [*self.train_pairs, *self.val_pairs]
        size = self.config.training.micro_batch_size
        collate = self.collate()
        for start in range(0, len(pairs), size):
            yield collate(pairs[start : start + size], range(start, start + size))

    def add_reference(self, log_probs: np.ndarray) -> None:
        """Give every pair the log-probabilities (n, 2) of its answers under the reference,
        in the order of `all_batches`.
        """
        known = iter(log_probs.tolist())
        self.train_pairs = [pair._replace(reference=next(known)) for pair in self.train_pairs]
        self.val_pairs = [pair._replace(reference=next(known)) for pair in self.val_pairs]

    def inspect_row(self, heading: str, row: PreferencePair, place: int) -> Iterator[InspectedRow]:
        """Both answers to print, each after its prompt."""
        seq_len, pad_id = self.config.training.seq_len, self.tokenizer.pad_id
        for name, example in (("chosen", row.chosen), ("rejected", row.rejected)):
            yield inspect_examples(f"{heading}, {name}", [example], seq_len, pad_id)

    def _pairs(self, which: Which) -> tuple[list[PreferencePair], RowReport]:
        training = self.config.training
        return build_pairs(
            self.config.data, which, training.seed, self.template, self.tokenizer, training.seq_len
        )


def collate_preferences(
    rows: Sequence[PreferencePair | None],
    places: Sequence[int],
    *,
    seq_len: int,
    pad_id: int,
    cached: bool,
) -> Batch:
    """Ids and labels (B, T) int64 of both answers and, if `cached`,
    their log-probabilities under the reference, (B,).
    """
    batch: Batch = {"origin": [None if pair is None else pair.chosen.location for pair in rows]}
    for number, name in enumerate(("chosen", "rejected")):
        examples = [() if pair is None else (pair[number],) for pair in rows]
        filled = [row_of_examples(row, seq_len, pad_id) for row in examples]
        batch[f"{name}_ids"] = torch.from_numpy(np.stack([row[0] for row in filled]))
        batch[f"{name}_labels"] = torch.from_numpy(np.stack([row[1] for row in filled]))
        if cached:
            references = [0.0 if pair is None else pair.reference[number] for pair in rows]
            batch[f"{name}_reference"] = torch.tensor(references)
    return batch


# --- the module ---


class DPOModule(TrainingModule):
    """Preference optimization: the policy learns which of two answers is better,
    for most losses relative to a reference.

    The reference is the model that the run started from: a frozen copy, or the policy with its
    adapters off, or log-probabilities that were computed once and come with each batch. It never
    has dropout. Losses orpo and simpo have none, and hold and compute none.

    Args:
        config: the settings.
        decoder: the policy.
        references: what its checkpoints refer to.
        reference: the frozen copy if dpo.reference is `copy`, else None.
    """

    train_columns = METRICS
    val_columns = tuple(f"val_{name}" for name in METRICS)

    def __init__(
        self,
        config: Config,
        decoder: Decoder | HFModel,
        references: dict[str, Any],
        reference: Decoder | HFModel | None,
    ):
        super().__init__(config, decoder, "dpo", references)
        assert config.dpo is not None
        self.dpo, self.normalizer = config.dpo, config.training.micro_batch_size
        self.reference = None if reference is None else reference.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DPOModule":
        """Switch dropout on or off, in the policy only."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """The preference loss, plus dpo.sft_coef times the cross entropy per token of the chosen
        answers.

        The second term is that of Pang et al. 2024, equation 1.
        """
        policy, found = self._compare_pairs(batch)
        n_pairs = (policy.lengths.chosen > 0).sum()  # without rows of padding
        n_tokens = policy.lengths.chosen.sum() + policy.lengths.rejected.sum()
        sft = self.dpo.sft_coef * found.cross_entropy.mean()
        regularizer = sft + policy.balance_loss * self.balance_coef
        return BatchLoss(found.loss.sum(), n_pairs, n_tokens, regularizer, found.metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """(loss sum, pairs, sums of METRICS) of one batch."""
        policy, found = self._compare_pairs(batch)
        n_pairs = (policy.lengths.chosen > 0).sum()
        return torch.cat((torch.stack((found.loss.sum(), n_pairs)), found.metrics))

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        """The means over pairs."""
        loss, n_pairs, *sums = totals
        means = [total / n_pairs for total in (loss, *sums)]
        return dict(zip(("val_loss", *self.val_columns), means, strict=True))

    def _compare_pairs(self, batch: Batch) -> tuple[PairScores, Comparison]:
        reference = self._reference_log_probs(batch)
        policy = score_pairs(self._features, self.decoder.head, batch)
        return policy, compare_pairs(policy, reference, self.dpo)

    @torch.no_grad()
    def _reference_log_probs(self, batch: Batch) -> Answers | None:
        """The log-probabilities of both answers under the reference, None if the loss has none;
        draws no random number.
        """
        if self.dpo.reference is None:
            return None
        if self.dpo.reference == "cached":
            return Answers(batch["chosen_reference"], batch["rejected_reference"])
        if self.reference is not None:
            return score_pairs(self.reference.features, self.reference.head, batch).log_probs
        was_training = self.decoder.training
        self.decoder.eval()
        with adapters_off(self.decoder):
            log_probs = score_pairs(self.decoder.features, self.decoder.head, batch).log_probs
        self.decoder.train(was_training)
        return log_probs


# --- building the stage ---


def open_data(context: RunContext, tokenizer: Tokenizer) -> PreferenceData:
    """The pairs of answers of both splits, read and encoded;
    logs their number and the skipped rows.
    """
    data = PreferenceData(context.config, tokenizer)
    data.prepare()
    log_contents(data.describe(), data.notes)
    return data


def build_module(
    context: RunContext, data: RunData, resume: ResumeState | None, initial: InitialModel | None
) -> DPOModule:
    """The policy and its reference, if the loss has one: the model that the run started from,
    also when it is resumed.
    """
    config = context.config
    assert config.dpo is not None and isinstance(data, PreferenceData)
    policy, references = build_model(context, resume, initial)
    if config.dpo.reference in (None, "adapters_off"):
        return DPOModule(config, policy, references, None)
    assert initial is not None, "the table of unsupported pairs sees to it"
    model = build_initial(config, initial)
    reference = reference_to(initial, model, context.checkpoint_dir)
    if config.lora is None:  # else it is the base of the adapters, which is compared already
        references["reference"] = reference
        require_same_model(resume, reference, name="reference", init_from=config.training.init_from)
    if config.dpo.reference == "copy":
        return DPOModule(config, policy, references, model)
    add_cached_reference(context, data, model, reference["fingerprint"])
    return DPOModule(config, policy, references, None)


def add_cached_reference(
    context: RunContext, data: PreferenceData, model: Decoder | HFModel, fingerprint: str
) -> None:
    """Give the data the log-probabilities under the reference model,
    computed once and kept in data.cache_dir.
    """
    config = context.config
    n_pairs = len(data.train_pairs) + len(data.val_pairs)
    depends_on = [
        data.fingerprints(),
        fingerprint,
        config.data.template,
        config.training.seq_len,
        config.hardware.precision,
    ]
    path = cache_path(config.data.cache_dir, "reference", depends_on)

    def compute() -> Iterator[np.ndarray]:
        logger.info(
            f"reference: computing the log-probabilities of {n_pairs} pairs, cached in {path}"
        )
        dtype = autocast_dtype(config.hardware.precision)
        yield pair_log_probs(model.to(context.device), data.all_batches(), dtype)

    data.add_reference(cached_array(path, (n_pairs, 2), "<f4", compute))


DPO = Stage(
    name="dpo",
    find_data=find_data,
    learn_tokenizer=learn_tokenizer,
    open_data=open_data,
    build_module=build_module,
    next_command="python infer.py --ckpt {model} --chat",
)
