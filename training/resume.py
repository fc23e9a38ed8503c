"""Resuming: which checkpoint a run continues from, and whether it still is the same run.

A run is the same if its settings, tokenizer and data are. What may differ is in `FREE_ON_RESUME`.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from pydantic import TypeAdapter, ValidationError

from data import RunData
from model import Progress

# checkpoint.check is imported when a run resumes
from tinylm import checkpoint as checkpoints
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.result import is_complete
from tinylm.common.errors import UserError, first_line
from tinylm.config.loader import with_model
from tinylm.config.schema import Config
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.run_files import name_of
from training.context import ResumeOptions, RunContext

logger = logging.getLogger(__name__)

# Settings that may differ when a run is resumed: how long it runs and what is written,
# not what a step computes.
FREE_ON_RESUME = {
    # the content of these is compared
    "data.dataset",
    "data.mix",
    "data.val_dataset",
    "data.skip_bad_rows",
    "tokenizer.path",
    "verifier.sampled_from",
    "distill.teacher",
    "data.num_workers",
    "data.cache_dir",
    "training.max_steps",
    "training.val_every_steps",
    "training.val_batches",
    "training.early_stopping_patience",
    "training.log_every_steps",
    "training.profile_steps",
    "training.save_every_steps",
    "training.keep_last",
    "training.checkpoint_dir",
    "training.log_dir",
    "training.run_name",
    "training.loggers",
    "training.sample_prompt",
    "training.auto_resume",
    "training.init_from",
    "model.gradient_checkpointing",
    "hardware.accelerator",
    "hardware.devices",
    "hardware.num_nodes",
    "hardware.strategy",
    "hardware.compile",
    "hardware.threads",
}
# Weights of another shape or meaning, and the state of another optimizer, cannot be used at all.
NEVER_FREE = ("model.", "tokenizer", "training.optimizer", "training.muon_per_head", "lora")


Changes = dict[str, tuple[Any, Any]]
"""by name, a value of the checkpoint and the one that this run has"""


@dataclass(frozen=True)
class ResumeState:
    """The checkpoint that a run continues from."""

    path: Path
    state: dict[str, Any]

    @property
    def config(self) -> Config:
        """The settings that it was saved with."""
        return Config.from_plain(self.state["config"])

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that it was trained with."""
        return checkpoints.check.tokenizer_of(self.path, self.state)

    @property
    def settled(self) -> dict[str, str]:
        """The settings that were settled before step 1, with what was given."""
        return self.state.get("settled", {})  # older checkpoints have none

    @property
    def has_encoder(self) -> bool:
        """Whether its model is an encoder-decoder."""
        return checkpoints.initial.holds_encoder(self.state)

    def progress(self) -> Progress:
        """How far the run was."""
        return Progress(**copy.deepcopy(self.state["progress"]))

    def is_in(self, folder: Path) -> bool:
        """Whether the run in `folder` saved it, so that this run does not begin a branch
        in another folder.
        """
        return self.path.resolve().parent == folder.resolve()

    def is_complete(self, config: Config) -> bool:
        """Whether nothing is left to train."""
        training, losses = config.training, self.progress().val_losses
        patience = training.early_stopping_patience
        return is_complete(self.state["step"], training.max_steps, losses, patience)


def find_resume_state(context: RunContext, options: ResumeOptions) -> ResumeState | None:
    """The checkpoint to continue from; None for a new run.

    Raises:
        UserError: the checkpoint folder holds checkpoints that a new run or a branch would mix with
            its own, or every checkpoint is damaged, or the checkpoint is not one of a run of this
            stage.
    """
    folder, elsewhere = context.checkpoint_dir, "choose another training.checkpoint_dir"
    found = checkpoint_format.candidates(folder)
    if options.path is not None:
        if options.path.is_dir():
            newest = checkpoint_format.latest_state(options.path, _log_skipped)
            if newest is None:
                fix = "Give a checkpoint, or a folder that has some"
                raise UserError(("--resume", options.path), "contains no checkpoint", fix)
        else:
            newest = options.path, checkpoint_format.read(options.path)
        resume = _checked(*newest, context.stage)
        newer = [path for path in found if checkpoint_format.step_of(path) > resume.state["step"]]
        if newer:
            problem = f"is newer than step {resume.state['step']}, where --resume continues"
            fix = f"Remove the newer checkpoints, or {elsewhere} to keep both branches"
            raise UserError(newer[0], problem, fix)
        return resume
    if context.config.training.auto_resume and not options.start_new:
        newest = checkpoint_format.latest_state(folder, _log_skipped)
        return None if newest is None else _checked(*newest, context.stage)
    if found:
        problem = f"already holds checkpoints (newest: {found[0].name})"
        raise UserError(folder, problem, f"Resume, or {elsewhere}")
    return None


def _log_skipped(error: UserError) -> None:
    logger.info(f"skipped: {error}")


def _checked(path: Path, state: dict[str, Any], stage: str) -> ResumeState:
    """A checkpoint that a run of this stage can continue from."""
    resume = ResumeState(path, state)
    fix = (
        "Choose another training.checkpoint_dir, and start from its weights: "
        f"training.init_from={path}"
    )
    if "optimizer" not in state:
        raise UserError(path, "an imported model, which has no optimizer state to resume", fix)
    if state["stage"] != stage:
        problem = f"a checkpoint of stage {state['stage']}, but this run is of stage {stage}"
        raise UserError(path, problem, fix)
    _check_progress(resume)
    return resume


