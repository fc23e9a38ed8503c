"""Saves checkpoints of a run, and restores the optimizer from one.

Lightning's own checkpoints are not used: it does not write them safely, and its resume restores
loops that count micro-batches (docs/LOG.md). The file itself is tinylm/checkpoint/format.py.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import OptimStateKeyType
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from model import Progress, TrainingModule

# optim.adamw_8bit is imported when a run resumes
from tinylm import optim
from tinylm.checkpoint import format as checkpoint_format
from tinylm.checkpoint.format import FORMAT, SCHEMA
from tinylm.checkpoint.result import link_final
from tinylm.common.errors import Diverged, UserError, first_line
from tinylm.model.lora import adapter_weights
from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)


def finish_save(
    path: Path, progress: Progress, patience: int | None, keep_last: int | None, *, final: bool
) -> None:
    """What follows the writing of step-N.ckpt, also at the next start of a run that was killed
    before it: the further names last.ckpt, and best.ckpt after the best validation; at the end of
    the run the name final.ckpt of its model; and the removal of the oldest files.
    """
    checkpoint_format.link(path, "last.ckpt")
    if is_best(progress):
        checkpoint_format.link(path, "best.ckpt")
    if final:
        link_final(path, patience)
    remove_oldest(path.parent, progress.step, keep_last)


def remove_oldest(folder: Path, step: int, keep_last: int | None) -> None:
    """Remove the oldest step files; one that cannot be removed does not stop the run.

    Files of steps after `step` are damaged or diverged, because the run did not resume from them:
    they do not count.
    """
    if keep_last is None:
        return
    found = checkpoint_format.candidates(folder)
    found = [path for path in found if path.name.startswith("step-")]
    found = [path for path in found if checkpoint_format.step_of(path) <= step]
    kept = []
    for path in found[keep_last:]:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            kept.append(f"{path} cannot be removed: {error.strerror}")
    if kept:
        logger.warning(f"{kept[0]}" + (f" ({len(kept)} old files are left)" if kept[1:] else ""))


def is_best(progress: Progress) -> bool:
    """Whether this step's validation is the best one so far, by training.best_by."""
    for measured in progress.measured.values():  # of another measure than val_loss
        values = [value for step, value in measured if step == progress.step]
        return bool(values) and values[-1] <= min(value for _, value in measured)
    return progress.validated(progress.step) and progress.val_losses[-1] <= progress.best_val_loss


@dataclass
class Checkpoints:
    """Saves every training.save_every_steps steps, after the best validation, and at the end."""

    folder: Path
    tokenizer: Tokenizer
    fingerprints: dict[str, str]
    """of the data"""
    hold: Callable[[], object]
    """called before each save: takes the folder's lock again if the folder was removed"""
    settled: dict[str, str]
    """`RunContext.settled`"""
    logged_as: str | None = None
    """the id of the run in the loggers of training.loggers, if there are any"""
    newest: Path | None = None
    """the last checkpoint that this process saved"""

    def save_if_due(
        self, trainer: L.Trainer, module: TrainingModule, *, stops: bool, final: bool
    ) -> None:
        """Save if this step is due, the last one, or the best one so far.

        Args:
            trainer: Lightning's.
            module: at the end of a step.
            stops: the run stops after this step.
            final: the run is complete after this step.

        Raises:
            Diverged: the weights are not finite; nothing is saved.
        """
        step, training = module.progress.step, module.config.training
        is_due = step % training.save_every_steps == 0
        if not (is_due or stops or final or is_best(module.progress)):
            return
        require_finite_weights(module)
        state = self._state(trainer, module)  # on every rank: all of them gather the shards
        if trainer.is_global_zero:
            self.hold()
            path = self.folder / f"step-{step:06d}.ckpt"
            checkpoint_format.write(path, state)
            self.newest = path
            patience, keep_last = training.early_stopping_patience, training.keep_last
            finish_save(path, module.progress, patience, keep_last, final=final)

    def _state(self, trainer: L.Trainer, module: TrainingModule) -> dict[str, Any]:
        """Everything that a resumed run and the other programs need, as plain types."""
        config, progress = module.config, module.progress
        weights = {}
        for name, weight in trainer.strategy.lightning_module_state_dict().items():
            if name.startswith("decoder."):  # not the reference model of preferences
                weights[name.removeprefix("decoder.")] = weight
        more: dict[str, Any] = {} if module.system is None else {"system": module.system}
        if self.logged_as is not None:
            more["logged_as"] = self.logged_as
        if config.data.mix is not None:
            passes = trainer.datamodule.source_passes(progress.step, trainer.world_size)
            more["source_passes"] = passes
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "stage": module.stage,
            "step": progress.step,
            "tokens": progress.tokens,
            "passes": module.passes_at(progress.step, trainer.world_size),
            "train_loss": progress.train_loss,
            "val_loss": progress.val_losses[-1] if progress.validations else None,
            "created": time.time(),
            "config": config.to_plain(),
            "settled": self.settled,
            "tokenizer": self.tokenizer.to_plain(),
            "weights": weights if config.lora is None else adapter_weights(weights),
            **module.references,
            **more,
            **module.stage_state(),
            "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
            "precision": trainer.precision_plugin.state_dict(),
            "progress": progress.to_plain(),
            "cursor": module.cursor,
            "data": self.fingerprints,
            "world_size": trainer.world_size,
            "threads": torch.get_num_threads(),
            "versions": {"torch": str(torch.__version__), "lightning": L.__version__},
        }


