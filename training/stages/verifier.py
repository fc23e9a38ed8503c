"""Stage verifier: an encoder learns to tell right answers to a problem from wrong ones.

problems ─▶ row order ─▶ problem with answer (B', T) for every answer; wrong ones drawn by (seed, place)
"""

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data import RunData
from model import BatchLoss, TrainingModule
from tinylm.checkpoint.format import NO_REFERENCES
from tinylm.checkpoint.initial import InitialModel
from tinylm.checkpoint.load import build_judge
from tinylm.common.console import progress_bar
from tinylm.config.schema import Config
from tinylm.eval.sampled_answers import answerer
from tinylm.eval.tasks.data import problems_of
from tinylm.model.decoder import Decoder
from tinylm.model.verifier import Verifier, verifier_class
from tinylm.objectives.verifier import verifier_loss, verifier_metrics, verifier_sums
from tinylm.rows.inspect import InspectedRow
from tinylm.rows.numbers import NUMBER
from tinylm.rows.skipped_rows import RowReport
from tinylm.rows.verifier_data import (
    Problem,
    collate_problems,
    filter_problems,
    fingerprint_of_problems,
    without_validation_problems,
)
from tinylm.text.sources import Which
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.packing import IGNORE_INDEX, Batch, RankShare, RowDataset
from training.build import build_initial
from training.context import RunContext
from training.resume import ResumeState
from training.run import Stage
from training.stages.sft import find_data, log_contents
from training.support import require_supported
from training.tokenizer import learn_from_texts

logger = logging.getLogger(__name__)


