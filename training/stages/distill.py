"""Distillation in stage sft (section `distill`): the data, the rows and the checkpoints are those of
fine-tuning; the loss also compares the model with a teacher, which reads the same rows, in training or
once before it (distill_cache.py). With distill.own_samples both read answers of the model itself
(own_samples.py).
"""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data import RunData
from model import BatchLoss, LanguageModule
from tinylm import model as models
from tinylm.checkpoint.initial import InitialModel, open_initial_model, reference_to
from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.eval.perplexity import byte_length_table
from tinylm.model.decoder import Decoder, extra_inputs
from tinylm.model.hf_model import HFModel
from tinylm.objectives.distillation import TeacherFeatures, TeacherScores, distillation_loss
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import make_tokenizer
from tinylm.tokens.packing import IGNORE_INDEX, Batch
from training.build import build_model
from training.context import RunContext
from training.resume import ResumeState
from training.stages.distill_cache import DistillData, cached_scores
from training.stages.own_samples import OwnSamples, is_own
from training.stages.sft import SFT, open_data

logger = logging.getLogger(__name__)


class DistillModule(LanguageModule):
    """Next-token prediction, and the distributions of a teacher, which is frozen and has no
    dropout. val_loss is the cross entropy alone, as in other runs.

    Args: as `LanguageModule`, and
        teacher: None if each batch has its scores.
        own: samples answers of the model; None without distill.own_samples.
    """

    train_columns = ("kl", "cross_entropy")

    def __init__(
        self,
        config: Config,
        decoder: Decoder | HFModel,
        byte_lengths: Tensor,
        stage: str,
        references: dict[str, Any],
        teacher: Decoder | HFModel | None,
        own: OwnSamples | None = None,
    ):
        super().__init__(config, decoder, byte_lengths, stage, references)
        assert config.distill is not None
        self.distill, self.own = config.distill, own
        self.teacher = None if teacher is None else teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "DistillModule":
        """Switch dropout on or off, in the student only."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def on_train_start(self) -> None:
        """Lightning's hook before the first step: open rollouts.jsonl."""
        if self.own is not None:
            self.own.rollouts.open_file()

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """The loss of `distillation_loss`, on the rows or on answers of the model to their prompts; a
        mixture of experts adds its balance loss.
        """
        distill, step, number = self.distill, self.progress.step, len(self._losses)
        k = step * self.config.training.grad_accum_steps + number
        if self.own is not None and is_own(k, distill.own_samples):
            batch = self.own.answers(self.decoder, batch, step + 1, number)
            distill = distill.model_copy(update={"weight": 1.0})
        teacher = self._teacher_of(batch)
        features = self._features(batch["input_ids"], **extra_inputs(batch))
        labels = batch["labels"].flatten()  # (B·T,)
        found = distillation_loss(
            features.hidden.flatten(0, 1),  # (B·T, D)
            self.decoder.head,
            teacher,
            labels,
            distill,
        )
        n_targets = (labels != IGNORE_INDEX).sum()
        balance = features.balance_loss * self.balance_coef
        metrics = torch.stack((found.kl.detach(), found.cross_entropy.detach()))
        return BatchLoss(found.loss, n_targets, n_targets, balance, metrics)

    @torch.no_grad()
    def _teacher_of(self, batch: Batch) -> TeacherFeatures | TeacherScores:
        """What the teacher says of a batch; draws no random number."""
        if self.teacher is None:
            return TeacherScores(batch["teacher_log_probs"], batch.get("teacher_ids"))
        hidden = self.teacher.features(batch["input_ids"], **extra_inputs(batch)).hidden
        return TeacherFeatures(hidden.flatten(0, 1), self.teacher.head)  # (B·T, D')


def build_module(
    context: RunContext, data: RunData, resume: ResumeState | None, initial: InitialModel | None
) -> DistillModule:
    """The student, and the teacher that distill.teacher names, also when the run is resumed.

    Raises:
        UserError: the teacher cannot be opened, does not fit, or is not the one of the checkpoint.
    """
    config = context.config
    assert config.distill is not None and isinstance(data, DistillData)
    model, references = build_model(context, resume, initial)
    teacher, reference = open_teacher(context, config.distill.teacher, data.tokenizer)
    was = None if resume is None else resume.state["reference"]
    if was is not None and was["fingerprint"] != reference["fingerprint"]:
        theirs = f"the teacher is {was['path']} with fingerprint {was['fingerprint']}"
        problem = f"{theirs}, but distill.teacher has {reference['fingerprint']}"
        raise UserError(resume.path, problem, "Set distill.teacher to that model")
    n_own, n_theirs = model.embedding.num_embeddings, teacher.head.weight.size(0)
    if model.head.weight.size(0) != n_theirs:
        problem = f"its vocabulary has {n_theirs} rows, that of the model {n_own}"
        raise UserError("distill.teacher", problem, "Set model.vocab_size to the same number")
    references["reference"] = reference
    byte_lengths = byte_length_table(data.tokenizer, n_own)
    if config.distill.cached:
        data.teach(cached_scores(context, data, teacher, reference["fingerprint"]))
        teacher = None
    own = None
    if config.distill.own_samples:
        own = OwnSamples(context, data.tokenizer, resume)
    return DistillModule(config, model, byte_lengths, context.stage, references, teacher, own)


def open_teacher(
    context: RunContext, name: str, tokenizer: Tokenizer
) -> tuple[Decoder | HFModel, dict[str, str]]:
    """The teacher with its weights, and the reference to it that checkpoints store."""
    config = context.config
    try:
        opened = open_initial_model(name)
        theirs = opened.tokenizer or make_tokenizer(opened.tokenizer_config)
        if opened.has_encoder:
            raise UserError((), "is an encoder-decoder", "Choose a decoder-only model")
        if theirs.fingerprint != tokenizer.fingerprint:
            problem = f"has tokenizer {theirs.fingerprint}, the run has {tokenizer.fingerprint}"
            raise UserError((), problem, "Teacher and student must read the same tokens")
        if opened.model.max_seq_len < config.training.seq_len:
            problem = f"has {opened.model.max_seq_len} positions, training.seq_len is "
            raise UserError((), f"{problem}{config.training.seq_len}", "Lower training.seq_len")
        teacher = opened.build(opened.model)
        if isinstance(teacher, HFModel) and config.data.packing == "packed":
            models.hf_model.check_packing(teacher)
    except UserError as error:
        raise error.within("distill.teacher") from None
    logger.info(f"teacher: {opened.summary}")
    return teacher, reference_to(opened, teacher, context.checkpoint_dir)


DISTILL = replace(
    SFT, open_data=partial(open_data, make_data=DistillData), build_module=build_module
)
