"""Whole training steps of this project beside transformers' Llama and litgpt's GPT: tokens/s, peak memory, MFU.

    pip install -r requirements-bench.txt && pip install --no-deps litgpt==0.5.13
    python benchmarks/train.py
    python benchmarks/train.py --modes bf16 bf16-compiled --rounds 20 --json speed.json

A step is forward, backward, clipping, AdamW and letting the gradients go, on random token ids. This project takes it
under its own trainer, with its own stage and loss; the others in a plain loop, with the loss that is natural to each.
Every contestant is a process of its own, told over a pipe to take some steps while the others wait, round after round:
a noisy moment of the machine meets all of them. A ratio is what this project takes divided by what the other takes in
the same round, so below 1 the other is slower; what is shown is the median over the rounds. CPU s is the processor time
of a step, all threads together, which tells more than the clock where other programs run.
OpenMP's threads sleep while they wait, in all of them, as in our programs (`tinylm/cli/program.py`).
Peak memory is the most that the process ever held, beyond what it held after its imports and a step
of a toy model. MFU is the share of the speed of a large matrix product in the same dtype, which has
its turn in each round. CPU, and Linux for its /proc.

What is not alike: transformers shifts the labels itself and so trains on one target less a row;
litgpt compiles the model and not its loss, as its pretrain.py does. All three have weights in fp32,
and bf16 means autocast.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before this folder, where `train` is this very file.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tinylm.cli.program import Parser, run_program
from tinylm.common.console import say  # noqa: E402
from tinylm.common.errors import UserError, writing  # noqa: E402

if TYPE_CHECKING:
    import torch

WARM_UP_STEPS = (
    2  # the first compiles and makes the optimizer's state, the second settles the allocator
)
INSTALL = "pip install -r requirements-bench.txt && pip install --no-deps litgpt==0.5.13"


@dataclass(frozen=True)
class Shape:
    """The model and the batch; the same for all."""

    n_layers: int = 6
    d_model: int = 384
    n_heads: int = 6
    d_ff: int = 1024
    vocab_size: int = 8192
    seq_len: int = 256
    batch_size: int = 16
    gemm: int = 2048
    """rows and columns of the matrices whose product is the yardstick"""

    @property
    def tokens(self) -> int:
        """Tokens a step."""
        return self.batch_size * self.seq_len


QUICK = Shape(
    n_layers=2, d_model=32, n_heads=2, d_ff=64, vocab_size=128, seq_len=16, batch_size=2, gemm=64
)


@dataclass(frozen=True)
class Mode:
    """How a step is computed."""

    bf16: bool
    compiled: bool


MODES = {
    "fp32": Mode(bf16=False, compiled=False),
    "bf16": Mode(bf16=True, compiled=False),
    "fp32-compiled": Mode(bf16=False, compiled=True),
    "bf16-compiled": Mode(bf16=True, compiled=True),
}


# --- in the process of a contestant -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What a contestant says before its first step."""

    parameters: int
    flops: float
    """of one step; 0 where the contestant does not count them"""


@dataclass(frozen=True)
class Report:
    """What a contestant says after the steps that it was told to take."""

    seconds: float
    cpu_seconds: float
    """of all its threads"""
    peak_mb: float


class Orders:
    """A contestant's end of the pipe: says how many steps to take, and sends back how long they took."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe
        self.idle_mb = self.began = self.cpu_began = 0.0
        self.left = 0

    def settle(self, mode: Mode, threads: int | None) -> None:
        """Let torch load what it loads on first use, and note the memory held before the model is built."""
        import torch

        if threads is not None:
            torch.set_num_threads(threads)
        toy = torch.nn.Linear(8, 8)
        run = torch.compile(toy) if mode.compiled else toy
        with autocast(mode):
            run(torch.ones(8, 8)).sum().backward()
        torch.optim.AdamW(toy.parameters(), fused=True).step()
        self.idle_mb = memory_mb("VmRSS")

    def ready(self, facts: Facts) -> None:
        """Wait for the first order."""
        self.pipe.send(facts)
        self._wait()

    def step_done(self) -> bool:
        """Count a step, report and wait if it was the last of the order; whether there is another one to take."""
        self.left -= 1
        if self.left == 0:
            self.pipe.send(
                Report(
                    time.perf_counter() - self.began,
                    time.process_time() - self.cpu_began,
                    memory_mb("VmHWM") - self.idle_mb,
                )
            )
            self._wait()
        return self.left > 0

    def _wait(self) -> None:
        self.left = self.pipe.recv()
        self.began, self.cpu_began = time.perf_counter(), time.process_time()


def memory_mb(name: str) -> float:
    """Memory of this process in units of 10^6 bytes: what it holds (VmRSS), or the most it ever held (VmHWM)."""
    match = re.search(
        rf"^{name}:\s+(\d+) kB$",
        Path("/proc/self/status").read_text(encoding="ascii"),
        re.MULTILINE,
    )
    assert match is not None
    return int(match[1]) * 1024 / 1e6


def autocast(mode: Mode) -> "torch.autocast":
    """The context of the forward pass."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=mode.bf16)


