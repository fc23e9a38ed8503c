"""Generation speed of this project, transformers, llama.cpp and ctranslate2 with equal weights.

    pip install ctranslate2==4.8.5 llama-cpp-python==0.3.36
    python benchmarks/decode.py
    python benchmarks/decode.py --batch 1 --only fp32 --rounds 9 --json speed.json

A model of 13.8M parameters is written once with random weights, and exported for each of the
others: a Hugging Face folder, a GGUF file, a ctranslate2 folder. All read the same prompts of
token ids and generate greedily; no text ends early.

Each implementation has its own process. They take turns, round after round, so noise of the
machine affects all of them. A turn generates one token (time to first token) and then all tokens;
the difference, divided by the other tokens, is the time of one decode step. Values are medians over
rounds; ratios are taken within a round. CPU ms is processor time of a step over all threads, which
is more reliable than wall time on a busy machine.

Peak memory is the peak of the process minus its memory after imports. CPU and Linux only (memory is
read from /proc). The last table splits a step of this project into its parts, in processor time, and
compares it with the time that one pass over the weights takes in the same run.
"""

import argparse
import contextlib
import gc
import importlib
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent))
from decode_engines import (  # noqa: E402
    IMPLEMENTATIONS,
    OURS,
    QUICK,
    READING,
    Implementation,
    Memory,
    Prompts,
    Shape,
    TinyLM,
    is_installed,
    make_prompts,
    write_model,
)
from workers import Worker, memory_mb, start_workers  # noqa: E402

from tinylm.cli.program import Parser, run_program  # noqa: E402
from tinylm.common.console import say
from tinylm.common.errors import UserError
from tinylm.common.files import writing  # noqa: E402
from tinylm.common.tables import Table, print_table  # noqa: E402

# --- in a worker process --------------------------------------------------------------------------


class Turn(NamedTuple):
    """What a worker is asked to do."""

    prompts: Prompts
    n_new: int


class Timing(NamedTuple):
    """What a worker sends after a turn."""

    first_seconds: float
    """of the prompt and one token"""
    step_seconds: float
    """of one decode step"""
    step_cpu_seconds: float
    """of all threads"""
    peak_mb: float


def work(pipe: Connection, name: str, folder: Path, threads: int) -> None:
    """Run turns until None comes; what a worker process does."""
    try:
        found = Implementation("", "", "", Memory, "") if name == READING else IMPLEMENTATIONS[name]
        if found.module:
            importlib.import_module(found.module)
        idle_mb = memory_mb("VmRSS")
        runner = found.make(folder, found.argument, threads)
        pipe.send(None)
        while (turn := pipe.recv()) is not None:
            if turn == "split":
                pipe.send(split_of(runner))
            else:
                pipe.send(take_turn(runner, turn, idle_mb))
    except Exception:
        traceback.print_exc()
        raise


