"""Training speed of this project, transformers' Llama and litgpt's GPT: tokens/s, peak memory, MFU.

    pip install -r requirements-bench.txt && pip install --no-deps litgpt==0.5.13
    python benchmarks/train.py
    python benchmarks/train.py --modes bf16 bf16-compiled --rounds 20 --json speed.json

A step is forward, backward, clipping, AdamW and zero_grad on random token ids. This project
runs it with its own trainer, module and loss, and also with Muon as in `recipe: research`; the
others run a plain loop with their usual loss.

Each implementation has its own process. They take turns of a few steps, round after round, so noise
of the machine affects all of them. Values are medians over rounds. The ratio is this project's time
divided by the other's time in the same round: below 1, the other is slower. CPU s is the processor
time of a step over all threads, which is more reliable than wall time on a busy machine. Waiting
OpenMP threads sleep in all processes, as in our programs (tinylm/cli/program.py).

Peak memory is the peak of the process minus its memory after imports and a step of a toy model. MFU
is relative to a large matrix product in the same dtype, timed in every round. CPU and Linux only
(memory is read from /proc).

Known differences: transformers shifts the labels itself, so it trains on one target less per row;
litgpt compiles the model but not its loss, as its pretrain.py does. All have fp32 weights, and
bf16 means autocast.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before this folder, where `train` would be this file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent))
from workers import Worker, memory_mb, start_workers  # noqa: E402

from tinylm.cli.program import Parser, run_program  # noqa: E402
from tinylm.common.console import say  # noqa: E402
from tinylm.common.errors import UserError
from tinylm.common.files import writing  # noqa: E402

if TYPE_CHECKING:
    import torch

# The first step compiles and creates the optimizer state, the second settles the allocator.
WARM_UP_STEPS = 2
INSTALL = "pip install -r requirements-bench.txt && pip install --no-deps litgpt==0.5.13"


@dataclass(frozen=True)
class Shape:
    """The size of the model and the batch, the same for all implementations."""

    n_layers: int = 6
    d_model: int = 384
    n_heads: int = 6
    d_ff: int = 1024
    vocab_size: int = 8192
    seq_len: int = 256
    batch_size: int = 16
    gemm: int = 2048
    """rows and columns of the matrices in the reference matrix product"""

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.seq_len


QUICK = Shape(
    n_layers=2, d_model=32, n_heads=2, d_ff=64, vocab_size=128, seq_len=16, batch_size=2, gemm=64
)


@dataclass(frozen=True)
class Mode:
    """Precision and compilation of a step."""

    bf16: bool
    compiled: bool


MODES = {
    "fp32": Mode(bf16=False, compiled=False),
    "bf16": Mode(bf16=True, compiled=False),
    "fp32-compiled": Mode(bf16=False, compiled=True),
    "bf16-compiled": Mode(bf16=True, compiled=True),
}


# --- in a worker process --------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelInfo:
    """What a worker sends before its first step."""

    parameters: int
    flops: float
    """of one step; 0 if the worker does not count them"""


@dataclass(frozen=True)
class Timing:
    """What a worker sends after a turn of steps."""

    seconds: float
    cpu_seconds: float
    """of all threads"""
    peak_mb: float


class StepCounter:
    """A worker's end of the pipe: receives a number of steps, sends the time that they took."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.idle_mb = self.start = self.cpu_start = 0.0
        self.remaining = 0

    def prepare(self, mode: Mode, threads: int | None) -> None:
        """Run a toy step, so that torch is loaded, and store the memory in use before the model."""
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        toy = torch.nn.Linear(8, 8)
        run = torch.compile(toy) if mode.compiled else toy
        with autocast(mode):
            run(torch.ones(8, 8)).sum().backward()
        torch.optim.AdamW(toy.parameters(), fused=True).step()
        self.idle_mb = memory_mb("VmRSS")

    def ready(self, info: ModelInfo) -> None:
        """Send the size of the model and wait for the first turn."""
        self.pipe.send(info)
        self._wait()

    def step_done(self) -> bool:
        """Count a step; after the last one of a turn send its time and wait. False: stop."""
        self.remaining -= 1
        if self.remaining == 0:
            seconds = time.perf_counter() - self.start
            cpu_seconds = time.process_time() - self.cpu_start
            peak_mb = memory_mb("VmHWM") - self.idle_mb
            self.pipe.send(Timing(seconds, cpu_seconds, peak_mb))
            self._wait()
        return self.remaining > 0

    def _wait(self) -> None:
        self.remaining = self.pipe.recv() or 0  # None: stop
        self.start = time.perf_counter()
        self.cpu_start = time.process_time()