def _check_progress(resume: ResumeState) -> None:
    """Raise a UserError unless the progress in a checkpoint is one of its step."""
    where, fix = (resume.path, "progress"), "Use another checkpoint"
    try:
        progress = resume.progress()
    except TypeError as error:  # a name that is missing or not known
        raise UserError(where, f"not that of a run: {first_line(error)}", fix) from None
    for name, kind in get_type_hints(Progress).items():
        try:
            TypeAdapter(kind).validate_python(getattr(progress, name), strict=True)
        except ValidationError as error:
            raise UserError((*where, name), error.errors()[0]["msg"], fix) from None
    if any(len(pair) != 2 for pair in progress.recent):
        raise UserError((*where, "recent"), "must be pairs of a loss and a norm", fix)
    if progress.step != resume.state["step"]:
        problem = f"step must be {resume.state['step']}, got {progress.step}"
        raise UserError(where, problem, fix)


def resumed_config(config: Config, resume: ResumeState) -> Config:
    """The settings of a resumed run; one that started
    from a trained model has the checkpoint's model settings.
    """
    if config.training.init_from is None:
        return config
    return with_model(config, resume.config.model, resume.config.tokenizer)


# --- is it the same run? ---


def require_same_settings(resume: ResumeState, config: Config, *, allow_changes: bool) -> None:
    """Compare the settings, and the number of processes, with the checkpoint's;
    raises as `require_no_changes`.
    """
    now = config.to_plain()
    # An older checkpoint has null where the model's settings are now resolved.
    was = resume.state["config"] | {"model": resume.config.model.model_dump(mode="json")}
    if now["model"]["vocab_size"] is None:  # the tokenizer's, and its content is compared
        now["model"]["vocab_size"] = was["model"]["vocab_size"]
    n_processes = config.hardware.devices * config.hardware.num_nodes
    changes = changed_settings(was, now)
    changes["number of processes"] = (resume.state["world_size"], n_processes)
    require_no_changes(resume, changes, allow_changes=allow_changes)


def require_same_data(resume: ResumeState, data: RunData, *, allow_changes: bool) -> None:
    """Compare the tokenizer and the data with the checkpoint's; raises as `require_no_changes`."""
    source = name_of(data.config.data)
    changes = {"tokenizer": (resume.tokenizer.fingerprint, data.tokenizer.fingerprint)}
    for split, fingerprint in data.fingerprints().items():
        name = f"{split} data ({source})" if split in ("train", "val") else split
        changes[name] = (resume.state["data"][split], fingerprint)
    require_no_changes(resume, changes, allow_changes=allow_changes)


def require_no_changes(resume: ResumeState, compared: Changes, *, allow_changes: bool) -> None:
    """Refuse to resume with values that differ from the checkpoint's;
    log the differences that are allowed.

    Raises:
        UserError: naming the checkpoint, both values, and --allow-changes where it helps.
    """
    changes = {name: (was, now) for name, (was, now) in compared.items() if was != now}
    fatal = [name for name in changes if name.startswith(NEVER_FREE)]
    if fatal or (changes and not allow_changes):
        name = fatal[0] if fatal else next(iter(changes))
        was, now = changes[name]
        problem = f"{name} was {was} when it was saved, this run has {now}"
        fix = "Set it back, or choose another training.checkpoint_dir"
        if not fatal:
            fix = "Set it back, choose another training.checkpoint_dir, or pass --allow-changes"
        raise UserError(resume.path, problem, fix)
    for name, (was, now) in changes.items():
        logger.info(f"allowed: {name} was {was} and is now {now}")


def changed_settings(was: dict[str, Any], now: dict[str, Any], prefix: str = "") -> Changes:
    """The settings that differ and may not; `sampling` does not affect training."""
    changes: Changes = {}
    for key, value in now.items():
        name = f"{prefix}{key}"
        if name == "sampling" or name in FREE_ON_RESUME:
            continue
        old = was.get(key)  # a setting that is newer than the checkpoint counts as null
        if isinstance(value, dict) and isinstance(old, dict):
            changes |= changed_settings(old, value, f"{name}.")
        elif value != old:
            changes[name] = (old, value)
    return changes


def require_same_model(
    resume: ResumeState | None, reference: dict[str, str], *, name: str, init_from: str | None
) -> None:
    """Refuse to continue with another base or reference model than the one
    that the checkpoint refers to.

    Args:
        resume: the checkpoint, if any.
        reference: path and fingerprint of the model that this run has (`reference_to`).
        name: `base` for the model under an adapter, `reference` for that of preferences.
        init_from: training.init_from of this run.

    Raises:
        UserError: naming both models.
    """
    was = None if resume is None else resume.state[name]
    if was is not None and was["fingerprint"] != reference["fingerprint"]:
        theirs = f"the {name} model is {was['path']} with fingerprint {was['fingerprint']}"
        problem = f"{theirs}, but training.init_from ({init_from}) has {reference['fingerprint']}"
        raise UserError(resume.path, problem, "Set training.init_from to that model")


def log_effects_of_changes(resume: ResumeState, config: Config) -> None:
    """Log the changes that are always allowed but still affect the results."""
    was, now = resume.state["config"]["training"]["max_steps"], config.training.max_steps
    if was != now:
        logger.info(
            f"training.max_steps was {was} and is now {now}: "
            f"the learning rate follows a schedule of {now} steps"
        )
    threads = torch.get_num_threads()
    if resume.state["threads"] != threads:
        logger.info(
            f"CPU threads were {resume.state['threads']} and are now {threads}: "
            "results may differ in the last bits"
        )
