"""What happens between optimizer steps, in this order: validation, metrics, checkpoints, and the wish to stop.

Each is a Lightning callback that acts at step boundaries only, never inside an accumulation. Lightning's own versions are
not used, for reasons that docs/LOG.md tells: its checkpoints are not written safely, its CSV logger deletes what a resumed
run should continue, its signal handling saves in the middle of an accumulation.
"""

import copy
import csv
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import OptimStateKeyType

from model import Progress, TrainingModule
from tinylm import generate, rows
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.format import FORMAT, SCHEMA
from tinylm.common.console import lead_nowhere, readable
from tinylm.common.errors import writing
from tinylm.common.units import duration, short
from tinylm.config.schema import Config
from tinylm.model.lora import adapter_weights
from tinylm.optim.schedule import should_stop
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)

COLUMNS = (
    "step",
    "train_loss",
    "val_loss",
    "val_ppl",
    "val_bpb",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
)
# Digits of what validation shows on the terminal; metrics.csv has them all.
SHOWN = {
    "val_loss": 4,
    "val_ppl": 2,
    "val_bpb": 3,
    "val_accuracy": 3,
    "val_margin": 3,
    "val_majority": 3,
    "val_auc": 3,
    "val_calibration_error": 3,
}
Row = dict[str, float | int | None]


class StepCallback(L.Callback):
    """Calls `after_step` once an optimizer step, when it is whole."""

    def after_step(self, trainer: L.Trainer, stage: TrainingModule) -> None:
        """What the callback is for."""
        raise NotImplementedError

    def on_train_batch_end(
        self, trainer: L.Trainer, stage: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook after every micro-batch."""
        assert isinstance(stage, TrainingModule)
        if (batch_idx + 1) % stage.config.training.grad_accum_steps == 0:
            self.after_step(trainer, stage)


# --- resuming ---------------------------------------------------------------------------------------------------------


class Restore(L.Callback):
    """Puts the optimizer and the gradient scaler of a checkpoint back, once Lightning has made them; it must run first.

    Lightning's own resume is not used: it restores loops that count micro-batches, and ours count nothing (`data.py`).
    """

    def __init__(self, payload: dict[str, Any] | None):
        self.payload = payload

    def progress(self) -> Progress:
        """Where the checkpoint's run was."""
        assert self.payload is not None
        return Progress(**copy.deepcopy(self.payload["progress"]))

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Restore, and let go of the file's contents."""
        if self.payload is not None:
            groups = trainer.optimizers[0].param_groups
            settings = [
                {name: value for name, value in group.items() if name != "params"}
                for group in groups
            ]
            self._load_optimizer(trainer, stage, self.payload["optimizer"])
            for group, own in zip(trainer.optimizers[0].param_groups, settings, strict=True):
                group.update(
                    own
                )  # the settings are the config's, which --allow-changes may have changed
            trainer.precision_plugin.load_state_dict(self.payload["precision"])
            self.payload = None

    def _load_optimizer(
        self, trainer: L.Trainer, stage: L.LightningModule, state: dict[str, Any]
    ) -> None:
        if not isinstance(trainer.strategy, ModelParallelStrategy):
            trainer.strategy.load_optimizer_state_dict({"optimizer_states": [state]})
            return
        # The checkpoint has whole tensors by number; torch cuts them up by the names of their weights.
        named = FSDP.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, stage)
        set_optimizer_state_dict(
            stage, trainer.optimizers[0], named, options=StateDictOptions(full_state_dict=True)
        )


# --- stopping ---------------------------------------------------------------------------------------------------------


class StopSignals(L.Callback):
    """SIGINT and SIGTERM as a wish that is granted at the next step boundary, after saving."""

    def __init__(self) -> None:
        self.received: int | None = None

    def install(self) -> None:
        """Take the two signals over, from whoever has them."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Lightning has installed its own handlers by now, which would end the run inside an accumulation."""
        self.install()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    @property
    def exit_code(self) -> int:
        """130 for SIGINT and 143 for SIGTERM, as shells have it; 0 without a signal."""
        return 0 if self.received is None else 128 + self.received


def wishes_to_stop(trainer: L.Trainer, stage: TrainingModule, signals: StopSignals) -> bool:
    """Whether a signal came, on any rank, or validation has stopped improving."""
    early = should_stop(stage.progress.val_losses, stage.config.training.early_stopping_patience)
    return early or trainer.strategy.reduce_boolean_decision(
        signals.received is not None, all=False
    )


