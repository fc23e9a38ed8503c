"""What happens between two optimizer steps: validate, log, save, show, and stop if asked.

`StepEnd` is the only Lightning callback. It acts at the end of a step, never inside an
accumulation, and calls the parts in order. Lightning's own validation loop, CSV logger and signal
handling are not used: they would validate twice or not at all after a resume, delete the metrics
that a resumed run continues, and save in the middle of an accumulation (docs/LOG.md).
"""

import logging
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

import training  # training.instruments is imported at the first row of metrics
from model import TrainingModule
from tinylm.common.console import duration, lead_nowhere, readable, short
from tinylm.common.errors import Diverged, UserError
from tinylm.common.platform import STOP_SIGNALS
from tinylm.optim.schedule import should_stop
from tinylm.runs.metrics_csv import MetricsFile, MetricsRow
from tinylm.runs.record import RunRecord
from tinylm.tokenizer.base import Tokenizer
from training.checkpoints import Checkpoints, restore_optimizer

if TYPE_CHECKING:
    from training.instruments import Instruments
    from training.loggers import RunLogger
    from training.task_scores import TaskScores

logger = logging.getLogger(__name__)

Sample = Callable[[TrainingModule, Tokenizer], str]
# Digits of the validation metrics on the screen; metrics.csv has all of them.
DIGITS = {
    "val_loss": 4,
    "val_ppl": 2,
    "val_bpb": 3,
    "val_accuracy": 3,
    "val_margin": 3,
    "val_reward": 3,
    "val_pass_1": 3,
    "val_pass_k": 3,
    "val_majority": 3,
    "val_auc": 3,
    "val_calibration_error": 3,
}