def take_turn(runner: Any, turn: Turn, idle_mb: float) -> Timing:
    """Time one token, then all."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak from here on
    gc.collect()
    start, cpu_start = time.perf_counter(), time.process_time()
    runner.generate(turn.prompts, 1)
    middle, cpu_middle = time.perf_counter(), time.process_time()
    runner.generate(turn.prompts, turn.n_new)
    end, cpu_end = time.perf_counter(), time.process_time()
    others = turn.n_new - 1
    first, cpu_first = middle - start, cpu_middle - cpu_start
    return Timing(
        first,
        (end - middle - first) / others,
        (cpu_end - cpu_middle - cpu_first) / others,
        memory_mb("VmHWM") - idle_mb,
    )


# --- the parts of one step ------------------------------------------------------------------------

# What is timed in place for the split of a step: (module, function or class and method). Those of
# decoder.py and those of the lean step; an implementation calls one of the two.
PARTS = {
    "linear layers": [
        ("torch.nn.functional", "linear"),
        ("tinylm.generate.lean_step", "linear_function"),
    ],
    "rotation": [
        ("tinylm.model.decoder", "rotary_cos_sin"),
        ("tinylm.model.decoder", "apply_rotary"),
        ("tinylm.generate.lean_step", "rotate"),
    ],
    "attention": [("torch.nn.functional", "scaled_dot_product_attention")],
    "norms": [
        ("torch.nn.functional", "rms_norm"),
        ("tinylm.generate.lean_step", "norm_function"),
    ],
    "cache write": [
        ("tinylm.model.kv_cache", "KVCache.write"),
        ("tinylm.generate.lean_step", "LayerView.write"),
    ],
    "sampling": [("tinylm.generate.engine", "next_token")],
}
# These make functions; what they make is timed.
FACTORIES = {"linear_function", "norm_function"}


def split_of(runner: TinyLM, n_tokens: int = 64) -> dict[str, float]:
    """Processor seconds of each part in one step of one row, and of the rest."""
    from tinylm.generate.engine import Engine

    half = runner.engine.model.config.max_seq_len // 2
    n_new = min(n_tokens, half)
    prompts = [list(range(100, 100 + n_new))]
    with timed_parts() as parts_of:
        engine = runner.engine
        runner.engine = Engine(engine.model, engine.tokenizer)  # its lean step is made in here
        runner.generate(prompts, 2)
        before = dict(parts_of)
        start = time.process_time()
        runner.generate(prompts, 2)
        middle, first = time.process_time(), dict(parts_of)
        runner.generate(prompts, n_new + 2)
        end = time.process_time()
        runner.engine = engine
    # A turn of n_new + 2 tokens minus one of 2 tokens: n_new steps.
    parts = {}
    for name in PARTS:
        parts[name] = (parts_of[name] - 2 * first[name] + before[name]) / n_new
    parts["rest"] = (end - 2 * middle + start) / n_new - sum(parts.values())
    return parts


@contextlib.contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Add up the processor seconds spent in each of `PARTS`."""
    seconds = dict.fromkeys(PARTS, 0.0)
    with contextlib.ExitStack() as undo:
        for part, places in PARTS.items():
            for module, name in places:
                *outer, last = name.split(".")
                owner: Any = importlib.import_module(module)
                for attribute in outer:
                    owner = getattr(owner, attribute)
                original = getattr(owner, last)
                measured = timed_factory if last in FACTORIES else timed
                setattr(owner, last, measured(original, part, seconds))
                undo.callback(setattr, owner, last, original)
        yield seconds


def timed(function: Callable[..., Any], part: str, seconds: dict[str, float]) -> Any:
    """`function`, whose time is added to a part."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = function(*args, **kwargs)
        seconds[part] += time.process_time() - start
        return result

    return run


def timed_factory(factory: Callable[..., Any], part: str, seconds: dict[str, float]) -> Any:
    """`factory`, whose functions' time is added to a part."""
    return lambda *args: timed(factory(*args), part, seconds)


# --- in the main process --------------------------------------------------------------------------


@dataclass
class TimedWorker(Worker):
    """The process of one implementation, and its times in the present case."""

    timings: list[Timing] = field(default_factory=list)

    def median(self, name: str) -> float:
        """The median of a field of the timings."""
        return statistics.median(getattr(timing, name) for timing in self.timings)


@dataclass(frozen=True)
class Result:
    """One row of the table: medians over rounds."""

    batch: int
    prompts: str
    name: str
    first_ms: float
    tokens_per_s: float
    step_ms: float
    ratio: float
    """speed relative to `OURS` in the same round: above 1, this one is faster"""
    step_cpu_ms: float
    cpu_ratio: float
    peak_mb: float


def compare(
    running: list[TimedWorker], batch: int, prompts: Prompts, kind: str, args: argparse.Namespace
) -> list[Result]:
    """Run all rounds of one case."""
    turn = Turn(prompts, args.new_tokens)
    for worker in running:
        worker.ask(Turn(prompts, 2))  # warm-up
        worker.timings = []
    for number in range(args.rounds):
        say(f"batch {batch}, {kind} prompts: round {number + 1} of {args.rounds}")
        for worker in running:
            worker.timings.append(worker.ask(turn))
    ours = next(worker for worker in running if worker.name == OURS)
    results = []
    for worker in running:
        pairs = list(zip(ours.timings, worker.timings, strict=True))
        results.append(
            Result(
                batch=batch,
                prompts=kind,
                name=worker.name,
                first_ms=worker.median("first_seconds") * 1e3,
                tokens_per_s=batch / worker.median("step_seconds"),
                step_ms=worker.median("step_seconds") * 1e3,
                ratio=statistics.median(a.step_seconds / b.step_seconds for a, b in pairs),
                step_cpu_ms=worker.median("step_cpu_seconds") * 1e3,
                cpu_ratio=statistics.median(
                    a.step_cpu_seconds / b.step_cpu_seconds for a, b in pairs
                ),
                peak_mb=worker.median("peak_mb"),
            )
        )
    return results


