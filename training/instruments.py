"""What a run tells about its speed beside tokens_per_s: columns of metrics.csv, and a profile.

    mfu         FLOPs of the model per second, as a share of those of bare matrix products in the
                run's arithmetic on this device (model FLOPs utilization, Chowdhery et al. 2022,
                appendix B, whose peak is the maker's figure; here it is measured once, by one
                process, after the first logged step)
    data_wait   share of the training time in which a step waited for its micro-batches
    peak_bytes  the most memory of the process so far; on a GPU of its tensors

`StepProfiler` writes the trace of training.profile_steps.
"""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import ProfilerActivity, profile

from model import TrainingModule
from tinylm.common.files import writing
from tinylm.planning.memory import peak_bytes
from tinylm.planning.probes import measure_matmul_flops
from tinylm.runs.metrics_csv import MetricsRow

logger = logging.getLogger(__name__)

# Square products large enough to be at full speed, and few enough not to be noticed.
SIDES = {"cpu": 512, "cuda": 4096, "mps": 2048}
ROUNDS = 3
N_OPERATORS = 10


class Instruments:
    """The values of these columns.

    Args:
        module: the module of the run.
        flops_per_token: of its model; None: not known, as for a Hugging Face model.
    """

    def __init__(self, module: TrainingModule, flops_per_token: int | None):
        self.flops_per_token, self.peak_flops = flops_per_token, None
        if flops_per_token is not None:
            device = module.device.type
            side = SIDES[device]
            self.peak_flops = measure_matmul_flops(module.config, device, side=side, rounds=ROUNDS)

    def read(self, module: TrainingModule, tokens_per_s: float, seconds: float) -> MetricsRow:
        """The values for a row of metrics.

        Args:
            module: at the end of a step.
            tokens_per_s: of all processes together.
            seconds: of training since the last row.
        """
        waited, module.data_wait = module.data_wait, 0.0
        mfu = None
        if self.flops_per_token is not None and self.peak_flops is not None:
            n_devices = module.trainer.world_size
            mfu = tokens_per_s * self.flops_per_token / (n_devices * self.peak_flops)
        return {
            "mfu": mfu,
            "data_wait": min(1.0, waited / max(seconds, 1e-9)),
            "peak_bytes": peak_bytes(module.device.type),
        }


class StepProfiler(L.Callback):
    """Traces the steps training.profile_steps with torch.profiler, validations excluded: the first
    callback of the trainer, so that a step is over for it before anything else follows.

    Args:
        folder: of the run; the trace is for chrome://tracing and ui.perfetto.dev.
        steps: the first and the last step, counted from 1.
    """

    def __init__(self, folder: Path, steps: tuple[int, int]):
        self.first, self.last = steps
        self.path = folder / f"trace-{self.first}-{self.last}.json"
        self.running: profile | None = None
        self.began = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook before every micro-batch."""
        assert isinstance(module, TrainingModule)
        is_first = module.progress.step == self.first - 1
        if self.running is None and is_first and trainer.is_global_zero:
            activities = [ProfilerActivity.CPU]
            if module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self.running = profile(activities=activities)
            self.running.start()
            self.began = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Lightning's hook after every micro-batch."""
        assert isinstance(module, TrainingModule)
        if self.running is not None and module.progress.step >= self.last:
            self._finish(self.running, on_gpu=module.device.type == "cuda")
            self.running = None

    def _finish(self, running: profile, *, on_gpu: bool) -> None:
        """Write the trace, and log the operators that took most of the time."""
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.monotonic() - self.began
        running.stop()
        with writing(self.path, "training.log_dir"):
            running.export_chrome_trace(str(self.path))
        where = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        times = {
            found.key: (getattr(found, where), found.count) for found in running.key_averages()
        }
        total = sum(time for time, _ in times.values())
        logger.info(
            f"profile of steps {self.first} to {self.last} ({seconds:.3g} s): {self.path}; "
            "operators by the time in them, without the operators that they call:"
        )
        slowest = sorted(times.items(), key=lambda item: -item[1][0])[:N_OPERATORS]
        for name, (microseconds, count) in slowest:
            share = microseconds / max(total, 1)
            logger.info(f"  {share:6.1%}  {microseconds / 1e6:8.3f} s  {count:>7} calls  {name}")
