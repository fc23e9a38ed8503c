"""RunContext: the stage, settings, processes, device and folders of one run,
and the lock on those folders.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tinylm.checkpoint.format import RunLock, candidates
from tinylm.common.console import LOGGERS
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError, first_line
from tinylm.config.schema import AUTO, OWN_FORMAT, Config, HardwareConfig
from tinylm.runs.record import RunRecord
from tinylm.runs.run_folder import RunFacts
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
    why: str = ""
    """the reason for the device"""
    has_encoder: bool = False
    """whether the model is an encoder-decoder"""
    locks: tuple[RunLock, ...] = ()
    """on checkpoint_dir and log_dir, while the run is in `lock`; none on ranks other than 0"""
    record: RunRecord | None = None
    """writes the report of the run while it is in `lock`; nothing on ranks other than 0"""
    settled: dict[str, str] = field(default_factory=dict)
    """settings that were settled before step 1 (settle.py), with what was given"""

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
        # Lightning reads them as arguments of its trainer; the settings are in the config.
        for name in [name for name in os.environ if name.startswith("PL_TRAINER_")]:
            del os.environ[name]
            logger.warning(f"ignored: the environment variable {name}. Settings are in the config")
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
        own = [f"model.{name}" for name in OWN_FORMAT if getattr(config.model, name)]
        if own:
            logger.info(f"cannot be exported to hf or gguf: a model with {' and '.join(own)}")
        if hardware.precision != AUTO:  # else settle.py says both
            logger.info(f"device: {device} ({why}), precision {hardware.precision}")
        if hardware.threads is not None:
            torch.set_num_threads(hardware.threads)
        return cls(stage, config, device, why)

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
        """Hold both folders for this run, and record what it logs; only rank 0 takes the locks,
        for all ranks, and writes.

        Raises:
            UserError: another process trains into one of them, or a process of this run was lost.
        """
        folders = {
            "training.checkpoint_dir": self.checkpoint_dir,
            "training.run_name or training.log_dir": self.log_dir,
        }
        held = []
        with contextlib.ExitStack() as locks:
            if rank_zero_only.rank == 0:
                for setting, folder in folders.items():
                    held.append(locks.enter_context(RunLock(folder, setting)))
            context = replace(self, locks=tuple(held))
            facts = RunFacts(
                stage=self.stage,
                run_name=self.config.training.run_name,
                device=self.device,
                precision=self.config.hardware.precision,
                checkpoint_dir=str(self.checkpoint_dir),
            )
            folder = self.log_dir if held else None
            with RunRecord(folder, facts, context.hold) as record:
                try:
                    yield replace(context, record=record)
                except RuntimeError as error:
                    if not is_lost_connection(error):
                        raise
                    raise lost_process(error, self.checkpoint_dir) from error


# --- how the processes of a run were started: by torchrun, by SLURM's srun, or by this program ---
#
# This is the only place where the environment decides anything about a run. Lightning would decide
# more: inside a SLURM job it installs signal handlers that save into the working folder and requeue
# the job, and PL_TRAINER_* variables change the trainer.


def find_launcher(hardware: HardwareConfig) -> ClusterEnvironment:
    """What started the processes of this run; tells Lightning's loggers
    and ours the rank of this process.

    Variables of SLURM without tasks for this run, as in an interactive shell, are ignored.

    Raises:
        UserError: torchrun or srun started another number of processes than the settings ask for.
    """
    n_processes = hardware.devices * hardware.num_nodes
    if TorchElasticEnvironment.detect():
        _require_processes("torchrun", _number("WORLD_SIZE"), n_processes)
        rank_zero_only.rank = _number("RANK")
        return TorchElasticEnvironment()
    # A step that srun started has its own number of tasks;
    # SLURM_NTASKS may be that of the job around it.
    n_tasks = _number("SLURM_STEP_NUM_TASKS", default=_number("SLURM_NTASKS", default=1))
    rank = _number("SLURM_PROCID", default=0)
    is_interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    is_task = n_tasks > 1 and "SLURM_PROCID" in os.environ and not is_interactive
    if is_task and (n_processes > 1 or rank > 0 or "SLURM_STEP_NUM_TASKS" in os.environ):
        _require_processes("SLURM", n_tasks, n_processes)
        per_node = _number("SLURM_NTASKS_PER_NODE", default=0)
        if per_node != hardware.devices:
            problem = f"is {hardware.devices}, but SLURM_NTASKS_PER_NODE is {per_node or 'not set'}"
            fix = f"Start the job with --ntasks-per-node={hardware.devices}, not with --ntasks"
            raise UserError("hardware.devices", problem, fix)
        rank_zero_only.rank = rank
        return SLURMEnvironment(auto_requeue=False)
    launcher = LightningEnvironment()
    own_rank = launcher.node_rank() * hardware.devices + launcher.local_rank()
    rank_zero_only.rank = own_rank if n_processes > 1 else 0
    return launcher


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error is that of a process whose connection to another one was lost. The errors of
    gloo have no type of their own, but name the place in its code.
    """
    return isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error)


def lost_process(error: RuntimeError, checkpoint_dir: Path) -> UserError:
    """What to do where the connection to another process of the run was lost."""
    newest = next(iter(candidates(checkpoint_dir)), None)
    fix = "No checkpoint was saved before"
    if newest is not None:
        fix = f"Start the same command for every process; it continues from {newest}"
    problem = (
        "the connection to another process of this run was lost: it ended, as its own lines say, "
        f"or the network failed ({first_line(error)})"
    )
    return UserError("hardware", problem, fix)


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        problem = f"must be a number, got {value}"
        raise UserError(name, problem, "Unset this environment variable, or set it to a number")
    return int(value)


def _require_processes(launcher: str, found: int, expected: int) -> None:
    if found != expected:
        problem = (
            f"hardware.devices x hardware.num_nodes is {expected}, "
            f"but {launcher} started {found} processes"
        )
        fix = (
            "Set both to the devices of a machine and the number of machines, "
            "or start as many processes"
        )
        raise UserError("hardware.devices", problem, fix)