def require_finite_weights(module: TrainingModule) -> None:
    """Raise Diverged if the norm of the trained weights is NaN or infinite: one pass over them."""
    norm = get_total_norm([weight for weight in module.parameters() if weight.requires_grad])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if not norm.isfinite():
        problem = f"step {module.progress.step}: the norm of the weights is {float(norm)}"
        raise Diverged(f"{problem}. They were not saved. Lower training.lr")


def restore_optimizer(trainer: L.Trainer, module: TrainingModule, state: dict[str, Any]) -> None:
    """Restore the optimizer and the gradient scaler from the state of a checkpoint.

    Raises:
        UserError: they are not those of this model and optimizer.
    """
    optimizer = trainer.optimizers[0]
    is_sharded = isinstance(trainer.strategy, ModelParallelStrategy)
    # A sharded run numbers its weights in the order of the module, the others by groups.
    numbered = list(module.parameters()) if is_sharded else None
    require_same_optimizer(state["optimizer"], optimizer, numbered)
    # The settings of each group come from the config, which --allow-changes may have changed.
    settings = []
    for group in optimizer.param_groups:
        settings.append({name: value for name, value in group.items() if name != "params"})
    if is_sharded:
        # The checkpoint has whole tensors by number; torch shards them
        # by the names of their weights.
        named = FSDP.rekey_optim_state_dict(
            state["optimizer"], OptimStateKeyType.PARAM_NAME, module
        )
        options = StateDictOptions(full_state_dict=True)
        set_optimizer_state_dict(module, optimizer, named, options=options)
    else:
        trainer.strategy.load_optimizer_state_dict({"optimizer_states": [state["optimizer"]]})
    for group, own in zip(trainer.optimizers[0].param_groups, settings, strict=True):
        group.update(own)
    try:
        trainer.precision_plugin.load_state_dict(state["precision"])
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        problem = f"not the state of a gradient scaler: {first_line(error)}"
        raise UserError("precision in the checkpoint", problem, "Use another checkpoint") from None


def require_same_optimizer(
    stored: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    numbered: list[torch.nn.Parameter] | None = None,
) -> None:
    """Raise a UserError unless `stored` has the groups of `optimizer`, with tensors of the shapes
    of their weights: torch compares only the numbers of weights.

    Args:
        stored: the state of an optimizer.
        optimizer: the optimizer of this run.
        numbered: the weights by their numbers in `stored`; None: in the order of the groups.
    """
    weights = numbered
    if weights is None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    adamw_8bit = optim.adamw_8bit
    is_8bit = isinstance(optimizer, adamw_8bit.Optimizer8bit)
    try:
        numbers = [number for group in stored["param_groups"] for number in group["params"]]
        fits = sizes == [len(group["params"]) for group in stored["param_groups"]]
        in_order = numbers if numbered is None else sorted(numbers)
        fits = fits and in_order == list(range(len(weights)))
        fits = fits and stored["state"].keys() <= set(numbers)
        names = {frozenset(values) for values in stored["state"].values()}
        n_kinds = len({group.get("muon") for group in optimizer.param_groups}) + is_8bit
        fits = fits and len(names) <= n_kinds
        for number, values in stored["state"].items() if fits else ():
            shapes = adamw_8bit.state_shapes(weights[number]) if is_8bit else {}
            codes = ("state1", "state2") if "absmax1" in shapes else ()
            fits = fits and shapes.keys() <= values.keys()
            fits = fits and all(values[name].dtype == torch.uint8 for name in codes)
            for name, value in values.items():
                is_whole = isinstance(value, torch.Tensor) and value.dim() > 0
                shape = shapes.get(name, weights[number].shape)
                fits = fits and (not is_whole or value.shape == shape)
                fits = fits and isinstance(value, int | float | torch.Tensor)
    except (LookupError, TypeError, AttributeError):
        fits = False
    if not fits:
        problem = "not the state of this optimizer for this model"
        raise UserError("optimizer in the checkpoint", problem, "Use another checkpoint")
