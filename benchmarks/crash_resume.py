"""Kills a training run at random moments, lets it resume, and compares it with a run that was left alone.

    python benchmarks/crash_resume.py
    python benchmarks/crash_resume.py --rounds 10 --stream --seed 3

Both runs use gradient accumulation, dropout and a worker process. The comparison is by bits: every number of metrics.csv
but the speed, as `float.hex`, and the weights and optimizer of the last checkpoint. `--break-resume` proves that the
comparison can fail: it resumes with another seed for dropout.
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
CONFIG = """
model: {{n_layers: 2, d_model: 64, n_heads: 4, max_seq_len: 64, residual_dropout: 0.1, attention_dropout: 0.1}}
data: {{dataset: {dataset}, num_workers: {workers}, streaming: {stream}, shuffle_window: 32, cache_dir: {folder}/cache}}
training:
  {{seq_len: 64, micro_batch_size: 4, grad_accum_steps: 4, max_steps: {steps}, val_every_steps: 20, val_batches: 4, log_every_steps: 1,
   save_every_steps: 5, checkpoint_dir: {folder}/checkpoints, log_dir: {folder}/logs, run_name: run, lr: 1e-3}}
hardware: {{accelerator: cpu, threads: 1}}
"""


def main(argv: list[str] | None = None) -> int:
    """Run both and compare; 0 if they are equal to the last bit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how often the run is killed (default: 5)"
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="optimizer steps of the run (default: 60)"
    )
    parser.add_argument("--workers", type=int, default=1, help="worker processes (default: 1)")
    parser.add_argument(
        "--stream",
        action="store_true",
        help="read the documents as a stream instead of a token file",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the moments at which the run is killed"
    )
    parser.add_argument(
        "--dataset", type=Path, default=ROOT / "data" / "tiny_corpus.txt", help="text to train on"
    )
    parser.add_argument(
        "--break-resume",
        action="store_true",
        help="resume with another seed; the comparison must fail",
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        calm, crashed = (write_config(Path(name) / kind, args) for kind in ("calm", "crashed"))
        train(calm).wait()
        kills = crash(crashed, args)
        train(crashed, *resume_flags(args)).wait()
        differences = compare(calm.parent, crashed.parent)
    source = "stream" if args.stream else "token file"
    print(
        f"killed {len(kills)} times, after steps {kills}; {args.steps} steps, accumulation 4, dropout 0.1, {args.workers} workers, {source}"
    )
    print(
        "EQUAL to the last bit: every metric, every weight, every optimizer state"
        if not differences
        else f"DIFFERENT: {'; '.join(differences[:5])}"
    )
    return 1 if differences else 0


def write_config(folder: Path, args: argparse.Namespace) -> Path:
    """The config of one of the two runs, in a folder of its own."""
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
    """Start train.py on `config`; what it says goes to a file beside it."""
    with open(config.with_name("output.txt"), "ab") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(config), *flags],
            stdout=output,
            stderr=output,
            cwd=ROOT,
        )


def resume_flags(args: argparse.Namespace) -> list[str]:
    return ["training.seed=1", "--allow-changes"] if args.break_resume else []


def crash(config: Path, args: argparse.Namespace) -> list[int]:
    """Start and kill the run `args.rounds` times, each time some steps further; the steps at which it died come back."""
    chance, kills = random.Random(args.seed), []
    for number in range(args.rounds):
        process = train(config, *(resume_flags(args) if number else []))
        goal = int(args.steps * (number + chance.random()) / args.rounds)
        while process.poll() is None and last_step(config.parent) < goal:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)  # somewhere inside a step, an accumulation or a save
        process.kill()
        process.wait()
        kills.append(last_step(config.parent))
    return kills


def rows(folder: Path) -> list[dict[str, str]]:
    """The rows of the run's metrics."""
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


def compare(calm: Path, crashed: Path) -> list[str]:
    """What differs between the two runs, in words."""
    sys.path.insert(0, str(ROOT))
    from tinylm.checkpoint import format as checkpoint_format

    curves = [[bits(row) for row in rows(folder)] for folder in (calm, crashed)]
    differences = [
        f"metrics of step {float.fromhex(a['step']):.0f}"
        for a, b in zip(*curves, strict=False)
        if a != b
    ]
    if len(curves[0]) != len(curves[1]) or not curves[0]:
        differences.append(f"{len(curves[0])} rows of metrics and {len(curves[1])}")
    finals = [
        checkpoint_format.read(folder / "checkpoints" / "final.ckpt") for folder in (calm, crashed)
    ]
    differences += [
        f"{part} of the last checkpoint"
        for part in ("weights", "optimizer", "progress", "cursor")
        if not same(finals[0][part], finals[1][part])
    ]
    return differences


def bits(row: dict[str, str]) -> dict[str, str]:
    """The numbers of a row of metrics, exactly; the speed is a matter of luck."""
    return {
        name: float(value).hex() for name, value in row.items() if value and name != "tokens_per_s"
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors by their bits."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


if __name__ == "__main__":
    sys.exit(main())