@dataclass(eq=False)
class StepEnd(L.Callback):
    """Calls the parts of a run at its start and at the end of each step."""

    signals: "StopSignals"
    validation: "Validation"
    metrics: "Metrics"
    checkpoints: Checkpoints
    display: "ProgressDisplay"
    record: RunRecord
    state: dict[str, Any] | None
    """of the checkpoint to continue from"""
    is_over: bool = False
    """whether all steps are done, or the run stopped early or by a signal"""
    ended_step: int = 0
    """the last step after which `after_step` was called"""

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Restore; then validate the restored step if the run was killed before its validation."""
        assert isinstance(module, TrainingModule)
        # Now: Lightning has installed its own handlers, which would stop inside a step.
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # by nohup, or by a background shell
                signal.signal(number, self.signals.note)
        if self.state is not None:
            restore_optimizer(trainer, module, self.state)
            self.state = None  # free its memory
        score = None
        if module.progress.step:
            score = self.validation.run_if_due(trainer, module, is_owed=True)
        self.metrics.start(module.progress.tokens)
        if score is not None:
            self.metrics.complete_row(module, score)
            self._save_and_stop(trainer, module)
            self._renew_record(module)
        self.display.start(module.progress.step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Lightning's hook after every micro-batch."""
        assert isinstance(module, TrainingModule)
        if (batch_idx + 1) % module.config.training.grad_accum_steps == 0:
            self.after_step(trainer, module)
        module.waits_since = time.monotonic()

    def after_step(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Validate, log, save, show: the checkpoint contains the validation,
        and the metrics are on disk before it.
        """
        score = self.validation.run_if_due(trainer, module)
        self.metrics.log_if_due(module, score, self.validation.seconds)
        self.ended_step = module.progress.step
        self._save_and_stop(trainer, module)
        if score is not None or self.is_over:
            self._renew_record(module)
        self.display.advance(module.progress.step)

    def _save_and_stop(self, trainer: L.Trainer, module: TrainingModule) -> None:
        """Save if it is due, and tell Lightning to stop after a signal on any rank
        or without improvement.

        Raises:
            Diverged: this step's val_loss or a weight is not finite; nothing is saved.
        """
        training, progress = module.config.training, module.progress
        if progress.validated(progress.step) and not math.isfinite(progress.val_losses[-1]):
            found = f"step {progress.step}: val_loss is {progress.val_losses[-1]}"
            raise Diverged(f"{found}. The weights were not saved. Lower training.lr")
        stops_early = should_stop(progress.val_losses, training.early_stopping_patience)
        stops = self.signals.agree(trainer) is not None or stops_early
        final = stops_early or progress.step == training.max_steps
        self.checkpoints.save_if_due(trainer, module, stops=stops, final=final)
        self.is_over = stops or final
        trainer.should_stop = stops

    def _renew_record(self, module: TrainingModule) -> None:
        """Bring the report of the run to this step."""
        facts, progress = self.record.facts, module.progress
        facts.step, facts.tokens = progress.step, progress.tokens
        facts.passes = module.passes_at(progress.step, module.trainer.world_size)
        facts.best_step = progress.best_step
        facts.best_val_loss = None if progress.best_step is None else progress.best_val_loss
        began = time.monotonic()
        self.record.renew()
        self.metrics.last_time += time.monotonic() - began  # not training time

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Lightning's hook after the last step: save if the batches ended too early."""
        assert isinstance(module, TrainingModule)
        if not self.is_over and self.ended_step == module.progress.step > 0:
            self.checkpoints.save_if_due(trainer, module, stops=True, final=False)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Lightning's hook after the last step."""
        self.display.stop()

    def on_exception(
        self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException
    ) -> None:
        """Lightning's hook before an error ends the run. Some errors, such as an answer that cannot
        be scored, save the last whole step first: the user corrects it, and nothing is lost.
        """
        self.display.stop()
        assert isinstance(module, TrainingModule)
        saves = isinstance(exception, UserError) and exception.saves_first
        if saves and self.ended_step == module.progress.step > 0:
            self.checkpoints.save_if_due(trainer, module, stops=True, final=False)


class StopSignals:
    """After a stop signal (Ctrl-C, SIGTERM, ...) the run stops at the end of the current step,
    after saving.
    """

    received: int | None = None
    """the number of the first signal that this process received"""
    agreed: int | None = None
    """the number of a signal that one of the ranks received, after which all of them stop"""

    def agree(self, trainer: L.Trainer) -> int | None:
        """The signal that stops every rank after this step; None if none received one."""
        self.agreed = self.received
        if trainer.world_size > 1:
            number = torch.tensor(self.received or 0, device=trainer.strategy.root_device)
            self.agreed = int(trainer.strategy.reduce(number, reduce_op="max")) or None
        return self.agreed

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of the stop signals."""
        self.received = self.received or number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as in shells: 130 for SIGINT; 0 without a signal."""
        return 0 if self.agreed is None else 128 + self.agreed


@dataclass
class Validation:
    """Validates every training.val_every_steps steps and after the last one,
    and shows a sample if asked.
    """

    signals: StopSignals
    """interrupt a validation"""
    tokenizer: Tokenizer
    show: Callable[[str], None]
    """displays a line"""
    sample: Sample | None
    """generates a sample; None if training.sample_prompt is null"""
    record: RunRecord
    """keeps the samples"""
    tasks: "TaskScores | None" = None
    """scored at validations; None if training.eval_tasks is null"""
    seconds: float = 0.0
    """the time that the validation of this step took"""

    def run_if_due(
        self, trainer: L.Trainer, module: TrainingModule, *, is_owed: bool = False
    ) -> dict[str, float] | None:
        """val_loss and the stage's other metrics; None if this step has no validation,
        or it was interrupted.

        A resumed run makes up for an interrupted validation. So no signal interrupts one that is
        owed, or that of the last step, or one with several ranks: a rank that left it early would
        leave the others waiting.
        """
        training, progress = module.config.training, module.progress
        started, self.seconds = time.monotonic(), 0.0
        is_last = progress.step == training.max_steps
        is_due = is_last or progress.step % training.val_every_steps == 0
        if not is_due or progress.validated(progress.step):
            return None
        can_stop = not (is_owed or is_last or trainer.world_size > 1)
        score = self._score(trainer, module, can_stop=can_stop)
        if score is None:
            return None
        progress.validations.append([progress.step, score["val_loss"]])
        if len(progress.validations) == 1 and trainer.is_global_zero:
            note = trainer.datamodule.validation_note()
            if note is not None:
                logger.info(note)
        if self.tasks is not None and self.tasks.is_due(progress.step, training):
            score |= self.tasks.score(module, self.show if trainer.is_global_zero else None)
        for name, measured in progress.measured.items():
            if name in score:
                sign = 1 if is_lower_better(name) else -1
                measured.append([progress.step, sign * score[name]])
        if self.sample is not None:
            module.decoder.eval()
            # on every rank: a sharded model needs all of them
            text = self.sample(module, self.tokenizer)
            module.decoder.train()
            if trainer.is_global_zero:
                self.show(f"sample: {readable(text).strip()}")
                self.record.add_sample(progress.step, text.strip())
        elif module.validation_sample is not None and trainer.is_global_zero:
            self.show(f"sample: {readable(module.validation_sample)}")
            self.record.add_sample(progress.step, module.validation_sample)
        self.seconds = time.monotonic() - started
        return score

    def _score(
        self, trainer: L.Trainer, module: TrainingModule, *, can_stop: bool
    ) -> dict[str, float] | None:
        """The metrics of all validation batches of all ranks; None if a signal interrupted them."""
        assert trainer.datamodule is not None
        totals: list[float] = []
        module.eval()
        with torch.no_grad():
            for index, batch in enumerate(trainer.datamodule.val_dataloader()):
                if can_stop and self.signals.received is not None:
                    break
                batch = trainer.strategy.batch_to_device(batch)
                sums = trainer.strategy.validation_step(batch, index)
                sums = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
                totals = [a + b for a, b in zip(totals or [0.0] * len(sums), sums, strict=True)]
        module.train()
        if can_stop and self.signals.received is not None:
            return None
        return module.val_metrics(totals)


def is_lower_better(measure: str) -> bool:
    """Whether a column of metrics.csv is a loss, a perplexity or an error.

    >>> is_lower_better("val_ppl"), is_lower_better("sst2_accuracy")
    (True, False)
    """
    return measure.endswith(("loss", "ppl", "bpb", "error"))


@dataclass
class Metrics:
    """Logs a row every training.log_every_steps steps and at every validation."""

    file: MetricsFile | None
    """metrics.csv; None on every rank but 0"""
    loggers: "list[RunLogger]"
    """named by training.loggers"""
    show: Callable[[MetricsRow], None]
    """displays a row"""
    flops_per_token: int | None
    """of the model; None if it is not known"""
    instruments: "Instruments | None" = None
    """made at the first row: what they measure for that is not training time"""
    last_time: float = 0.0
    """of the last row"""
    last_tokens: int = 0

    def start(self, tokens: int) -> None:
        """Start to measure the speed."""
        self.last_time, self.last_tokens = time.monotonic(), tokens

    def log_if_due(
        self, module: TrainingModule, score: dict[str, float] | None, validation_seconds: float
    ) -> None:
        """Log a row if this step is due or has a validation,
        which does not count as training time.
        """
        progress, settings = module.progress, module.config.training
        is_due = progress.step % settings.log_every_steps == 0
        is_due = is_due or progress.step == settings.max_steps
        if not is_due and score is None:
            return
        if is_due:
            progress.finish_metrics_row()
        now = time.monotonic()
        seconds = now - self.last_time - validation_seconds
        tokens_per_s = (progress.tokens - self.last_tokens) / max(seconds, 1e-9)
        self.last_time, self.last_tokens = now, progress.tokens
        if self.file is not None:
            if self.instruments is None:
                self.instruments = training.instruments.Instruments(module, self.flops_per_token)
                self.last_time = time.monotonic()
            row = self._row(self.file.columns, module, score, tokens_per_s)
            row |= self.instruments.read(module, tokens_per_s, seconds)
            self.file.append(row)
            self._show(row)

    def complete_row(self, module: TrainingModule, score: dict[str, float]) -> None:
        """Add an owed validation to the row of its step, which an earlier process wrote."""
        if self.file is not None:
            row = self._row(self.file.columns, module, score, None)
            self.file.complete(row)
            self._show(row)

    def _row(
        self,
        columns: tuple[str, ...],
        module: TrainingModule,
        score: dict[str, float] | None,
        tokens_per_s: float | None,
    ) -> MetricsRow:
        progress = module.progress
        row: MetricsRow = dict.fromkeys(columns)
        if "skipped_steps" in row:
            row["skipped_steps"] = progress.skipped_steps
        if "passes" in row:
            row["passes"] = module.passes_at(progress.step, module.trainer.world_size)
        if "passes[0]" in row:
            data, world_size = module.trainer.datamodule, module.trainer.world_size
            for number, passes in enumerate(data.source_passes(progress.step, world_size)):
                row[f"passes[{number}]"] = passes
        row |= {
            "step": progress.step,
            "train_loss": progress.train_loss,
            "lr": progress.lr,
            "grad_norm": progress.grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": tokens_per_s,
        }
        # strict=False: there are no means before the first row of them
        row |= dict(zip(module.train_columns, progress.train_metrics, strict=False))
        return row | (score or {})

    def _show(self, row: MetricsRow) -> None:
        values = {name: value for name, value in row.items() if value is not None}
        step = values.pop("step")
        for log in self.loggers:
            log.log_metrics(values, step=int(step))
        self.show(row)


class StderrConsole(Console):
    """Stderr for people; a closed pipe (`2>&1 | head`) does not end the run."""

    def on_broken_pipe(self) -> None:
        """Called by rich, whose own version exits."""
        lead_nowhere(sys.stderr)


class ProgressDisplay:
    """Shows how far a run is, its metrics and its speed:
    a bar on a terminal, else a line for each row of metrics.
    """

    def __init__(self, max_steps: int):
        self.console, self.max_steps = StderrConsole(stderr=True), max_steps
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=max_steps, note="")
        self.started, self.first_step = time.monotonic(), 0

    def start(self, step: int) -> None:
        """Show the bar at the step that the run starts from."""
        self.started, self.first_step = time.monotonic(), step
        self.advance(step)
        self.bar.start()

    def advance(self, step: int) -> None:
        """Move the bar to `step`."""
        self.bar.update(self.task, completed=step)

    def stop(self) -> None:
        """Leave the bar as it is, so that other lines follow it."""
        self.bar.stop()

    def show_row(self, row: MetricsRow) -> None:
        """Show a row of metrics: beside the bar, and as a line if it has a validation
        or if there is no bar.
        """
        loss = "" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
        note = f"{loss}  lr {row['lr']:.2e}  {short(row['tokens_per_s'] or 0)} tokens/s"
        validation = ""
        for name, value in row.items():
            if name in DIGITS and value is not None:
                validation += f"  {name} {value:.{DIGITS[name]}f}"
        self.bar.update(self.task, note=note)
        if validation or not self.console.is_terminal:
            eta = "" if self.console.is_terminal else f"  ETA {duration(self._seconds_left(row))}"
            self.show(f"step {row['step']:>6}/{self.max_steps}  {note}{validation}{eta}")

    def show(self, text: str) -> None:
        """Show a text above the bar, on a terminal wrapped between words; nothing in it is
        interpreted as markup.
        """
        whole = not self.console.is_terminal
        self.console.print(text, markup=False, highlight=False, soft_wrap=whole)

    def _seconds_left(self, row: MetricsRow) -> float:
        step = int(row["step"] or 0)
        n_done = step - self.first_step
        if n_done == 0:
            return 0.0
        return (time.monotonic() - self.started) / n_done * (self.max_steps - step)
