"""A training run, from top to bottom: `train` is the table of contents of everything
that training does.

The steps themselves are in model.py; what happens between two steps is in callbacks.py.
"""

import logging
import shlex
import time
from dataclasses import replace
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from data import RunData
from model import TrainingModule
from tinylm.checkpoint.result import FINAL
from tinylm.common.errors import Diverged, UserError, printable
from tinylm.common.platform import signal_name
from tinylm.common.units import duration
from tinylm.config.schema import Config, DataConfig
from tinylm.planning.out_of_memory import explain_out_of_memory, require_memory
from tinylm.runs.metrics_csv import MetricsFile
from training.build import build_loggers, build_trainer, describe_model
from training.callbacks import Metrics, ProgressDisplay, Sample, StepEnd, StopSignals, Validation
from training.checkpoints import Checkpoints, finish_save
from training.context import ResumeOptions, RunContext
from training.initial import find_initial_model, initialized_config, prepare_tokenizer
from training.resume import (
    ResumeState,
    find_resume_state,
    log_effects_of_changes,
    require_same_data,
    require_same_settings,
    resumed_config,
)
from training.stage import Stage

logger = logging.getLogger(__name__)


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
        if resume is not None:
            config = resumed_config(config, resume)
            require_same_settings(resume, config, allow_changes=options.allow_changes)
            path, is_complete = resume.path, resume.is_complete(config)
            if options.path is None:
                patience = config.training.early_stopping_patience
                keep_last = resume.config.training.keep_last  # a new number waits for a save
                finish_save(path, resume.progress(), patience, keep_last, final=is_complete)
                path = path.with_name(FINAL)
            if is_complete:
                logger.info(f"already complete at step {resume.state['step']}: {path}")
                return print_result(stage, config, path)
        stage.find_data(config)  # before a model is downloaded or a text is encoded
        initial = find_initial_model(config, resume)
        if initial is not None and resume is None:
            config = initialized_config(config, initial)
        if initial is None and stage.name == "pretrain":
            require_memory(config, context.device)
        tokenizer, config = prepare_tokenizer(config, resume, initial, stage.learn_tokenizer)
        context = replace(context, config=config)
        data = stage.open_data(context, tokenizer)
        if resume is not None:
            require_same_data(resume, data, allow_changes=options.allow_changes)
        module = stage.build_module(context, data, resume, initial)
        return fit(context, stage, module, data, resume, sample)


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
    module.system = data.system
    module.rows_per_pass = data.rows_per_pass()
    if resume is not None:
        log_effects_of_changes(resume, config)
        module.progress = resume.progress()
        module.cursor = resume.state["cursor"]
        data.start_at(module.progress.step * config.training.grad_accum_steps, module.cursor)
        logger.info(f"resuming {resume.path} at step {module.progress.step}")
    signals = StopSignals()
    display = ProgressDisplay(config.training.max_steps)
    checkpoints = Checkpoints(
        context.checkpoint_dir, data.tokenizer, data.fingerprints(), context.hold
    )
    metrics_file, loggers = None, []
    guard_columns = () if config.training.skip_spikes is None else ("skipped_steps",)
    pass_columns = () if module.rows_per_pass is None else ("passes",)
    if rank_zero_only.rank == 0:
        metrics_file = MetricsFile(
            context.log_dir / "metrics.csv",
            module.progress.step,
            more_columns=(
                *pass_columns,
                *module.train_columns,
                *module.val_columns,
                *guard_columns,
            ),
            keep_old=resume is None or not resume.is_in(context.checkpoint_dir),
            hold=context.hold,
        )
        loggers = build_loggers(config.training)
    step_end = StepEnd(
        signals,
        Validation(signals, data.tokenizer, display.show, sample),
        Metrics(metrics_file, loggers, display.show_row),
        checkpoints,
        display,
        None if resume is None else resume.state,
    )
    trainer = build_trainer(config, context.device, step_end)
    logger.info(describe_model(module, trainer.world_size))
    began = time.monotonic()
    with explain_out_of_memory(config, f"The checkpoints in {context.checkpoint_dir} are intact"):
        try:
            trainer.fit(module, datamodule=data)
        except Diverged as error:
            raise Diverged(f"{error}. {last_good(checkpoints, resume)}") from error
    seconds = time.monotonic() - began
    return finish(stage, module, checkpoints, resume, signals, step_end.is_over, seconds)


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
    best = f"best val_loss {progress.best_val_loss:.4f}"
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
    if stage.next_command is not None:
        prompt = config.training.sample_prompt
        if prompt is None:  # the empty one suits a model of any text
            prompt = "Attention is" if config.data.dataset == DataConfig().dataset else ""
        command = stage.next_command.format(model=shlex.quote(str(path)), prompt=quote(prompt))
        logger.info(f"next: {command}")
    return 0


def quote(text: str) -> str:
    """`text` as one word of a shell, in double quotes if they are enough."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'
