"""The teacher's probabilities of all training targets, computed once (distill.cached).

    rows in their order ─▶ teacher ─▶ scores of each target ─▶ a file of (targets, K)   `cached_scores`
    example ─▶ its targets' part of the file ─▶ teacher_log_probs, teacher_ids of a batch

Validation has no teacher: val_loss is the cross entropy alone.

# N targets of all examples · K classes that are kept: distill.top_k, or all
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from tinylm.common.console import size
from tinylm.common.device import autocast_dtype
from tinylm.model.decoder import Decoder, extra_inputs
from tinylm.model.hf_model import HFModel
from tinylm.objectives.cross_entropy import target_chunks
from tinylm.objectives.distillation import TeacherScores, teacher_scores
from tinylm.tokens.example_rows import Example
from tinylm.tokens.packing import Batch, RankShare, RowDataset
from training.context import RunContext
from training.stages.cached_array import cache_path, cached_array
from training.stages.sft import SFTData

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TaughtExample(Example):
    """An example with what the teacher says of its targets."""

    scores: np.ndarray = field(default_factory=lambda: np.empty(0))
    """(n, K) of numbers, or of pairs `id`, `log_prob`"""


class DistillData(SFTData):
    """The rows of fine-tuning; with distill.cached, each example brings the teacher's scores."""

    is_taught = False

    def teach(self, scores: np.ndarray) -> None:
        """Give each example its part of the scores (N, K), which are in the order of `all_rows`."""
        starts, first = {}, 0
        for row in self.all_rows():
            for example in row:
                starts[id(example)] = first
                first += n_targets(example)

        def taught(example: Example) -> TaughtExample:
            start = starts[id(example)]
            part = scores[start : start + n_targets(example)]
            return TaughtExample(example.ids, example.trained, example.location, part)

        self.by_source = [[taught(example) for example in source] for source in self.by_source]
        self.train_examples = [example for source in self.by_source for example in source]
        self.is_taught = True

    def all_rows(self) -> Iterator[list[Example]]:
        """The training rows of all sources, each once, in an order of their own."""
        for examples in self.by_source:
            yield from self.rows_of(examples)

    def train_dataset(self, share: RankShare | None = None) -> RowDataset:
        dataset = super().train_dataset(share)
        if self.is_taught:
            dataset = replace(dataset, collate=partial(add_scores, dataset.collate))
        return dataset


def n_targets(example: Example) -> int:
    """Its labels: its first token is only an input."""
    return int(example.trained[1:].sum())


def add_scores(
    collate: Callable[..., Batch],
    rows: Sequence[Sequence[TaughtExample] | None],
    places: Sequence[int],
) -> Batch:
    """The batch with the teacher's scores of its targets: `teacher_log_probs` (M, K) and, with
    distill.top_k, `teacher_ids` (M, K) int64.
    """
    scores = np.concatenate([example.scores for row in rows for example in row or ()])
    batch = collate(rows, places)
    if scores.dtype.names is None:
        return batch | {"teacher_log_probs": torch.from_numpy(scores)}
    log_probs, ids = np.ascontiguousarray(scores["log_prob"]), scores["id"].astype(np.int64)
    found = {"teacher_log_probs": torch.from_numpy(log_probs), "teacher_ids": torch.from_numpy(ids)}
    return batch | found


def cached_scores(
    context: RunContext, data: DistillData, teacher: Decoder | HFModel, fingerprint: str
) -> np.ndarray:
    """The scores (N, K) of all training targets by the teacher, from the file or computed now.

    The name of the file depends on the rows and their tokens, the teacher, and all settings that the
    numbers depend on.
    """
    config, distill = context.config, context.config.distill
    assert distill is not None
    n_classes = teacher.head.weight.size(0)
    is_whole = distill.top_k is None or distill.top_k >= n_classes
    dtype = "<f4" if is_whole else [("id", "<i4"), ("log_prob", "<f4")]
    shape = (sum(map(n_targets, data.train_examples)), n_classes if is_whole else distill.top_k)
    path = cache_path(
        config.data.cache_dir,
        "teacher",
        [
            data.fingerprints()["train"],
            data.tokenizer.fingerprint,
            fingerprint,
            [config.training.seq_len, config.data.packing],
            [distill.temperature, distill.top_k, config.hardware.precision],
        ],
    )

    def compute() -> Iterator[np.ndarray]:
        n_bytes = np.dtype(dtype).itemsize * shape[0] * shape[1]
        logger.info(f"teacher: reading {shape[0]:,} targets once, {size(n_bytes)} in {path}")
        yield from _score_rows(context, data, teacher.to(context.device), dtype)

    return cached_array(path, shape, dtype, compute)


def _score_rows(
    context: RunContext, data: DistillData, teacher: Decoder | HFModel, dtype: Any
) -> Iterator[np.ndarray]:
    """The scores of the targets of each chunk, in the order of `all_rows`."""
    config, device = context.config, context.device
    rows, size_of_batch = list(data.all_rows()), config.training.micro_batch_size
    precision = autocast_dtype(config.hardware.precision)
    autocast = torch.autocast(device, dtype=precision, enabled=precision is not None)
    teacher.eval()
    with torch.no_grad(), autocast:
        for start in range(0, len(rows), size_of_batch):
            part = rows[start : start + size_of_batch]
            batch = data.collate()(part, range(start, start + len(part)))
            inputs = {name: value.to(device) for name, value in extra_inputs(batch).items()}
            hidden = teacher.features(batch["input_ids"].to(device), **inputs).hidden
            for tokens in target_chunks(batch["labels"].flatten().to(device)):
                found = teacher_scores(hidden.flatten(0, 1)[tokens], teacher.head, config.distill)
                yield _as_array(found, dtype)


def _as_array(scores: TeacherScores, dtype: Any) -> np.ndarray:
    """The scores (M, K) as the file has them."""
    log_probs = scores.log_probs.float().cpu().numpy()
    if scores.ids is None:
        return log_probs
    array = np.empty(log_probs.shape, dtype)
    array["id"], array["log_prob"] = scores.ids.cpu().numpy(), log_probs
    return array