# --- validation -------------------------------------------------------------------------------------------------------


class Validation(StepCallback):
    """Validates every training.val_every_steps steps and at the last one, and shows a sample if asked."""

    def __init__(self, signals: StopSignals, tokenizer: Tokenizer, show: Callable[[str], None]):
        self.signals, self.tokenizer, self.show = signals, tokenizer, show
        self.score: dict[str, float] | None = None
        self.seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """A run that was stopped between a step and its validation owes that validation."""
        assert isinstance(stage, TrainingModule)
        if stage.progress.step:
            self.after_step(trainer, stage)

    def after_step(self, trainer: L.Trainer, stage: TrainingModule) -> None:
        """Validate if it is time."""
        self.score, self.seconds = None, 0.0
        training, step, began = stage.config.training, stage.progress.step, time.monotonic()
        due = step % training.val_every_steps == 0 or step == training.max_steps
        if not due or stage.progress.validated(step):
            return
        # Ranks see a signal at different moments, and one that leaves early would leave the others waiting.
        self.score = validate(
            trainer, stage, lambda: trainer.world_size == 1 and self.signals.received is not None
        )
        if self.score is None:
            return
        stage.progress.validations.append([step, self.score["val_loss"]])
        if (
            training.sample_prompt is not None
        ):  # every rank writes it, since a sharded model takes them all; rank 0 shows it
            stage.decoder.eval()
            text = self._sample(stage, training.sample_prompt)
            stage.decoder.train()
            if trainer.is_global_zero:
                self.show(f"sample: {readable(training.sample_prompt + text)}")
        self.seconds = time.monotonic() - began

    def _sample(self, stage: TrainingModule, prompt: str) -> str:
        """The model's continuation of `prompt`; its answer, in the template, if it is fine-tuned."""
        engine = generate.engine.Engine(stage.decoder, self.tokenizer)
        template = None
        if stage.stage in CHAT_STAGES:
            name = stage.config.data.template
            template = rows.template_factory.make_template(name, self.tokenizer)
        formatted = generate.chat.format_prompt(engine, prompt, template)
        completions = engine.generate(
            formatted.prompt, stage.config.sampling, stop_ids=formatted.stop_ids
        )
        return completions[0].text


def validate(
    trainer: L.Trainer, stage: TrainingModule, interrupted: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """val_loss and what else the stage makes of the validation rows, over all ranks; None if it was interrupted."""
    assert trainer.datamodule is not None
    totals: list[float] = []
    stage.eval()
    with torch.no_grad():
        for index, batch in enumerate(trainer.datamodule.val_dataloader()):
            if interrupted():
                break
            batch = trainer.strategy.batch_to_device(batch)
            sums = trainer.strategy.reduce(
                trainer.strategy.validation_step(batch, index), reduce_op="sum"
            )
            totals = [
                total + part
                for total, part in zip(totals or [0.0] * len(sums), sums.tolist(), strict=True)
            ]
    stage.train()
    return None if interrupted() else stage.val_metrics(totals)


# --- metrics ----------------------------------------------------------------------------------------------------------


class MetricsFile:
    """metrics.csv of one run: appended to, continued by a resumed run, no step in it twice.

    `further` are columns that only some stages have. `aside` keeps an earlier file under another name: one of another run, or of
    another branch of this one.
    """

    def __init__(self, path: Path, resume_step: int, *, further: tuple[str, ...] = (), aside: bool):
        self.path, self.columns = path, (*COLUMNS, *further)
        with writing(path, "training.log_dir"):
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = self._rows_until(resume_step) if path.exists() else []
            if aside and path.exists():
                os.replace(path, self._free_name())
            self._write(rows)

    def _free_name(self) -> Path:
        number = 1
        while (path := self.path.with_name(f"metrics.{number}.csv")).exists():
            number += 1
        return path

    def _rows_until(self, step: int) -> list[dict[str, str]]:
        """The whole rows up to `step`; what a killed run wrote after its last checkpoint will be written again."""
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.DictReader(line.replace("\0", "") for line in file))
        return [
            row
            for row in rows
            if set(row) == set(self.columns)
            and None not in row.values()
            and row["step"].isdigit()
            and int(row["step"]) <= step
        ]

    def _write(self, rows: list[dict[str, str]]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)

    def append(self, row: Row) -> None:
        """One more row; numbers are written so that reading them gives the same bits."""
        with (
            writing(self.path, "training.log_dir"),
            open(self.path, "a", newline="", encoding="utf-8") as file,
        ):
            csv.DictWriter(file, self.columns).writerow(_as_text(row, self.columns))

    def complete(self, row: Row) -> None:
        """Add what `row` knows to the row of its step, the last one, or append it."""
        step = row["step"] or 0
        with writing(self.path, "training.log_dir"):
            rows = self._rows_until(step)
            old = rows.pop() if rows and rows[-1]["step"] == str(step) else {}
            self._write(
                [
                    *rows,
                    old
                    | {
                        name: text
                        for name, text in _as_text(row, self.columns).items()
                        if text or name not in old
                    },
                ]
            )


