"""A training run, from top to bottom: `train` is the table of contents of everything
that training does, and a `Stage` has what differs from one kind of training to another.

Each stage is made in `training/stages/`. The steps themselves are in model.py; what happens between
two steps is in callbacks.py.
"""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_only

import training  # training.settle is imported at its first use
from data import RunData
from model import TrainingModule
from tinylm.checkpoint.result import FINAL
from tinylm.common.console import duration
from tinylm.common.errors import Diverged, UserError, printable
from tinylm.common.platform import signal_name
from tinylm.config.schema import AUTO, Config, DataConfig
from tinylm.model.decoder import Decoder, flops_per_token
from tinylm.planning.memory import explain_out_of_memory, require_memory
from tinylm.runs.metrics_csv import MetricsFile
from tinylm.runs.record import RunRecord
from tinylm.runs.run_folder import COMPLETE, STOPPED
from tinylm.tokenizer.base import Tokenizer
from training.build import build_trainer, find_initial_model, initialized_config, prepare_tokenizer
from training.callbacks import Metrics, ProgressDisplay, Sample, StepEnd, StopSignals, Validation
from training.checkpoints import Checkpoints, finish_save
from training.context import ResumeOptions, RunContext
from training.resume import (
    ResumeState,
    find_resume_state,
    log_effects_of_changes,
    require_same_data,
    require_same_settings,
    resumed_config,
)

