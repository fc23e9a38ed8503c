"""The planner's peak memory beside what runs then use: python benchmarks/planner.py

Each preset is planned, then trained for a few steps by train.py as a child process, whose peak the kernel reports. Linux,
on the CPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PRESETS = ("config_smoke.yaml", "configs/learn.yaml", "configs/cpu-debug.yaml", "configs/base-cpu.yaml", "configs/tiny-8g.yaml", "configs/compact-8g.yaml")
BYTE_VOCABULARY = 260
# Enough for the allocator to have seen every size of tensor, an optimizer's step and a validation.
STEPS = 6


def main(argv: list[str] | None = None) -> int:
    """Print a table: preset, planned and used megabytes, their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--presets", nargs="+", default=PRESETS, metavar="FILE")
    presets = parser.parse_args(argv).presets
    import callbacks  # noqa: F401  what a training process has loaded is part of the plan
    from tinylm.config import load_config
    from tinylm.planner import plan_run

    print("| preset | planned MB | used MB | planned / used |\n|---|---:|---:|---:|")
    for preset in presets:
        config = load_config(ROOT / preset)
        planned = plan_run(config, config.tokenizer.vocab_size or BYTE_VOCABULARY, "cpu").peak / 1e6
        used = peak_of_run(preset) / 1e6
        print(f"| {preset} | {planned:,.0f} | {used:,.0f} | {planned / used:.2f} |", flush=True)
    return 0


def peak_of_run(preset: str) -> int:
    """Bytes that a short run of train.py holds at most."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"training.max_steps={STEPS}", f"training.val_every_steps={STEPS}", "training.val_batches=2", f"training.checkpoint_dir={folder}/c"]
        settings += [f"training.log_dir={folder}/l", f"data.cache_dir={folder}/d"]
        command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / preset), *settings]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{preset}: the run failed with status {os.waitstatus_to_exitcode(status)}")
        return usage.ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