def _as_text(row: Row, columns: tuple[str, ...]) -> dict[str, str]:
    return {name: "" if row[name] is None else repr(row[name]) for name in columns}


class Metrics(StepCallback):
    """Writes a row of metrics every training.log_every_steps steps and at every validation."""

    def __init__(self, validation: Validation, show: Callable[[Row], None]):
        self.validation, self.show = validation, show
        self.file: MetricsFile | None = None
        self.loggers: list[Logger] = []
        self.since, self.tokens_then = time.monotonic(), 0

    def open(self, file: MetricsFile, loggers: list[Logger]) -> None:
        """Where rank 0 writes; the other ranks have nowhere."""
        self.file, self.loggers = file, loggers

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Start the clock; write the row of a validation that was owed."""
        assert isinstance(stage, TrainingModule)
        self.since, self.tokens_then = time.monotonic(), stage.progress.tokens
        if self.validation.score is not None and self.file is not None:
            row = self._row(stage, None)
            self.file.complete(row)
            self._tell(row)

    def after_step(self, trainer: L.Trainer, stage: TrainingModule) -> None:
        """Write a row if it is time; only rank 0 does."""
        progress, training = stage.progress, stage.config.training
        score = self.validation.score
        log_now = (
            progress.step % training.log_every_steps == 0 or progress.step == training.max_steps
        )
        if not log_now and score is None:
            return
        if log_now:
            progress.start_row()
        now = time.monotonic()
        training_seconds = now - self.since - self.validation.seconds
        speed = (progress.tokens - self.tokens_then) / max(training_seconds, 1e-9)
        self.since, self.tokens_then = now, progress.tokens
        if self.file is not None:
            row = self._row(stage, speed)
            self.file.append(row)
            self._tell(row)

    def _row(self, stage: TrainingModule, speed: float | None) -> Row:
        progress = stage.progress
        known: Row = {
            "step": progress.step,
            "train_loss": progress.train_loss,
            "lr": progress.lr,
            "grad_norm": progress.grad_norm,
            "tokens": progress.tokens,
            "tokens_per_s": speed,
        }
        measured = zip(
            stage.train_columns, progress.train_metrics, strict=False
        )  # no means before the first row of them
        return (
            dict.fromkeys((*COLUMNS, *stage.train_columns, *stage.val_columns))
            | known
            | dict(measured)
            | (self.validation.score or {})
        )

    def _tell(self, row: Row) -> None:
        for logger in self.loggers:
            logger.log_metrics(
                {k: v for k, v in row.items() if v is not None and k != "step"},
                step=int(row["step"] or 0),
            )
        self.show(row)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def checkpoint_aliases(progress: Progress, *, final: bool) -> list[str]:
    """The names beside step-N.ckpt that the checkpoint of this step has."""
    best = progress.validated(progress.step) and progress.val_losses[-1] <= min(progress.val_losses)
    return ["last.ckpt"] + ["best.ckpt"] * best + ["final.ckpt"] * final


class Checkpoints(StepCallback):
    """Saves every training.save_every_steps steps, when validation is best, and at the end, which a signal may bring on."""

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        validation: Validation,
        signals: StopSignals,
        fingerprints: dict[str, str],
    ):
        self.folder = Path(config.training.checkpoint_dir)
        self.config, self.tokenizer = config, tokenizer
        self.validation, self.signals = validation, signals
        self.fingerprints = fingerprints
        self.newest: Path | None = None

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """The best of a validation that was owed is kept too."""
        assert isinstance(stage, TrainingModule)
        if self.validation.score is not None:
            self.after_step(trainer, stage)

    def after_step(self, trainer: L.Trainer, stage: TrainingModule) -> None:
        """Save if it is time, under the names that apply, and then let the run stop if it should."""
        progress, training = stage.progress, stage.config.training
        stop = wishes_to_stop(trainer, stage, self.signals)
        final = progress.step == training.max_steps or (stop and self.signals.received is None)
        names = checkpoint_aliases(progress, final=final)
        if stop or final or "best.ckpt" in names or progress.step % training.save_every_steps == 0:
            payload = self._payload(
                trainer, stage
            )  # on every rank: gathering shards takes them all
            if trainer.is_global_zero:
                self._save(payload, names)
        trainer.should_stop = stop

    def _save(self, payload: dict[str, Any], names: list[str]) -> None:
        path = self.folder / f"step-{payload['step']:06d}.ckpt"
        checkpoint_format.write(path, payload)
        self.newest = path
        for name in names:
            checkpoint_format.link(path, name)
        self._prune()

    def _payload(self, trainer: L.Trainer, stage: TrainingModule) -> dict[str, Any]:
        """Everything that a resumed run and the other programs need, as plain types."""
        whole = trainer.strategy.lightning_module_state_dict()
        weights = {
            name.removeprefix("decoder."): weight
            for name, weight in whole.items()
            if name.startswith("decoder.")
        }  # and no reference
        progress = stage.progress
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "stage": stage.stage,
            "step": progress.step,
            "tokens": progress.tokens,
            "train_loss": progress.train_loss,
            "val_loss": progress.val_losses[-1] if progress.validations else None,
            "created": time.time(),
            "config": self.config.to_plain(),
            "tokenizer": self.tokenizer.to_plain(),
            "weights": weights if self.config.lora is None else adapter_weights(weights),
            **stage.references,
            "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
            "precision": trainer.precision_plugin.state_dict(),
            "progress": progress.to_plain(),
            "cursor": stage.cursor,
            "data": self.fingerprints,
            "world_size": trainer.world_size,
            "threads": torch.get_num_threads(),
            "versions": {"torch": str(torch.__version__), "lightning": L.__version__},
        }

    def _prune(self) -> None:
        """Remove the oldest step files beyond training.keep_last; one that cannot be removed is no reason to stop."""
        keep = self.config.training.keep_last
        for path in (
            []
            if keep is None
            else [
                p for p in checkpoint_format.candidates(self.folder) if p.name.startswith("step-")
            ][keep:]
        ):
            try:
                os.unlink(path)
            except OSError as error:
                logger.warning(f"{path} cannot be removed: {error.strerror}")


# --- showing ----------------------------------------------------------------------------------------------------------


class Terminal(Console):
    """Stderr for people; a reader that went away (`2>&1 | head`) does not end a run."""

    def on_broken_pipe(self) -> None:
        """What rich calls then; its own version exits."""
        lead_nowhere(sys.stderr)


class ProgressDisplay(StepCallback):
    """A bar on a terminal, a line a row of metrics elsewhere; all on stderr."""

    def __init__(self, console: Console, max_steps: int):
        self.console, self.max_steps = console, max_steps
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=max_steps, note="")
        self.started, self.first = time.monotonic(), 0

    def on_train_start(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Show the bar, standing where the run goes on."""
        assert isinstance(stage, TrainingModule)
        self.started, self.first = time.monotonic(), stage.progress.step
        self.bar.update(self.task, completed=self.first)
        self.bar.start()

    def after_step(self, trainer: L.Trainer, stage: TrainingModule) -> None:
        """Move the bar on."""
        self.bar.update(self.task, completed=stage.progress.step)

    def on_fit_end(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()

    def on_exception(
        self, trainer: L.Trainer, stage: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the terminal back before an error is printed."""
        self.bar.stop()

    def row(self, row: Row) -> None:
        """One row of metrics for people."""
        val = "".join(
            f"  {name} {value:.{SHOWN[name]}f}"
            for name, value in row.items()
            if name in SHOWN and value is not None
        )
        train = "" if row["train_loss"] is None else f"loss {row['train_loss']:.4f}"
        note = f"{train}  lr {row['lr']:.2e}  {short(row['tokens_per_s'] or 0)} tokens/s"
        self.bar.update(self.task, note=note)
        if val or not self.console.is_terminal:
            self.line(
                f"step {row['step']:>6}/{self.max_steps}  {note}{val}{'' if self.console.is_terminal else self._eta(row)}"
            )

    def line(self, text: str) -> None:
        """A line above the bar, never interpreted as markup."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _eta(self, row: Row) -> str:
        done = (row["step"] or 0) - self.first
        left = (
            (time.monotonic() - self.started) / done * (self.max_steps - (row["step"] or 0))
            if done
            else 0.0
        )
        return f"  ETA {duration(left)}"
