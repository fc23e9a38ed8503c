"""How the processes of a run were started: by torchrun, by SLURM's srun, or by this program itself.

This is the only place where the environment decides anything about a run. Lightning would decide
more: inside a SLURM job it installs signal handlers that save into the working folder and requeue
the job, and PL_TRAINER_* variables change the trainer.
"""

import logging
import os

from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tinylm.common.errors import UserError
from tinylm.config.schema import HardwareConfig

logger = logging.getLogger(__name__)


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


def ignore_trainer_variables() -> None:
    """Remove the variables that Lightning reads as arguments of its trainer:
    the settings are in the config.
    """
    for name in [name for name in os.environ if name.startswith("PL_TRAINER_")]:
        del os.environ[name]
        logger.warning(f"ignored: the environment variable {name}. Settings are in the config")


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
