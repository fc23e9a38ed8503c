"""RunContext: the stage, settings, device and folders of one run, and the lock on those folders."""

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tinylm.checkpoint.format import RunLock, lock_run_dir
from tinylm.common.console import LOGGERS
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError
from tinylm.config.schema import Config
from training.launch import find_launcher, ignore_trainer_variables
from training.support import require_supported

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumeOptions:
    """The flags of a training program that decide where a run starts."""

    path: Path | None = None
    """--resume: continue from this checkpoint instead of the newest"""
    start_new: bool = False
    """--no-resume: start a new run; the checkpoint folder must hold no checkpoint"""
    allow_changes: bool = False
    """--allow-changes: resume although data or settings differ from the checkpoint's"""


@dataclass(frozen=True)
class RunContext:
    """The stage and settings of a run, and where it runs;
    the settings are completed as the run is built.
    """

    stage: str
    config: Config
    device: str
    locks: tuple[RunLock, ...] = ()
    """on checkpoint_dir and log_dir, while the run is in `lock`; none on ranks other than 0"""

    @classmethod
    def open(cls, stage: str, config: Config) -> "RunContext":
        """Choose the device, log it, and set the number of CPU threads.

        Raises:
            UserError: this machine or this stage does not support a setting, or torchrun or SLURM
                started another number of processes.
        """
        hardware = config.hardware
        find_launcher(hardware)  # sets the rank of this process
        if rank_zero_only.rank != 0:  # each log line is shown once
            for name in LOGGERS:
                for handler in logging.getLogger(name).handlers:
                    handler.addFilter(lambda record: False)
        ignore_trainer_variables()
        for name in config.training.loggers:  # each is the name of its package
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    "training.loggers", f"{name} is not installed", f"pip install {name}"
                )
        device, why = pick_device(hardware.accelerator, key="hardware.accelerator")
        require_supported(stage, config, device)
        n_available = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device)
        if n_available is not None and hardware.devices > n_available:
            problem = (
                f"must be at most {n_available}, the devices of this machine, "
                f"got {hardware.devices}"
            )
            raise UserError("hardware.devices", problem, f"Set hardware.devices={n_available}")
        logger.info(f"device: {device} ({why}), precision {hardware.precision}")
        if hardware.threads is not None:
            torch.set_num_threads(hardware.threads)
        return cls(stage, config, device)

    @property
    def checkpoint_dir(self) -> Path:
        """The folder of the run's checkpoints."""
        return Path(self.config.training.checkpoint_dir)

    def hold(self) -> None:
        """Take the locks again if a folder was removed during the run.

        Raises:
            UserError: another process has made the folder, or it cannot be written.
        """
        for lock in self.locks:
            lock.renew()

    @property
    def log_dir(self) -> Path:
        """The folder of the run's metrics."""
        return Path(self.config.training.log_dir) / self.config.training.run_name

    @contextlib.contextmanager
    def lock(self) -> Iterator["RunContext"]:
        """Hold both folders for this run; only rank 0 takes the locks, for all ranks.

        Raises:
            UserError: another process trains into one of them.
        """
        folders = {
            "training.checkpoint_dir": self.checkpoint_dir,
            "training.run_name or training.log_dir": self.log_dir,
        }
        held = []
        with contextlib.ExitStack() as locks:
            if rank_zero_only.rank == 0:
                for setting, folder in folders.items():
                    held.append(locks.enter_context(lock_run_dir(folder, setting)))
            yield replace(self, locks=tuple(held))
