"""A training run, from top to bottom: `train` is the table of contents of everything that training does.

The steps themselves are in model.py; what happens between two steps is in callbacks.py.
"""

import logging
import math
import shlex
import time
from dataclasses import replace
from pathlib import Path

from data import RunData
from model import TrainingModule
from tinylm.common.errors import printable
from tinylm.common.units import duration
from tinylm.config.schema import Config
from tinylm.planning.memory_plan import explaining_memory
from training import callbacks
from training.build import build_loggers, build_trainer, describe_model
from training.context import ResumeOptions, RunContext
from training.initial import find_initial_model, initialized_config, prepare_tokenizer
from training.resume import (
    ResumeState,
    find_resume_state,
    log_effects_of_changes,
    repair_aliases,
    require_same_data,
    require_same_settings,
    resumed_config,
)
from training.stage import Stage

logger = logging.getLogger(__name__)


def train(stage: Stage, config: Config, options: ResumeOptions) -> int:
    """Train from new weights, from training.init_from or from the newest checkpoint, to the last step.

    Prints the path of the final checkpoint on stdout and returns the exit code: 0, or 128 + the number of the signal
    that stopped the run.

    Raises:
        UserError: something that the user can correct, found before the first step.
        Diverged: the loss or the gradient stopped being a finite number.
    """
    context = RunContext.open(stage.name, config)
    with context.lock():
        resume = find_resume_state(context, options)
        if resume is not None:
            config = resumed_config(config, resume)
            require_same_settings(resume, config, allow_changes=options.allow_changes)
            is_complete = resume.is_complete(config)
            if options.path is None:
                repair_aliases(resume, final=is_complete)
            if is_complete:
                logger.info(f"already complete at step {resume.state['step']}: {resume.path}")
                return print_result(stage, resume.path)
        initial = find_initial_model(config, resume)
        if initial is not None and resume is None:
            config = initialized_config(config, initial)
        tokenizer, config = prepare_tokenizer(config, resume, initial, stage.make_tokenizer)
        context = replace(context, config=config)
        data = stage.open_data(context, tokenizer)
        if resume is not None:
            require_same_data(resume, data, allow_changes=options.allow_changes)
        module = stage.build_module(context, data, resume, initial)
        return fit(context, stage, module, data, resume)


def fit(
    context: RunContext,
    stage: Stage,
    module: TrainingModule,
    data: RunData,
    resume: ResumeState | None,
) -> int:
    """Train `module` on `data` to the last step, from the first one or from that of the checkpoint."""
    config = module.config
    signals = callbacks.StopSignals()
    display = callbacks.ProgressDisplay(callbacks.Terminal(stderr=True), config.training.max_steps)
    validation = callbacks.Validation(signals, data.tokenizer, display.line)
    metrics = callbacks.Metrics(validation, display.row)
    saving = callbacks.Checkpoints(config, data.tokenizer, validation, signals, data.fingerprints())
    restore = callbacks.Restore(None if resume is None else resume.state)
    in_order = [signals, restore, validation, metrics, saving, display]
    trainer = build_trainer(config, context.device, in_order)
    logger.info(describe_model(config, module.decoder, trainer.world_size))
    if resume is not None:
        log_effects_of_changes(resume, config)
        module.progress = restore.progress()
        module.cursor = resume.state["cursor"]
        data.start_at(module.progress.step * config.training.grad_accum_steps, module.cursor)
        logger.info(f"resuming {resume.path} at step {module.progress.step}")
    if trainer.is_global_zero:
        file = callbacks.MetricsFile(
            context.log_dir / "metrics.csv",
            module.progress.step,
            further=(*module.train_columns, *module.val_columns),
            aside=resume is None or not _is_in(resume.path, context.checkpoint_dir),
        )
        metrics.open(file, build_loggers(config.training))
    began = time.monotonic()
    with explaining_memory(config, f"The checkpoints in {context.checkpoint_dir} are intact"):
        trainer.fit(module, datamodule=data)
    if saving.newest is None:  # only rank 0 saves
        return signals.exit_code
    if signals.received is not None:
        stopped = f"stopped by signal {signals.received} after step {module.progress.step}"
        logger.info(f"{stopped}; saved {saving.newest}. Run the same command again to continue.")
        return signals.exit_code
    best = min(module.progress.val_losses, default=math.nan)
    seconds = duration(time.monotonic() - began)
    logger.info(f"done: {module.progress.step} steps in {seconds}, best val_loss {best:.4f}")
    return print_result(stage, saving.newest.with_name("final.ckpt"))


def _is_in(path: Path, folder: Path) -> bool:
    """Whether a checkpoint continues the run of this folder, and does not begin a branch in another one."""
    return path.resolve().parent == folder.resolve()


def print_result(stage: Stage, path: Path) -> int:
    """Print the path of the finished model on stdout, log what to run next, and return the exit code 0."""
    print(printable(path))
    logger.info(f"next: {stage.next_command.format(model=shlex.quote(str(path)))}")
    return 0