class RandomRows:
    """A dataset of endless batches of random tokens, in the form that `data.py` gives them."""

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


def run_tinylm(orders: Orders, shape: Shape, mode: Mode, threads: int | None) -> None:
    """This project: its trainer, its stage, its loss; nothing between the steps but the wait for orders."""
    import torch
    from lightning.pytorch.callbacks import LambdaCallback
    from torch.utils.data import DataLoader

    from model import LanguageModule
    from tinylm.checkpoint.format import NO_REFERENCES
    from tinylm.config.schema import Config, HardwareConfig, ModelConfig, TrainingConfig
    from tinylm.model.decoder import Decoder, count_parameters, flops_per_token
    from training.build import build_trainer

    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")  # on purpose
    orders.settle(mode, threads)
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
            seq_len=shape.seq_len, micro_batch_size=shape.batch_size, schedule="constant"
        ),
        hardware=HardwareConfig(
            accelerator="cpu", precision="bf16" if mode.bf16 else "32", compile=mode.compiled
        ),
    )
    decoder = Decoder(config.model)
    facts = Facts(count_parameters(decoder), shape.tokens * flops_per_token(decoder, shape.seq_len))

    def after_step(trainer: Any, *_: Any) -> None:
        trainer.should_stop = not orders.step_done()

    callback = LambdaCallback(
        on_train_start=lambda *_: orders.ready(facts), on_train_batch_end=after_step
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


def run_transformers(orders: Orders, shape: Shape, mode: Mode, threads: int | None) -> None:
    """LlamaForCausalLM, which computes the loss if it is given labels."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    orders.settle(mode, threads)
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
        orders,
        model,
        lambda batch: forward(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss,
        shape,
        mode,
    )


def run_litgpt(orders: Orders, shape: Shape, mode: Mode, threads: int | None) -> None:
    """GPT with the loss of litgpt's pretrain.py."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")  # on purpose
    orders.settle(mode, threads)
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
        orders,
        model,
        lambda batch: chunked_cross_entropy(forward(batch["input_ids"]), batch["labels"]),
        shape,
        mode,
    )


def plain_loop(
    orders: Orders,
    model: "torch.nn.Module",
    loss_of: "Callable[[dict[str, Any]], torch.Tensor]",
    shape: Shape,
    mode: Mode,
) -> None:
    """The training loop that people write, with the settings of our TrainingConfig."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    rows = RandomRows(shape)
    orders.ready(Facts(sum(p.numel() for p in model.parameters()), 0.0))
    going = True
    while going:
        with autocast(mode):
            loss = loss_of(rows[0])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        going = orders.step_done()


def run_gemm(orders: Orders, shape: Shape, mode: Mode, threads: int | None) -> None:
    """The yardstick: products of square matrices."""
    import torch

    orders.settle(mode, threads)
    a, b = (
        torch.randn(shape.gemm, shape.gemm, dtype=torch.bfloat16 if mode.bf16 else torch.float32)
        for _ in range(2)
    )
    repeats = 4  # about as long as a step
    orders.ready(Facts(0, repeats * 2.0 * shape.gemm**3))
    going = True
    while going:
        for _ in range(repeats):
            a @ b
        going = orders.step_done()


CONTESTANTS: dict[str, Callable[[Orders, Shape, Mode, int | None], None]] = {
    "tinylm": run_tinylm,
    "transformers": run_transformers,
    "litgpt": run_litgpt,
    "gemm": run_gemm,
}


# --- in the process that compares -------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A process that takes steps when it is told to, and what it said of them."""

    name: str
    process: BaseProcess
    pipe: Connection
    seconds: list[float] = field(default_factory=list)
    """of one step, a round"""
    cpu_seconds: list[float] = field(default_factory=list)
    """likewise"""
    peak_mb: float = 0.0

    def take_steps(self, n: int) -> None:
        """A turn of `n` steps."""
        self.pipe.send(n)
        report = self.hear()
        self.seconds.append(report.seconds / n)
        self.cpu_seconds.append(report.cpu_seconds / n)
        self.peak_mb = report.peak_mb

    def forget_times(self) -> None:
        """Drop the warm-up."""
        self.seconds.clear()
        self.cpu_seconds.clear()

    def hear(self) -> Any:
        """What the process sends next."""
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} has died; its traceback is above") from None

    def end(self) -> None:
        """Let it go, at once if it does not wait for an order."""
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(0)
        self.process.join(timeout=10)
        self.process.kill()


