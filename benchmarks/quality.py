"""How much a model learns per step and per second: configs of this project, nanochat and nanoGPT.

    git clone https://github.com/karpathy/nanochat ../nanochat
    git clone https://github.com/karpathy/nanoGPT ../nanoGPT
    python benchmarks/quality.py configs/experiments/recipe/base.yaml --data docs.jsonl \\
        --nanochat ../nanochat --nanogpt ../nanoGPT --picture quality.png --json quality.json

All train on the same rows in the same order: documents of --data, a tenth of them held out, with
the tokenizer, seq_len and batch of the first config. Peers have its n_layers, d_model and n_heads.
This project runs a config with its own trainer, module and loss; nanochat and nanoGPT run their own
model and optimizer (quality_peers.py) in a plain loop. None compiles its model, on request with
hardware.compile in a config; nanochat compiles its optimizer, before the first step.

Each implementation has its own process with one thread, and they take turns, so noise of the
machine affects all of them. After each turn the held-out bits per byte are measured, which is not
part of the time. Seconds are processor time, which is more reliable than wall time on a busy
machine. Peak memory is the peak of the process before its first validation minus its memory after
imports and a step of a toy model. Linux only (memory is read from /proc).
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# Before this folder, where `train` would be benchmarks/train.py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent))
from quality_peers import PEERS, Peer, PeerShape  # noqa: E402
from quality_results import Point, draw, print_table  # noqa: E402
from workers import Worker, memory_mb, start_workers  # noqa: E402

from tinylm.cli.program import Parser, run_program  # noqa: E402
from tinylm.common.console import say  # noqa: E402
from tinylm.common.errors import UserError  # noqa: E402
from tinylm.common.files import writing  # noqa: E402
from tinylm.config.loader import load_config  # noqa: E402
from tinylm.config.schema import Config  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from tinylm.tokenizer.base import Tokenizer

# Rows of a validation batch.
VAL_BATCH = 16


@dataclass(frozen=True)
class Job:
    """What one process trains."""

    name: str
    """a path of a config, or one of PEERS"""
    config: Config
    """of the config; for a peer the first one"""
    rows: Path
    """file of the rows that all train on"""
    seed: int
    folder: Path | None = None
    """the checkout of a peer"""
    rate_scale: float = 1.0
    """multiplies the learning rates of a peer"""


# --- in the main process: the rows ----------------------------------------------------------------


def save_rows(config: Config, path: Path, val_rows: int) -> None:
    """The training rows (steps, micro-batches, B, T + 1) and validation rows, as all see them."""
    import torch

    from data import PretrainData
    from tinylm.eval.perplexity import byte_length_table
    from tinylm.tokens.packing import IGNORE_INDEX
    from training.stages.pretrain import PRETRAIN

    training = config.training
    tokenizer: Tokenizer = PRETRAIN.learn_tokenizer(config)
    data = PretrainData(config, tokenizer)
    data.prepare()
    batches = data.train_dataset()
    n_batches = training.max_steps * training.grad_accum_steps
    train = torch.stack([joined(batches[k]) for k in range(n_batches)])
    held_out = data.val_dataset()
    rows = torch.cat([joined(held_out[k]) for k in range(held_out.n_batches or 0)])
    rows = rows[rows[:, -1] != IGNORE_INDEX]  # without the padding at the end
    # Spread over all held-out documents.
    chosen = torch.linspace(0, len(rows) - 1, min(val_rows, len(rows))).long()
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    byte_lengths = byte_length_table(tokenizer, vocab_size)
    np.savez(path, train=train, val=rows[chosen], byte_lengths=byte_lengths)


def joined(batch: dict[str, Any]) -> "Tensor":
    """Rows (B, T + 1) of a batch: the inputs and the last label."""
    import torch

    return torch.cat((batch["input_ids"], batch["labels"][:, -1:]), dim=1)


# --- in a worker process --------------------------------------------------------------------------


class Turns:
    """A worker's end of the pipe: receives a number of steps, sends a `Point` after them."""

    def __init__(self, pipe: Connection, job: Job):
        self.pipe, self.job = pipe, job
        self.step = self.remaining = self.parameters = 0
        self.seconds = self.wall_seconds = self.peak_mb = self.idle_mb = 0.0
        self.started = self.cpu_started = 0.0
        self.score: Callable[[], float] = lambda: 0.0

    def prepare(self) -> dict[str, "Tensor"]:
        """Run a toy step, store the memory in use before the model, and load the rows."""
        import torch

        torch.set_num_threads(1)
        toy = torch.nn.Linear(8, 8)
        toy(torch.ones(8, 8)).sum().backward()
        torch.optim.AdamW(toy.parameters(), fused=True).step()
        rows = {name: torch.from_numpy(array) for name, array in np.load(self.job.rows).items()}
        self.idle_mb = memory_mb("VmRSS")
        return rows

    def ready(self, parameters: int, score: Callable[[], float]) -> None:
        """Wait for the first turn. `score` gives the held-out bits per byte."""
        self.parameters, self.score = parameters, score
        self._wait()

    def step_done(self) -> bool:
        """Count a step; after the last one of a turn send a point and wait. False: stop."""
        self.step += 1
        self.remaining -= 1
        if self.remaining == 0:
            self.seconds += time.process_time() - self.cpu_started
            self.wall_seconds += time.perf_counter() - self.started
            self.peak_mb = self.peak_mb or memory_mb("VmHWM") - self.idle_mb
            self.pipe.send(
                Point(
                    self.step,
                    self.seconds,
                    self.wall_seconds,
                    self.score(),
                    self.peak_mb,
                    self.parameters,
                )
            )
            self._wait()
        return self.remaining > 0

    def _wait(self) -> None:
        self.remaining = self.pipe.recv() or 0  # None: stop
        self.started = time.perf_counter()
        self.cpu_started = time.process_time()