def autocast(mode: Mode) -> "torch.autocast":
    """The autocast context of the forward pass."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=mode.bf16)


class RandomRows:
    """An endless dataset of batches of random tokens, with the keys of data.py."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def __getitem__(self, k: int) -> dict[str, Any]:
        import torch

        rows = torch.randint(self.shape.vocab_size, (self.shape.batch_size, self.shape.seq_len + 1))
        return {
            "input_ids": rows[:, :-1].contiguous(),
            "labels": rows[:, 1:].contiguous(),
            "origin": k,
        }


def run_tinylm(
    counter: StepCounter, shape: Shape, mode: Mode, threads: int | None, **training: Any
) -> None:
    """This project: its trainer, module and loss; a callback counts the steps.

    Args:
        training: settings of the optimizer.
    """
    import torch
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data import DataLoader

    from model import LanguageModule
    from tinylm.checkpoint.format import NO_REFERENCES
    from tinylm.config.schema import Config, HardwareConfig, ModelConfig, TrainingConfig
    from tinylm.model.decoder import Decoder, count_parameters, flops_per_token
    from training.build import build_trainer

    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")  # on purpose
    counter.prepare(mode, threads)
    config = Config(
        model=ModelConfig(
            vocab_size=shape.vocab_size,
            max_seq_len=shape.seq_len,
            n_layers=shape.n_layers,
            d_model=shape.d_model,
            n_heads=shape.n_heads,
            d_ff=shape.d_ff,
        ),
        training=TrainingConfig(
            seq_len=shape.seq_len,
            micro_batch_size=shape.batch_size,
            schedule="constant",
            **training,
        ),
        hardware=HardwareConfig(
            accelerator="cpu", precision="bf16" if mode.bf16 else "32", compile=mode.compiled
        ),
    )
    decoder = Decoder(config.model)
    info = ModelInfo(
        count_parameters(decoder), shape.tokens * flops_per_token(decoder, shape.seq_len)
    )

    def after_step(trainer: Any, *_: Any) -> None:
        trainer.should_stop = not counter.step_done()

    callback = LambdaCallback(
        on_train_start=lambda *_: counter.ready(info), on_train_batch_end=after_step
    )
    loader = DataLoader(RandomRows(shape), batch_size=None, sampler=range(sys.maxsize))  # type: ignore[arg-type]
    stage = LanguageModule(
        config,
        decoder,
        torch.ones(shape.vocab_size, dtype=torch.long),
        "pretrain",
        dict(NO_REFERENCES),
    )
    build_trainer(config, "cpu", callback).fit(stage, train_dataloaders=loader)