@contextlib.contextmanager
def contestants(
    names: list[str], shape: Shape, mode: Mode, threads: int | None
) -> Iterator[list[Contestant]]:
    """A fresh process for each name."""
    context = multiprocessing.get_context("spawn")
    running: list[Contestant] = []
    try:
        for name in names:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=CONTESTANTS[name], args=(Orders(theirs), shape, mode, threads), daemon=True
            )
            process.start()
            theirs.close()  # or the end of the process would go unnoticed
            running.append(Contestant(name, process, ours))
        yield running
    finally:
        for contestant in running:
            contestant.end()


@dataclass(frozen=True)
class Result:
    """One row of the table: medians over the rounds. A ratio is what tinylm takes in the same
    round, divided by what this one takes.
    """

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
    """All rounds of one mode."""
    with contestants([*names, "gemm"], shape, MODES[mode], args.threads) as running:
        facts = {c.name: c.hear() for c in running}
        check_parameters({name: facts[name].parameters for name in names})
        for contestant in running:
            contestant.take_steps(WARM_UP_STEPS)
            contestant.forget_times()
        for number in range(args.rounds):
            say(f"{mode}: round {number + 1} of {args.rounds}")
            for contestant in running:
                contestant.take_steps(args.steps)
    return [
        sum_up(mode, contestant, running[0], running[-1], facts, shape)
        for contestant in running[:-1]
    ]


def sum_up(
    mode: str,
    contestant: Contestant,
    ours: Contestant,
    gemm: Contestant,
    facts: dict[str, Facts],
    shape: Shape,
) -> Result:
    """The result of one contestant."""
    ratios = by_round(ours.seconds, contestant.seconds)
    gemms_a_step = (
        facts["tinylm"].flops / facts["gemm"].flops
    )  # by the operations that a step needs
    return Result(
        mode=mode,
        name=contestant.name,
        parameters=facts[contestant.name].parameters,
        tokens_per_s=shape.tokens / statistics.median(contestant.seconds),
        ratio=statistics.median(ratios),
        lowest_ratio=min(ratios),
        highest_ratio=max(ratios),
        cpu_seconds=statistics.median(contestant.cpu_seconds),
        cpu_ratio=statistics.median(by_round(ours.cpu_seconds, contestant.cpu_seconds)),
        peak_mb=contestant.peak_mb,
        mfu=gemms_a_step * statistics.median(by_round(gemm.seconds, contestant.seconds)),
    )


def by_round(a: list[float], b: list[float]) -> list[float]:
    """a / b of each round."""
    return [x / y for x, y in zip(a, b, strict=True)]


def check_parameters(counts: dict[str, int]) -> None:
    """Refuse to compare models of different sizes."""
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} has {count:,} parameters" for name, count in counts.items())
        raise UserError("models", f"differ in size: {found}", "Compare the shapes they are given")


def installed(names: list[str]) -> list[str]:
    """Those of `names` that can be imported; of the others, how to install them is said on stderr."""
    found = []
    for name in names:
        if all(
            importlib.util.find_spec(module)
            for module in ([name, "psutil"] if name == "litgpt" else [name])
        ):
            found.append(name)
        else:
            say(f"{name}: not installed, so it is left out. {INSTALL}")
    return found


def show(results: list[Result]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"whole training steps, {results[0].parameters:,} parameters each")
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
    """The command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--modes", nargs="+", choices=list(MODES), default=list(MODES), help="default: all"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=10,
        help="rounds in which each contestant has a turn (default: 10)",
    )
    parser.add_argument("--steps", type=int, default=2, help="steps in a turn (default: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and one round, to see that it works"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Compare in each mode, then print."""
    if not Path("/proc/self/status").exists():
        problem = "reads memory from /proc, which this system does not have"
        raise UserError("benchmarks/train.py", problem, "Run it on Linux")
    if args.quick:
        args.rounds = args.steps = 1
    shape = QUICK if args.quick else Shape()
    names = ["tinylm", *installed(["transformers", "litgpt"])]
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
    show(results)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code comes back."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
