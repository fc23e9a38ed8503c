"""Kill a training run at random moments, resume it, and compare it with an uninterrupted run.

    python benchmarks/crash_resume.py
    python benchmarks/crash_resume.py --rounds 10 --stream --seed 3

Both runs use gradient accumulation, dropout and a worker process. The comparison is exact: all
numbers in metrics.csv except the speed (as `float.hex`), and the weights, optimizer state and
progress in the last checkpoint. `--break-resume` resumes with another seed, to show that the
comparison can fail.
"""

import argparse
import csv
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tinylm.checkpoint import format as checkpoint_format  # noqa: E402

CONFIG = """
model:
  {{n_layers: 2, d_model: 64, n_heads: 4, max_seq_len: 64,
   residual_dropout: 0.1, attention_dropout: 0.1}}
data:
  {{dataset: {dataset}, num_workers: {workers}, streaming: {stream}, shuffle_window: 32,
   cache_dir: {folder}/cache}}
training:
  {{seq_len: 64, micro_batch_size: 4, grad_accum_steps: 4, max_steps: {steps}, lr: 1e-3,
   val_every_steps: 20, val_batches: 4, log_every_steps: 1, save_every_steps: 5,
   checkpoint_dir: {folder}/checkpoints, log_dir: {folder}/logs, run_name: run}}
hardware: {{accelerator: cpu, threads: 1}}
"""
COMPARED = ("weights", "optimizer", "progress", "cursor")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of kills (default: 5)")
    parser.add_argument(
        "--steps", type=int, default=60, help="optimizer steps of the run (default: 60)"
    )
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read the documents as a stream instead of a token file",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for the moments of the kills")
    parser.add_argument(
        "--dataset", type=Path, default=ROOT / "data" / "tiny_corpus.txt", help="text to train on"
    )
    parser.add_argument(
        "--break-resume",
        action="store_true",
        help="resume with another seed; the comparison must then fail",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run both and compare them; return 0 if they are equal to the last bit."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        uninterrupted = write_config(Path(name) / "uninterrupted", args)
        crashed = write_config(Path(name) / "crashed", args)
        train(uninterrupted).wait()
        kills = crash(crashed, args)
        train(crashed, *resume_flags(args)).wait()
        differences = compare(uninterrupted.parent, crashed.parent)
    source = "stream" if args.stream else "token file"
    print(
        f"killed {len(kills)} times, after steps {kills}; {args.steps} steps, accumulation 4, "
        f"dropout 0.1, {args.workers} workers, {source}"
    )
    if differences:
        print(f"DIFFERENT: {'; '.join(differences[:5])}")
        return 1
    print("EQUAL to the last bit: every metric, every weight, every optimizer state")
    return 0


def write_config(folder: Path, args: argparse.Namespace) -> Path:
    """Write the config of one of the two runs into its own folder; return its path."""
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    values = {
        "dataset": args.dataset.resolve(),
        "workers": args.workers,
        "stream": str(args.stream).lower(),
        "steps": args.steps,
    }
    path.write_text(CONFIG.format(folder=folder, **values), encoding="utf-8")
    return path


def train(config: Path, *flags: str) -> "subprocess.Popen[bytes]":
    """Start train.py on `config`; its output goes to output.txt in the same folder."""
    with open(config.with_name("output.txt"), "ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(config), *flags],
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )


def resume_flags(args: argparse.Namespace) -> list[str]:
    """Arguments of a resumed run: none, or another seed."""
    return ["training.seed=1", "--allow-changes"] if args.break_resume else []


def crash(config: Path, args: argparse.Namespace) -> list[int]:
    """Start and kill the run `args.rounds` times at increasing steps; return these steps."""
    rng = random.Random(args.seed)
    kills = []
    for number in range(args.rounds):
        process = train(config, *(resume_flags(args) if number else []))
        kill_step = int(args.steps * (number + rng.random()) / args.rounds)
        while process.poll() is None and last_step(config.parent) < kill_step:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)  # within a step, an accumulation or a save
        process.kill()
        process.wait()
        kills.append(last_step(config.parent))
    return kills


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of the run's metrics.csv."""
    path = folder / "logs" / "run" / "metrics.csv"
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def last_step(folder: Path) -> int:
    """The last step in the run's metrics."""
    return max(
        (int(row["step"]) for row in rows(folder) if (row["step"] or "").isdigit()), default=0
    )


def compare(uninterrupted: Path, crashed: Path) -> list[str]:
    """Describe the differences between the two runs."""
    differences = []
    expected = [exact_numbers(row) for row in rows(uninterrupted)]
    actual = [exact_numbers(row) for row in rows(crashed)]
    for a, b in zip(expected, actual, strict=False):
        if a != b:
            differences.append(f"metrics of step {float.fromhex(a['step']):.0f}")
    if len(expected) != len(actual) or not expected:
        differences.append(f"{len(expected)} and {len(actual)} rows of metrics")
    states = [
        checkpoint_format.read(folder / "checkpoints" / "final.ckpt")
        for folder in (uninterrupted, crashed)
    ]
    for key in COMPARED:
        if not same(states[0][key], states[1][key]):
            differences.append(f"{key} of the last checkpoint")
    return differences


def exact_numbers(row: dict[str, str]) -> dict[str, str]:
    """The exact numbers of a row of metrics, without the speed."""
    return {
        name: float(value).hex() for name, value in row.items() if value and name != "tokens_per_s"
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors exactly."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


if __name__ == "__main__":
    sys.exit(main())
