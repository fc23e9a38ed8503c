"""Facts about a checkpoint for lists and reports, read without building its model."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint.check import rounded_weights, rounding_of
from tinylm.checkpoint.format import read


@dataclass(frozen=True)
class CheckpointInfo:
    """One line in a list of checkpoints."""

    path: Path
    stage: str
    step: int
    tokens: int
    passes: float | None
    """over the training data; None for a stream, and for versions before 0.2"""
    train_loss: float | None
    val_loss: float | None
    parameters: int
    """of the adapter alone if there is one"""
    bytes: int
    created: float
    """seconds since 1970"""
    shape: str
    best_step: int | None = None
    """where its run had the lowest val_loss so far; None for an imported model"""
    best_val_loss: float | None = None
    best_by: str = "val_loss"
    """the measure of best.ckpt"""
    source_passes: tuple[float, ...] = ()
    """the passes over each source of data.mix, if there are several"""

    def summary(self) -> str:
        """One line: where it is, what it was trained for and how long, and whether its run had a
        lower val_loss before.
        """
        line = f"{self.path}, stage {self.stage}, step {self.step}"
        if self.val_loss is not None:
            line += f", val_loss {self.val_loss:.4f}"
        if self.best_step is not None and self.best_step < self.step:
            line += f"; the lowest was {self.best_val_loss:.4f} at step {self.best_step}"
            line += " (best.ckpt)" if self.best_by == "val_loss" else ""
        return line


def describe(path: str | Path) -> CheckpointInfo:
    """The checkpoint at `path`, verified."""
    path = Path(path)
    return info_of(path, read(path))


def info_of(path: Path, state: dict[str, Any]) -> CheckpointInfo:
    """Facts about the checkpoint at `path`, from its state."""
    # Plain values, not a Config: a checkpoint of another version may have settings
    # that this one does not know.
    model, lora = state["config"]["model"], state["config"].get("lora")
    validations = state.get("progress", {}).get("validations", [])
    finite = [(loss, -int(step)) for step, loss in validations if math.isfinite(loss)]
    best_val_loss, best_step = min(finite, default=(None, None))  # of equal ones the last
    # A tied matrix is in the file under two names, the second of
    # which shares the memory of the first.
    weights = {
        weight.data_ptr(): weight.numel()
        for name, weight in state["weights"].items()
        if name != "head.weight" or not model["tie_embeddings"]
    }
    # A checkpoint with fewer bits has a tied matrix once.
    for name, (codes, *_) in rounded_weights(state).items():
        weights[name] = codes.numel() * (2 if codes.dtype == torch.uint8 else 1)  # 4 bits
    shape = f"{model['n_layers']}L {model['d_model']}d {model['n_heads']}h"
    rounding = rounding_of(state)
    shape += f" {rounding}" if rounding else ""
    return CheckpointInfo(
        path=path,
        stage=state["stage"],
        step=state["step"],
        tokens=state["tokens"],
        passes=state.get("passes"),
        train_loss=state["train_loss"],
        val_loss=state["val_loss"],
        parameters=sum(weights.values()),
        bytes=path.stat().st_size,
        created=state["created"],
        shape=f"{shape} + r{lora['r']}" if lora else shape,
        best_step=best_step and -best_step,
        best_val_loss=best_val_loss,
        best_by=next(iter(state.get("progress", {}).get("measured", ())), "val_loss"),
        source_passes=tuple(state.get("source_passes", ())),
    )


def info_row(info: CheckpointInfo) -> dict[str, Any]:
    """`info` as plain values for JSON."""
    return {**asdict(info), "path": str(info.path)}
