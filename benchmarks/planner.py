"""Compare the planned peak memory of runs with the used memory: python benchmarks/planner.py

Each run is planned, then trained for a few steps by train.py in a child process, whose peak memory
the kernel reports. Linux and CPU only.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A config and overrides; large models have smaller batches, so that each run takes a minute.
RUNS = (
    "config_smoke.yaml",
    "configs/learn.yaml",
    "configs/cpu-debug.yaml",
    "configs/base-cpu.yaml",
    "configs/tiny-8g.yaml training.micro_batch_size=8",
    "configs/compact-8g.yaml training.micro_batch_size=4",
    "configs/small-16g.yaml training.micro_batch_size=4",
    "configs/experiments/moe.yaml",
    "configs/experiments/window-sinks.yaml",
    "configs/learn.yaml training.micro_batch_size=64 model.gradient_checkpointing=true",
    "configs/tiny-8g.yaml training.micro_batch_size=8 model.gradient_checkpointing=true",
    "configs/learn.yaml hardware.precision=bf16",
    "configs/learn.yaml training.grad_accum_steps=4",
    "configs/learn.yaml data.document_mask=true",
    "configs/learn.yaml model.vocab_size=32000",
    "configs/learn.yaml training.optimizer=adamw_8bit",
)
BYTE_VOCAB_SIZE = 260
# Enough for optimizer steps and a validation, so that all sizes of tensors were allocated.
STEPS = 6


def main(argv: list[str] | None = None) -> int:
    """Print a table: run, planned and used megabytes, their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--runs",
        nargs="+",
        default=RUNS,
        metavar="RUN",
        help="a config and its overrides, in quotes",
    )
    runs = parser.parse_args(argv).runs
    from tinylm.common.bnb import import_bitsandbytes
    from tinylm.config.loader import load_config
    from tinylm.planning.memory import resident_bytes
    from tinylm.planning.memory_plan import plan_run, with_settings

    # The plan includes the imports of a training process.
    from training import callbacks  # noqa: F401

    program = resident_bytes()
    print("| run | planned MB | used MB | planned / used |\n|---|---:|---:|---:|")
    for run in runs:
        preset, *overrides = shlex.split(run)
        config = load_config(ROOT / preset, overrides)
        vocab_size = config.model.vocab_size or config.tokenizer.vocab_size or BYTE_VOCAB_SIZE
        config = with_settings(config, {"model.vocab_size": vocab_size})
        if config.training.optimizer == "adamw_8bit":
            import_bitsandbytes()
            program = resident_bytes()
        planned = plan_run(config, "cpu", program=program).peak / 1e6
        used = peak_of_run(preset, overrides) / 1e6
        print(f"| {run} | {planned:,.0f} | {used:,.0f} | {planned / used:.2f} |", flush=True)
    return 0


def peak_of_run(preset: str, overrides: list[str]) -> int:
    """The peak memory of a short run of train.py, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"training.max_steps={STEPS}",
            f"training.val_every_steps={STEPS}",
            "training.val_batches=2",
            f"training.checkpoint_dir={folder}/c",
        ]
        settings += [f"training.log_dir={folder}/l", f"data.cache_dir={folder}/d"]
        command = [
            sys.executable,
            str(ROOT / "train.py"),
            "--config",
            str(ROOT / preset),
            *overrides,
            *settings,
        ]
        child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(
                f"{preset}: the run failed with status {os.waitstatus_to_exitcode(status)}"
            )
        return usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