if TYPE_CHECKING:
    from tinylm.checkpoint.initial import InitialModel
    from training.loggers import RunLogger
    from training.task_scores import TaskScores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One kind of training. What it cannot be combined with is in `support.py`, under its name."""

    name: str
    """recorded in checkpoints"""
    find_data: Callable[[Config], None]
    """called first: raises a UserError if data that a setting names are not there"""
    learn_tokenizer: Callable[[Config], Tokenizer]
    """a tokenizer of kind bpe, unigram or char, learned from the training data of the settings"""
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


def train(
    stage: Stage, config: Config, options: ResumeOptions, sample: Sample | None = None
) -> int:
    """Train from new weights, from training.init_from or from the newest checkpoint,
    to the last step.

    Args:
        stage: what is trained, from training/stages/.
        config: the settings.
        options: the flags about resuming.
        sample: generates the sample that each validation shows;
            None if training.sample_prompt is null.

    Prints the path of the final checkpoint on stdout and returns the exit code: 0, or 128 + the
    number of the signal that stopped the run.

    Raises:
        UserError: something that the user can correct, found before the first step.
        Diverged: a loss, the gradient or the weights stopped being finite numbers.
    """
    with RunContext.open(stage.name, config).lock() as context:
        resume = find_resume_state(context, options)
        wishes = (config.hardware.precision, config.training.micro_batch_size)
        if AUTO in wishes or config.training.duration is not None:
            context = training.settle.settled_before(context, resume)
            config = context.config
        if resume is not None:
            context = replace(context, settled=resume.settled)
            config = resumed_config(config, resume)
            require_same_settings(resume, config, allow_changes=options.allow_changes)
            path, is_complete = resume.path, resume.is_complete(config)
            if options.path is None:
                path = finish_last_save(resume, config, final=is_complete)
            if is_complete:
                logger.info(f"already complete at step {resume.state['step']}: {path}")
                return print_result(stage, config, path)
        stage.find_data(config)  # before a model is downloaded or a text is encoded
        is_initialized = config.training.init_from is not None and resume is None
        if stage.name == "pretrain" and config.lora is None and not is_initialized:
            require_memory(config, context.device)
        initial = find_initial_model(config, resume)
        if initial is not None and resume is None:
            config = initialized_config(config, initial)
        if config.hardware.precision == AUTO:
            context = training.settle.settle_precision(replace(context, config=config))
            config = context.config
        tokenizer, config = prepare_tokenizer(config, resume, initial, stage.learn_tokenizer)
        model = initial or resume
        has_encoder = model is not None and model.has_encoder
        context = replace(context, config=config, has_encoder=has_encoder)
        if config.training.micro_batch_size == AUTO:
            context = training.settle.settle_micro_batch(context, initial)
            config = context.config
        data = stage.open_data(context, tokenizer)
        if resume is not None:
            require_same_data(resume, data, allow_changes=options.allow_changes)
        if config.training.duration is not None:
            context = training.settle.settle_duration(context, data, initial, stage.build_module)
        module = stage.build_module(context, data, resume, initial)
        return fit(context, stage, module, data, resume, sample)


def finish_last_save(resume: ResumeState, config: Config, *, final: bool) -> Path:
    """What a kill after the last save left undone, such as links to it; the path of final.ckpt."""
    patience = config.training.early_stopping_patience
    keep_last = resume.config.training.keep_last  # a new number waits for a save
    finish_save(resume.path, resume.progress(), patience, keep_last, final=final)
    return resume.path.with_name(FINAL)


def fit(
    context: RunContext,
    stage: Stage,
    module: TrainingModule,
    data: RunData,
    resume: ResumeState | None,
    sample: Sample | None = None,
) -> int:
    """Train `module` on `data` to the last step, from step 0 or from that of the checkpoint."""
    config = module.config
    fingerprints = data.fingerprints()
    module.system = data.system
    module.rows_per_pass = sum(data.source_rows) or None
    if resume is not None:
        continue_from(resume, module, data)
    record = describe_run(context, module)
    if config.data.mix is not None:
        log_sources(data)
    signals = StopSignals()
    display = ProgressDisplay(config.training.max_steps)
    checkpoints = Checkpoints(
        context.checkpoint_dir, data.tokenizer, fingerprints, context.hold, context.settled
    )
    tasks = open_tasks(stage, module, data, warn=resume is None)
    is_new = resume is None or not resume.is_in(context.checkpoint_dir)
    metrics_file, loggers = None, []
    if rank_zero_only.rank == 0:
        metrics_file = open_metrics(context, module, tasks.columns if tasks else (), is_new=is_new)
        if config.training.loggers:
            loggers = start_loggers(module, checkpoints, record, None if is_new else resume)
    step_end = StepEnd(
        signals,
        Validation(signals, data.tokenizer, display.show, sample, record, tasks),
        Metrics(metrics_file, loggers, display.show_row, record.facts.flops_per_token),
        checkpoints,
        display,
        record,
        None if resume is None else resume.state,
    )
    trainer = build_trainer(config, context.device, step_end)
    if config.training.profile_steps is not None:
        profiler = training.instruments.StepProfiler(context.log_dir, config.training.profile_steps)
        trainer.callbacks.insert(0, profiler)
    record.start(config, module.progress.step, is_new=is_new)
    if context.settled and resume is None:
        record.renew()  # a start after a kill finds the values in it
    began = time.monotonic()
    with explain_out_of_memory(config, f"The checkpoints in {context.checkpoint_dir} are intact"):
        try:
            trainer.fit(module, datamodule=data)
        except Diverged as error:
            raise Diverged(f"{error}. {last_good(checkpoints, resume)}") from error
        finally:
            if loggers:
                training.loggers.finish(loggers, context.log_dir, module.progress.step)
    seconds = time.monotonic() - began
    code = finish(stage, module, checkpoints, resume, signals, step_end.is_over, seconds)
    close_record(record, stage, config, context.checkpoint_dir / FINAL, code)
    return code


def open_tasks(
    stage: Stage, module: TrainingModule, data: RunData, *, warn: bool
) -> TaskScores | None:
    """The tasks that validations score; with a warning for those whose rows the run trains on."""
    config = module.config
    if config.training.eval_tasks is None and config.training.best_by == "val_loss":
        return None
    tasks = training.task_scores.open_tasks(module, data.tokenizer)
    if warn and rank_zero_only.rank == 0:
        for note in training.task_overlap.notes_on_tasks(config, stage.name, tasks, data):
            logger.info(note)
    return tasks


def close_record(record: RunRecord, stage: Stage, config: Config, final: Path, code: int) -> None:
    """Say in the record how the run ended, and what can be done with its model."""
    if code == 0:
        record.end(COMPLETE, next_command=next_command(stage, config, final))
    else:
        record.end(STOPPED)


def continue_from(resume: ResumeState, module: TrainingModule, data: RunData) -> None:
    """Give the module and the data the place of the checkpoint: the next row is the one after its."""
    log_effects_of_changes(resume, module.config)
    module.progress = resume.progress()
    module.cursor = resume.state["cursor"]
    n_read = module.progress.step * module.config.training.grad_accum_steps
    data.start_at(n_read, module.cursor)
    logger.info(f"resuming {resume.path} at step {module.progress.step}")


def start_loggers(
    module: TrainingModule,
    checkpoints: Checkpoints,
    record: RunRecord,
    resume: ResumeState | None,
) -> list[RunLogger]:
    """Open training.loggers, as the run that the checkpoint names or as a new one, whose name the
    next checkpoints keep.
    """
    logged_as = None if resume is None else resume.state.get("logged_as")
    checkpoints.logged_as = logged_as or training.loggers.new_run_id()
    step = module.progress.step
    loggers = training.loggers.open_loggers(module.config, checkpoints.logged_as, step)
    record.sample_listeners += [log.log_sample for log in loggers]
    return loggers


def describe_run(context: RunContext, module: TrainingModule) -> RunRecord:
    """The record of the run, with the facts about its model, which are logged too."""
    assert context.record is not None, "`train` holds the folders of the run"
    facts = context.record.facts
    facts.settled, facts.precision = context.settled, module.config.hardware.precision
    facts.model = module.describe()
    if isinstance(module.decoder, Decoder):
        seq_len = module.config.training.seq_len
        facts.flops_per_token = flops_per_token(module.decoder, seq_len)
    logger.info(facts.model)
    return context.record


def log_sources(data: RunData) -> None:
    """Log the share and the passes of each source of data.mix."""
    mix, hardware = data.config.data.mix, data.config.hardware
    total = sum(part.weight for part in mix)
    n_devices = hardware.devices * hardware.num_nodes
    all_passes = data.source_passes(data.config.training.max_steps, n_devices)
    for number, (part, passes) in enumerate(zip(mix, all_passes, strict=False)):
        share = f"{part.weight / total:.1%} of the rows"
        logger.info(f"data.mix[{number}]: {part.dataset}: {share}, {passes:.3g} passes")


def open_metrics(
    context: RunContext, module: TrainingModule, of_tasks: Sequence[str], *, is_new: bool
) -> MetricsFile:
    """metrics.csv with the columns of this run; that of another run keeps its rows elsewhere."""
    of_stage = (*module.train_columns, *module.val_columns)
    columns = ("mfu", "data_wait", "peak_bytes", *of_stage, *of_tasks)
    if module.rows_per_pass is not None:
        columns = ("passes", *columns)
    if len(module.config.data.mix or ()) > 1:
        columns += tuple(f"passes[{number}]" for number in range(len(module.config.data.mix)))
    if module.config.training.skip_spikes is not None:
        columns = (*columns, "skipped_steps")
    return MetricsFile(
        context.log_dir / "metrics.csv",
        module.progress.step,
        more_columns=columns,
        keep_old=is_new,
        hold=context.hold,
    )


def finish(
    stage: Stage,
    module: TrainingModule,
    checkpoints: Checkpoints,
    resume: ResumeState | None,
    signals: StopSignals,
    is_over: bool,
    seconds: float,
) -> int:
    """Say how a run ended, and return its exit code.

    Args:
        is_over: whether the callbacks ended it, at the last step or at a signal; else the batches
            ran out.
        seconds: how long this process trained.
    """
    config, progress = module.config, module.progress
    step = progress.step
    if not is_over:
        problem = f"the batches ended after step {step} of {config.training.max_steps}"
        raise UserError("training", problem, last_good(checkpoints, resume))
    if checkpoints.newest is None:  # only rank 0 saves
        return signals.exit_code
    if signals.agreed is not None:
        saved = f"saved {checkpoints.newest}. Run the same command again to continue."
        logger.info(f"stopped by {signal_name(signals.agreed)} after step {step}; {saved}")
        return signals.exit_code
    lowest = f"val_loss {progress.best_val_loss:.4f}"
    best = f"best {lowest}"
    for name, measured in progress.measured.items():
        value, at = min(((value, -at) for at, value in measured), default=(math.nan, 0))
        best = f"best {name} {abs(value):.4f} at step {-at:.0f} (best.ckpt), lowest {lowest}"
    if progress.best_step != step:
        best += f" at step {progress.best_step} (best.ckpt)"
    skipped = f" ({progress.skipped_steps} skipped)" if progress.skipped_steps else ""
    logger.info(f"done: {step} steps{skipped} in {duration(seconds)}, {best}")
    final = checkpoints.newest.with_name(FINAL)
    if not final.samefile(checkpoints.newest):
        logger.info("final.ckpt is best.ckpt: training.early_stopping_patience is set")
    return print_result(stage, config, final)


def last_good(checkpoints: Checkpoints, resume: ResumeState | None) -> str:
    """Where a run that failed can be continued: a checkpoint with finite weights."""
    path = checkpoints.newest or (None if resume is None else resume.path)
    if path is None:
        return "No checkpoint was saved before"
    changed = "pass --allow-changes if you change a setting"
    return f"The last good checkpoint is {path}: the same command continues from it; {changed}"


def print_result(stage: Stage, config: Config, path: Path) -> int:
    """Print the path of the finished model on stdout, log what to run next,
    and return the exit code 0.
    """
    print(printable(path))
    command = next_command(stage, config, path)
    if command:
        logger.info(f"next: {command}")
    return 0


def next_command(stage: Stage, config: Config, path: Path) -> str:
    """The command that uses the model at `path`; empty if the stage has none."""
    if stage.next_command is None:
        return ""
    prompt = config.training.sample_prompt
    if prompt is None:  # the empty one suits a model of any text
        prompt = "Attention is" if config.data.dataset == DataConfig().dataset else ""
    return stage.next_command.format(model=shlex.quote(str(path)), prompt=quote(prompt))


def quote(text: str) -> str:
    """`text` as one word of a shell, in double quotes if they are enough."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
