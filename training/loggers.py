"""Loggers beside metrics.csv, named by training.loggers: TensorBoard, Weights & Biases and trackio.

Each gets the resolved settings of the run, every row of metrics.csv, the samples, and at the end the
curve of val_loss as a picture, if matplotlib is installed. A run that is resumed continues in each:
its id is in the checkpoint. Nothing is sent that the package itself does not send:
WANDB_MODE=offline keeps a run on this machine, and trackio stores runs in TRACKIO_DIR.
"""

import contextlib
import importlib.util
import logging
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from tinylm.runs.plots import draw, read_metrics

logger = logging.getLogger(__name__)

PROJECT = "tinylm"


class RunLogger(Protocol):
    """One logger during a run."""

    def log_metrics(self, values: dict[str, Any], step: int) -> None:
        """Log the numbers of a row of metrics.csv."""

    def log_sample(self, text: str, step: int) -> None:
        """Log what the model has written."""

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log a picture (height, width, 3)."""

    def finish(self) -> None:
        """Write what is left."""


def new_run_id() -> str:
    """The name of a new run in the loggers, beside training.run_name."""
    return uuid.uuid4().hex[:8]


def open_loggers(config: Config, run_id: str, step: int) -> list[RunLogger]:
    """The loggers of a run, new or continued after `step`."""
    make = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
    return [make[name](config, run_id, step) for name in config.training.loggers]


def finish(loggers: list[RunLogger], folder: Path, step: int) -> None:
    """Log the curve of val_loss in the folder's metrics.csv, and close the loggers."""
    try:
        log_curve(loggers, folder / "metrics.csv", step)
    except UserError as error:  # no validation yet
        logger.info(f"training.loggers: no picture of the loss: {error}")
    for log in loggers:
        log.finish()


def log_curve(loggers: list[RunLogger], metrics: Path, step: int) -> None:
    """Log the curve of val_loss in metrics.csv.

    Raises:
        UserError: there is none in it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.info("training.loggers: no picture of the loss, matplotlib is not installed")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(draw("val_loss", [read_metrics(metrics)]))
    canvas.draw()
    picture = np.asarray(canvas.buffer_rgba())[..., :3]
    for log in loggers:
        log.log_picture("val_loss curve", picture, step)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name; a list as text.

    >>> flat({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': '[2]'}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value) if isinstance(value, list) else value
    return found


class TensorBoard:
    """Event files in the folder of the run; a resumed run adds one, which replaces later steps."""

    def __init__(self, config: Config, run_id: str, step: int):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = Path(config.training.log_dir) / config.training.run_name
        self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)
        settings = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in flat(config.to_plain()).items()
        }
        for summary in hparams(settings, {"val_loss": 0.0}):  # the column that its page shows
            self.writer._get_file_writer().add_summary(summary)
        self.writer.add_text("run id", run_id)

    def log_metrics(self, values: dict[str, Any], step: int) -> None:
        """Log the numbers of a row of metrics.csv."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def log_sample(self, text: str, step: int) -> None:
        """Log what the model has written."""
        self.writer.add_text("sample", text, step)

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log a picture (height, width, 3)."""
        self.writer.add_image(name, picture, step, dataformats="HWC")

    def finish(self) -> None:
        """Write what is left."""
        self.writer.close()


class WeightsAndBiases:
    """A run of wandb; offline, each process writes a folder of the same id, and
    `wandb sync` joins them.
    """

    def __init__(self, config: Config, run_id: str, step: int):
        import wandb

        training = config.training
        self.run = wandb.init(
            project=PROJECT,
            name=training.run_name,
            id=run_id,
            resume="allow",
            dir=training.log_dir,
            config=config.to_plain(),
        )
        self.picture = wandb.Image

    def log_metrics(self, values: dict[str, Any], step: int) -> None:
        """Log the numbers of a row of metrics.csv."""
        self.run.log(values, step=step)

    def log_sample(self, text: str, step: int) -> None:
        """Log what the model has written."""
        self.run.log({"sample": text}, step=step)

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log a picture (height, width, 3)."""
        self.run.log({name: self.picture(picture)}, step=step)

    def finish(self) -> None:
        """Write what is left."""
        self.run.finish()


class Trackio:
    """A run in trackio's store, named after training.run_name and the id."""

    def __init__(self, config: Config, run_id: str, step: int):
        import trackio

        self.trackio = trackio
        self.run = _without_stdout(
            trackio.init,
            project=PROJECT,
            name=f"{config.training.run_name}-{run_id}",
            config=flat(config.to_plain()),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log_metrics(self, values: dict[str, Any], step: int) -> None:
        """Log the numbers of a row of metrics.csv."""
        self.run.log(values, step=step)

    def log_sample(self, text: str, step: int) -> None:
        """Log what the model has written."""
        self.run.log({"sample": text}, step=step)

    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Log a picture (height, width, 3)."""
        self.run.log({name: self.trackio.Image(picture)}, step=step)

    def finish(self) -> None:
        """Write what is left."""
        _without_stdout(self.trackio.finish)


def _without_stdout(function: Callable[..., Any], **settings: Any) -> Any:
    """Call a function that prints; stdout has only results here."""
    with contextlib.redirect_stdout(sys.stderr):
        return function(**settings)