def print_results(results: list[Result], missing: list[str], parameters: int) -> None:
    """Print the results as a table."""
    say(f"{parameters:,} parameters; speed is relative to {OURS} in the same round")
    columns = "batch|prompts||first ms|tokens/s|ms/step|speed|CPU ms|CPU speed|peak MB"
    rows = Table(tuple(columns.split("|")), text=("prompts", ""))
    for result in results:
        rows.add_row(
            str(result.batch),
            result.prompts,
            result.name,
            f"{result.first_ms:.1f}",
            f"{result.tokens_per_s:,.0f}",
            f"{result.step_ms:.2f}",
            f"{result.ratio:.2f}",
            f"{result.step_cpu_ms:.2f}",
            f"{result.cpu_ratio:.2f}",
            f"{result.peak_mb:,.0f}",
        )
    for name in missing:
        install = IMPLEMENTATIONS[name].install
        rows.add_row("", "", f"{name}: not installed: pip install {install}", *[""] * 7)
    print_table(rows)


def print_splits(splits: dict[str, dict[str, float]], reading_seconds: float, n_bytes: int) -> None:
    """Print where the time of a step goes, beside one pass over the weights."""
    what = "one step of one row, CPU ms"
    rows = Table((what, *splits), text=(what,))
    for part in next(iter(splits.values())):
        rows.add_row(part, *(f"{split[part] * 1e3:.2f}" for split in splits.values()))
    print_table(rows)
    speed = n_bytes / reading_seconds / 1e9
    say(
        f"one pass over the fp32 weights: {n_bytes / 1e6:.1f} MB in {reading_seconds * 1e3:.2f} ms, "
        f"{speed:.1f} GB/s"
    )
    for name, split in splits.items():
        if name.endswith("fp32"):
            linear = n_bytes / split["linear layers"] / 1e9
            say(f"{name}: its linear layers read {linear:.1f} GB/s")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="rows (1 8 32)")
    parser.add_argument(
        "--only", nargs="+", choices=["fp32", "bf16", "int8", "int4"], help="precisions (all)"
    )
    parser.add_argument("--names", nargs="+", choices=list(IMPLEMENTATIONS), help="rows (all)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="prompt length (128)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each implementation (5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and one round, as a smoke test"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Write the model, compare all cases, and print the tables."""
    if not Path("/proc/self/status").exists():
        problem = "reads memory from /proc, which this system does not have"
        raise UserError("benchmarks/decode.py", problem, "Run it on Linux")
    if args.new_tokens < 2:
        raise UserError("--new-tokens", f"must be at least 2, got {args.new_tokens}")
    if args.quick:
        args.batch, args.prompt_tokens, args.new_tokens, args.rounds = [1, 2], 8, 4, 1
    shape = QUICK if args.quick else Shape()
    wanted = [
        name
        for name in args.names or IMPLEMENTATIONS
        if name == OURS or not args.only or IMPLEMENTATIONS[name].group in args.only
    ]
    wanted = list(dict.fromkeys([OURS, *wanted]))
    names = [name for name in wanted if is_installed(IMPLEMENTATIONS[name].module)]
    missing = [name for name in wanted if name not in names]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        parameters = write_model(folder, shape, {IMPLEMENTATIONS[name].make for name in names})
        results = []

        def job(name: str, pipe: Connection) -> tuple[Callable[..., None], tuple[Any, ...]]:
            return work, (pipe, name, folder, args.threads)

        with start_workers(TimedWorker, [*names, READING], job) as running:
            for worker in running:
                worker.receive()  # ready
            for batch in args.batch:
                for kind in ["same", "different"] if batch > 1 else ["one"]:
                    prompts = make_prompts(shape, batch, args.prompt_tokens, same=kind == "same")
                    results += compare(running, batch, prompts, kind, args)
            splits = {
                worker.name: worker.ask("split")
                for worker in running
                if worker.name.startswith("tinylm")
            }
            reading = running[-1].median("step_cpu_seconds")
    rows = [result for result in results if result.name != READING]
    if args.json is not None:
        numbers = {
            "shape": asdict(shape),
            "parameters": parameters,
            "results": [asdict(result) for result in rows],
            "splits": splits,
            "reading_seconds": reading,
        }
        with writing(args.json, "--json"):
            args.json.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    print_results(rows, missing, parameters)
    print_splits(splits, reading, 4 * parameters)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return the exit code."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
