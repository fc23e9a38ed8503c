"""Facts about a checkpoint for lists and reports, read without building its model."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tinylm.checkpoint.format import read


@dataclass(frozen=True)
class CheckpointInfo:
    """One line in a list of checkpoints."""

    path: Path
    stage: str
    step: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    parameters: int
    """of the adapter alone if there is one"""
    bytes: int
    created: float
    """seconds since 1970"""
    shape: str


def describe(path: Path) -> CheckpointInfo:
    """The checkpoint at `path`, verified."""
    return info_of(path, read(path))


def info_of(path: Path, state: dict[str, Any]) -> CheckpointInfo:
    """Facts about the checkpoint at `path`, from its state."""
    # Plain values, not a Config: a checkpoint of another version may have settings
    # that this one does not know.
    model, lora = state["config"]["model"], state["config"].get("lora")
    # A tied matrix is in the file under two names, the second of
    # which shares the memory of the first.
    weights = {
        weight.data_ptr(): weight.numel()
        for name, weight in state["weights"].items()
        if name != "head.weight" or not model["tie_embeddings"]
    }
    shape = f"{model['n_layers']}L {model['d_model']}d {model['n_heads']}h"
    return CheckpointInfo(
        path=path,
        stage=state["stage"],
        step=state["step"],
        tokens=state["tokens"],
        train_loss=state["train_loss"],
        val_loss=state["val_loss"],
        parameters=sum(weights.values()),
        bytes=path.stat().st_size,
        created=state["created"],
        shape=f"{shape} + r{lora['r']}" if lora else shape,
    )


def info_row(info: CheckpointInfo) -> dict[str, Any]:
    """`info` as plain values for JSON."""
    return {**asdict(info), "path": str(info.path)}