def run_transformers(counter: StepCounter, shape: Shape, mode: Mode, threads: int | None) -> None:
    """transformers: LlamaForCausalLM, which computes the loss from labels."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    counter.prepare(mode, threads)
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.seq_len,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    forward = torch.compile(model) if mode.compiled else model
    plain_loop(
        counter,
        model,
        lambda batch: forward(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss,
        shape,
        mode,
    )


def run_litgpt(counter: StepCounter, shape: Shape, mode: Mode, threads: int | None) -> None:
    """litgpt: GPT, with the loss of its pretrain.py."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")  # on purpose
    counter.prepare(mode, threads)
    config = Config(
        block_size=shape.seq_len,
        n_layer=shape.n_layers,
        n_embd=shape.d_model,
        n_head=shape.n_heads,
        intermediate_size=shape.d_ff,
        padded_vocab_size=shape.vocab_size,
        vocab_size=shape.vocab_size,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    model = GPT(config)
    model.transformer.wte.weight = model.lm_head.weight
    model.apply(model._init_weights)
    forward = torch.compile(model) if mode.compiled else model
    plain_loop(
        counter,
        model,
        lambda batch: chunked_cross_entropy(forward(batch["input_ids"]), batch["labels"]),
        shape,
        mode,
    )


def plain_loop(
    counter: StepCounter,
    model: "torch.nn.Module",
    loss_of: "Callable[[dict[str, Any]], torch.Tensor]",
    shape: Shape,
    mode: Mode,
) -> None:
    """A plain training loop with the defaults of our TrainingConfig."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    rows = RandomRows(shape)
    counter.ready(ModelInfo(sum(p.numel() for p in model.parameters()), 0.0))
    has_steps = True
    while has_steps:
        with autocast(mode):
            loss = loss_of(rows[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        has_steps = counter.step_done()


def run_gemm(counter: StepCounter, shape: Shape, mode: Mode, threads: int | None) -> None:
    """The reference for MFU: products of square matrices."""
    import torch

    counter.prepare(mode, threads)
    a, b = (
        torch.randn(shape.gemm, shape.gemm, dtype=torch.bfloat16 if mode.bf16 else torch.float32)
        for _ in range(2)
    )
    n_products = 4  # about as long as a step
    counter.ready(ModelInfo(0, n_products * 2.0 * shape.gemm**3))
    has_steps = True
    while has_steps:
        for _ in range(n_products):
            a @ b
        has_steps = counter.step_done()


IMPLEMENTATIONS: dict[str, Callable[..., None]] = {
    "tinylm": run_tinylm,
    "tinylm, muon": partial(
        run_tinylm, optimizer="muon", muon_per_head=True, muon_rounds="polar_express_3"
    ),
    "transformers": run_transformers,
    "litgpt": run_litgpt,
    "gemm": run_gemm,
}


# --- in the main process --------------------------------------------------------------------------


@dataclass
class TimedWorker(Worker):
    """The process of one implementation, and its times."""

    seconds: list[float] = field(default_factory=list)
    """of one step, per round"""
    cpu_seconds: list[float] = field(default_factory=list)
    """of one step, per round"""
    peak_mb: float = 0.0

    def take_steps(self, n: int) -> None:
        """Run a turn of `n` steps and store its times."""
        timing = self.ask(n)
        self.seconds.append(timing.seconds / n)
        self.cpu_seconds.append(timing.cpu_seconds / n)
        self.peak_mb = timing.peak_mb

    def reset_times(self) -> None:
        """Remove the times of the warm-up."""
        self.seconds.clear()
        self.cpu_seconds.clear()


@dataclass(frozen=True)
class Result:
    """One row of the table: medians over rounds. Ratios are tinylm's time / this time."""

    mode: str
    name: str
    parameters: int
    tokens_per_s: float
    ratio: float
    lowest_ratio: float
    highest_ratio: float
    cpu_seconds: float
    cpu_ratio: float
    peak_mb: float
    mfu: float


def compare(names: list[str], shape: Shape, mode: str, args: argparse.Namespace) -> list[Result]:
    """Run all rounds of one mode."""

    def job(name: str, pipe: Connection) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return IMPLEMENTATIONS[name], (StepCounter(pipe), shape, MODES[mode], args.threads)

    with start_workers(TimedWorker, [*names, "gemm"], job) as running:
        infos = {c.name: c.receive() for c in running}
        check_parameters({name: infos[name].parameters for name in names})
        for worker in running:
            worker.take_steps(WARM_UP_STEPS)
            worker.reset_times()
        for number in range(args.rounds):
            say(f"{mode}: round {number + 1} of {args.rounds}")
            for worker in running:
                worker.take_steps(args.steps)
    return [
        summarize(mode, worker, running[0], running[-1], infos, shape) for worker in running[:-1]
    ]


def summarize(
    mode: str,
    worker: TimedWorker,
    ours: TimedWorker,
    gemm: TimedWorker,
    infos: dict[str, ModelInfo],
    shape: Shape,
) -> Result:
    """The table row of one worker."""
    ratios = ratios_by_round(ours.seconds, worker.seconds)
    # matrix products with as many FLOPs as a step
    gemms_per_step = infos["tinylm"].flops / infos["gemm"].flops
    return Result(
        mode=mode,
        name=worker.name,
        parameters=infos[worker.name].parameters,
        tokens_per_s=shape.tokens / statistics.median(worker.seconds),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        cpu_seconds=statistics.median(worker.cpu_seconds),
        cpu_ratio=statistics.median(ratios_by_round(ours.cpu_seconds, worker.cpu_seconds)),
        peak_mb=worker.peak_mb,
        mfu=gemms_per_step * statistics.median(ratios_by_round(gemm.seconds, worker.seconds)),
    )


def ratios_by_round(a: list[float], b: list[float]) -> list[float]:
    """a / b for each round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def check_parameters(counts: dict[str, int]) -> None:
    """Raise a UserError if the models differ in size."""
    if len(set(counts.values())) > 1:
        sizes = ", ".join(f"{name} has {count:,} parameters" for name, count in counts.items())
        raise UserError("models", f"differ in size: {sizes}", "Use the same shape for all")


def installed(names: list[str]) -> list[str]:
    """The packages of `names` that are installed; for the others, print how to install them."""
    available = []
    for name in names:
        modules = [name, "psutil"] if name == "litgpt" else [name]
        if all(importlib.util.find_spec(module) for module in modules):
            available.append(name)
        else:
            say(f"{name}: skipped, not installed. {INSTALL}")
    return available


def print_table(results: list[Result]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"training steps, {results[0].parameters:,} parameters each")
    for column in ("mode", "", "tokens/s", "ratio", "CPU s", "ratio", "peak MB", "MFU"):
        table.add_column(
            column, justify="left" if column in ("mode", "") else "right", no_wrap=True
        )
    for result in results:
        table.add_row(
            result.mode,
            result.name,
            f"{result.tokens_per_s:,.0f}",
            f"{result.ratio:.3f}",
            f"{result.cpu_seconds:.2f}",
            f"{result.cpu_ratio:.3f}",
            f"{result.peak_mb:,.0f}",
            f"{result.mfu:.1%}",
        )
    Console(width=100).print(table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=list(MODES), help="default: all"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=10,
        help="rounds; each implementation has one turn per round (default: 10)",
    )
    parser.add_argument("--steps", type=int, default=2, help="steps per turn (default: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and one round, as a smoke test"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Compare all modes and print the table."""
    if not Path("/proc/self/status").exists():
        problem = "reads memory from /proc, which this system does not have"
        raise UserError("benchmarks/train.py", problem, "Run it on Linux")
    if args.quick:
        args.rounds = args.steps = 1
    shape = QUICK if args.quick else Shape()
    names = ["tinylm", "tinylm, muon", *installed(["transformers", "litgpt"])]
    results = [result for mode in args.modes for result in compare(names, shape, mode, args)]
    if args.json is not None:
        numbers = {
            "shape": asdict(shape),
            "rounds": args.rounds,
            "steps": args.steps,
            "results": [asdict(result) for result in results],
        }
        with writing(args.json, "--json"):
            args.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print_table(results)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return the exit code."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