def run_config(turns: Turns) -> None:
    """This project: its trainer, module and loss; a callback counts the steps."""
    import torch
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data import DataLoader

    from model import LanguageModule
    from tinylm.checkpoint.format import NO_REFERENCES
    from tinylm.model.decoder import Decoder, count_parameters
    from training.build import build_trainer

    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")  # on purpose
    config, rows = turns.job.config, turns.prepare()
    torch.manual_seed(turns.job.seed)
    decoder = Decoder(config.model)
    module = LanguageModule(config, decoder, rows["byte_lengths"], "pretrain", dict(NO_REFERENCES))
    accumulated = config.training.grad_accum_steps

    def score() -> float:
        module.eval()
        with torch.no_grad():
            parts = [
                module.validation_step(as_batch(part, k), k)
                for k, part in enumerate(rows["val"].split(VAL_BATCH))
            ]
        module.train()
        return module.val_metrics(torch.stack(parts).sum(dim=0).tolist())["val_bpb"]

    def after_batch(trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        if (index + 1) % accumulated == 0:
            trainer.should_stop = not turns.step_done()

    callback = LambdaCallback(
        on_train_start=lambda *_: turns.ready(count_parameters(decoder), score),
        on_train_batch_end=after_batch,
    )
    batches = [as_batch(batch, k) for k, batch in enumerate(rows["train"])]
    loader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    build_trainer(config, "cpu", callback).fit(module, train_dataloaders=loader)


def as_batch(rows: "Tensor", k: int) -> dict[str, Any]:
    """Rows (B, T + 1) as a batch of data.py."""
    return {
        "input_ids": rows[:, :-1].contiguous(),
        "labels": rows[:, 1:].contiguous(),
        "origin": k,
    }


def run_peer(turns: Turns) -> None:
    """A peer's model and optimizer in a plain loop."""
    import torch

    job, rows = turns.job, turns.prepare()
    assert job.folder is not None, "a peer has one"
    training, model = job.config.training, job.config.model
    micro_batches = rows["train"].unflatten(0, (training.max_steps, training.grad_accum_steps))
    n_targets = micro_batches[0, ..., 1:].numel()
    vocab_size = len(rows["byte_lengths"])
    shape = PeerShape(
        vocab_size,
        training.seq_len,
        model.n_layers,
        model.d_model,
        model.n_heads,
        training.max_steps,
        n_targets,
    )

    def build() -> Peer:
        torch.manual_seed(job.seed)
        return PEERS[job.name](job.folder, shape, job.rate_scale)

    def train(peer: Peer, step: int) -> None:
        for part in micro_batches[step]:
            (loss_sum(peer, part) / n_targets).backward()
        if peer.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(peer.model.parameters(), peer.grad_clip)
        peer.set_step(step)
        peer.optimizer.step()
        peer.optimizer.zero_grad(set_to_none=True)

    # An optimizer that is compiled is compiled here, with another copy of the model.
    warm_up = build()
    train(warm_up, 0)
    del warm_up
    peer = build()

    def score() -> float:
        with torch.no_grad():
            parts = [loss_sum(peer, part) for part in rows["val"].split(VAL_BATCH)]
        n_bytes = rows["byte_lengths"][rows["val"][:, 1:]].sum()
        return float(sum(parts) / n_bytes / torch.log(torch.tensor(2.0)))

    turns.ready(sum(weight.numel() for weight in peer.model.parameters()), score)
    for step in range(training.max_steps):
        train(peer, step)
        if not turns.step_done():
            return


def loss_sum(peer: Peer, rows: "Tensor") -> "Tensor":
    """Of all targets of rows (B, T + 1)."""
    return peer.loss_sum(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())


def run_job(pipe: Connection, job: Job) -> None:
    """Train what the job names; what a peer prints goes to stderr."""
    sys.stdout = sys.stderr
    turns = Turns(pipe, job)
    if job.folder is None:
        run_config(turns)
    else:
        run_peer(turns)


# --- in the main process: the turns ----------------------------------------------------------------


@dataclass
class Curve(Worker):
    """The process of one implementation with one seed, and its points."""

    points: list[Point] = field(default_factory=list)


def train_all(jobs: list[Job], n_turns: int) -> list[Curve]:
    """All jobs, in turns."""
    last = jobs[0].config.training.max_steps
    ends = [round(last * (turn + 1) / n_turns) for turn in range(n_turns)]
    names = [job.name for job in jobs]
    by_name = {job.name: job for job in jobs}

    def work(name: str, pipe: Connection) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return run_job, (pipe, by_name[name])

    with start_workers(Curve, names, work) as running:
        done = 0
        for end in ends:
            for curve in running:
                curve.points.append(curve.ask(end - done))
                point = curve.points[-1]
                say(
                    f"seed {jobs[0].seed}, step {end} of {last}: {curve.name}: "
                    f"{point.bits_per_byte:.4f} bits per byte after {point.seconds:.0f} s"
                )
            done = end
    return running


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="of this project")
    parser.add_argument("--data", required=True, metavar="FILE", help="documents, as data.dataset")
    parser.add_argument("--nanochat", type=Path, metavar="DIR", help="a checkout of nanochat")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument(
        "--peer-rates",
        type=float,
        default=1.0,
        metavar="X",
        help="multiply the learning rates of the peers (default: 1)",
    )
    parser.add_argument("--set", nargs="*", default=[], help="section.key=value for all configs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    parser.add_argument("--turns", type=int, default=8, help="validations (default: 8)")
    parser.add_argument("--val-rows", type=int, default=128, help="held-out rows (default: 128)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw the curves")
    return parser.parse_args(argv)


def make_jobs(args: argparse.Namespace, seed: int, rows: Path) -> list[Job]:
    """One job for each config and each peer."""
    overrides = [f"data.dataset={args.data}", *args.set, f"training.seed={seed}"]
    configs = {path: load_config(path, overrides) for path in args.configs}
    if not rows.exists():
        save_rows(next(iter(configs.values())), rows, args.val_rows)
    jobs = [Job(path, sized(config, rows), rows, seed) for path, config in configs.items()]
    for job in jobs:
        check_same_rows(jobs[0], job)
    for name in PEERS:
        folder = getattr(args, name)
        if folder is not None:
            job = Job(name, jobs[0].config, rows, seed, folder.resolve(), args.peer_rates)
            jobs.append(job)
    return jobs


def sized(config: Config, rows: Path) -> Config:
    """The config with the vocabulary of the tokenizer."""
    vocab_size = len(np.load(rows)["byte_lengths"])
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return config.model_copy(update={"model": model})


def check_same_rows(first: Job, job: Job) -> None:
    """Raise a UserError if two configs would not train on the same rows."""
    for section, key in (
        ("training", "seq_len"),
        ("training", "micro_batch_size"),
        ("training", "grad_accum_steps"),
        ("training", "max_steps"),
        ("tokenizer", "kind"),
        ("tokenizer", "vocab_size"),
    ):
        ours, theirs = (getattr(getattr(j.config, section), key) for j in (job, first))
        if ours != theirs:
            raise UserError(
                (job.name, f"{section}.{key}"),
                f"is {ours}, but {theirs} in {first.name}",
                "All must train on the same rows; pass --set to give all the same value",
            )


def run(args: argparse.Namespace) -> int:
    """Train all with each seed, and print the table."""
    if not Path("/proc/self/status").exists():
        problem = "reads memory from /proc, which this system does not have"
        raise UserError("benchmarks/quality.py", problem, "Run it on Linux")
    curves: dict[str, list[list[Point]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        # One that another process was killed in may hold half a file.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for seed in args.seeds:
            jobs = make_jobs(args, seed, Path(folder) / f"rows-{seed}.npz")
            for curve in train_all(jobs, args.turns):
                curves.setdefault(curve.name, []).append(curve.points)
    if args.json is not None:
        numbers = {
            name: [[asdict(point) for point in points] for points in runs]
            for name, runs in curves.items()
        }
        with writing(args.json, "--json"):
            args.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    if args.picture is not None:
        with writing(args.picture, "--picture"):
            draw(curves, args.picture)
    print_table(curves, [name for name in curves if name in PEERS])
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return the exit code."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