class VerifierData(RunData):
    """The batches of a verifier's run."""

    def __init__(self, config: Config, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        assert config.verifier is not None
        self.n_wrong = config.verifier.n_wrong
        self.notes: list[str] = []
        """what the user should know about the rows, a line each"""
        self.train_problems: list[Problem] = []
        self.val_problems: list[Problem] = []

    def prepare(self, answer: Callable[[list[Problem]], list[Problem]] = list) -> None:
        """Read the rows of both splits; problems of validation are removed from training.

        Args:
            answer: adds sampled answers of a model to problems.

        Raises:
            UserError: see `read_problems` and `filter_problems`.
        """
        seq_len, max_bad = self.config.training.seq_len, self.config.data.skip_bad_rows
        train = RowReport("train", seq_len, lost="the start of a problem", max_bad=max_bad)
        val = RowReport("val", seq_len, lost="the start of a problem", max_bad=max_bad)
        train_rows = problems_of(self.config, "train", train)
        val_rows = problems_of(self.config, "val", val)
        train_rows = without_validation_problems(train_rows, val_rows, train)
        self.train_problems = self._filter(answer(train_rows), train)
        self.val_problems = self._filter(answer(val_rows), val)
        self.notes = [*train.notes(), *val.notes()]

    def describe(self) -> str:
        """One line about the training and validation data."""
        n_train, n_val = self._n_answers(self.train_problems), self._n_answers(self.val_problems)
        n_right = 0
        for problem in self.train_problems:
            n_right += problem.is_right + sum(sample.right for sample in problem.samples)
        return (
            f"data: {self.config.data.dataset}: train {len(self.train_problems):,} "
            f"problems with {n_train:,} answers ({n_right / n_train:.0%} of them right), "
            f"validation {len(self.val_problems):,} problems with {n_val:,} answers; tokenizer "
            f"{self.config.tokenizer.kind}, vocabulary {self.tokenizer.vocab_size}"
        )

    def fingerprints(self) -> dict[str, str]:
        """Identify the data: two runs with equal fingerprints,
        settings and tokenizers see the same pairs.
        """
        return {
            "train": fingerprint_of_problems(self.train_problems),
            "val": fingerprint_of_problems(self.val_problems),
        }

    def train_dataset(self, share: RankShare | None = None) -> RowDataset:
        return self.training_rows(self.train_problems, self.collate("train"), share)

    def val_dataset(self, share: RankShare | None = None) -> RowDataset:
        """The wrong answers are the same in every validation."""
        return self.validation_rows(self.val_problems, self.collate("val"), share)

    def collate(self, which: Which) -> "partial[Batch]":
        """`collate_problems` with the settings of the run."""
        return partial(
            collate_problems,
            tokenizer=self.tokenizer,
            seq_len=self.config.training.seq_len,
            n_wrong=self.n_wrong,
            seed=f"{self.config.training.seed} {which}",
        )

    def inspect_row(self, heading: str, row: Problem, place: int) -> Iterator[InspectedRow]:
        """Each answer to print; the labels mark where a wrong answer differs from the right one."""
        batch = self.collate("train")([row], [place])
        for number, seen in enumerate(batch["attention_mask"]):
            ids, errors = batch["input_ids"][number][seen], batch["error_mask"][number][seen]
            labels = torch.where(errors, ids, IGNORE_INDEX).roll(-1)
            right = "right" if batch["label"][number] else "wrong"
            name = f"{heading}, answer {number + 1}, {right}: {row.location}"
            yield InspectedRow(name, ids.tolist(), labels.tolist(), None)

    def _filter(self, problems: list[Problem], report: RowReport) -> list[Problem]:
        return filter_problems(problems, report, self.tokenizer, n_wrong=self.n_wrong)

    def _n_answers(self, problems: list[Problem]) -> int:
        n_answers = 0
        for problem in problems:
            can_be_changed = problem.label is None and NUMBER.search(problem.answer) is not None
            n_answers += 1 + self.n_wrong * can_be_changed + len(problem.samples)
        return n_answers


# --- the module ---


class VerifierModule(TrainingModule):
    """An encoder learns to tell right answers from wrong ones;
    other stages train a decoder in its place.
    """

    train_columns = ("accuracy",)
    val_columns = (
        "val_accuracy",
        "val_accuracy_low",
        "val_accuracy_high",
        "val_majority",
        "val_auc",
        "val_calibration_error",
    )

    def __init__(self, config: Config, verifier: Verifier, references: dict[str, Any]):
        super().__init__(config, verifier, "verifier", references)
        assert config.verifier is not None
        n_answers = 1 + config.verifier.n_wrong + config.verifier.n_sampled
        self.normalizer = config.training.micro_batch_size * n_answers

    def configure_model(self) -> None:
        """Lightning's hook after devices and processes are set up: compile."""
        self._error_logits = self.decoder.error_logits
        if self.config.hardware.compile:
            self._error_logits = torch.compile(self.decoder.error_logits)

    def batch_loss(self, batch: Batch, *, label_smoothing: float) -> BatchLoss:
        """Cross entropy of which token is wrong, or none."""
        right = batch["label"]  # (B,)
        logits = self._error_logits(batch["input_ids"], batch["attention_mask"])  # (B, T)
        n_correct = ((logits.logsumexp(dim=1) <= 0) == right.bool()).sum()
        return BatchLoss(
            loss=verifier_loss(logits, right, batch["error_mask"]),
            n_targets=torch.tensor(len(right), device=right.device),
            n_tokens=batch["attention_mask"].sum(),
            regularizer=logits.new_zeros(()),
            metrics=n_correct.float()[None],
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The sum of the losses, then how often each logit occurs among wrong
        and among right answers.
        """
        right = batch["label"]
        if len(right):
            logits = self._error_logits(batch["input_ids"], batch["attention_mask"])
            error_mask = batch["error_mask"]
        else:  # the share of a rank that has no problem left
            logits = torch.zeros(0, 1, device=right.device)
            error_mask = logits.bool()
        return verifier_sums(logits, right, error_mask)

    def val_metrics(self, totals: list[float]) -> dict[str, float]:
        return verifier_metrics(totals)


# --- building the stage ---


def learn_verifier_tokenizer(config: Config) -> Tokenizer:
    """A tokenizer of kind bpe, unigram or char, learned from the training problems."""

    def texts() -> Iterator[str]:
        for problem in problems_of(config, "train"):
            yield f"{problem.question.full_text}\n{problem.answer}"

    return learn_from_texts(config.tokenizer, texts())


def open_data(context: RunContext, tokenizer: Tokenizer) -> VerifierData:
    """The problems of both splits with right and wrong answers;
    logs their number and the skipped rows.
    """
    data = prepare_data(context, tokenizer)
    log_contents(data.describe(), data.notes)
    return data


def prepare_data(context: RunContext, tokenizer: Tokenizer) -> VerifierData:
    """The problems of both splits; with verifier.sampled_from,
    the model that it names answers them too.
    """
    config = context.config
    assert config.verifier is not None
    data = VerifierData(config, tokenizer)
    if config.verifier.sampled_from is None:
        data.prepare()
    else:
        with progress_bar() as on_progress:
            data.prepare(answerer(config, config.verifier, context.device, on_progress))
    return data


def build_module(
    context: RunContext, data: RunData, resume: ResumeState | None, initial: InitialModel | None
) -> VerifierModule:
    """A verifier with the weights of the checkpoint, else of a decoder,
    else new ones that depend on the seed alone.
    """
    config = context.config
    assert config.verifier is not None
    kind = verifier_class(config.verifier.kind)
    if resume is not None:
        verifier = build_judge(kind, config.model, resume.state["weights"])
    else:
        torch.manual_seed(config.training.seed)
        verifier = kind(config.model)
    if resume is None and initial is not None:
        decoder = build_initial(config, initial)
        if not isinstance(decoder, Decoder):
            require_supported(context.stage, config, context.device, frozenset({"hf_model"}))
        verifier.init_from_decoder(decoder)
    verifier.separator_id = data.tokenizer.eos_id
    return VerifierModule(config, verifier, dict(NO_REFERENCES))


VERIFIER = Stage(
    name="verifier",
    find_data=find_data,
    learn_tokenizer=learn_verifier_tokenizer,
    open_data=open_data,
    build_module=build_module,
    next_command="python infer.py --ckpt MODEL --prompt PROBLEM --best-of 8 --verifier {model}",
)
