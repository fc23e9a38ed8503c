"""Break a training run, give the same command again, and compare it with an undisturbed run.

    python benchmarks/chaos.py                                  2 rounds of every kind
    python benchmarks/chaos.py --kinds kill --rounds 10         only kill -9 at random moments
    python benchmarks/chaos.py --kinds seam_kill --rounds 200   at one seam after the other
    python benchmarks/chaos.py --kinds kill --recipe research   the research recipe: Muon, bigrams

Kinds:
    kill        kill -9 at random moments, up to three times
    signal      SIGTERM, SIGHUP, SIGUSR1, ..., or SIGINT once or twice, at a random moment
    seam_kill   dies before an fsync, rename, link or removal of a file; these are the run's seams
    EIO, ENOSPC, EACCES   the operating system refuses one of these calls
    disk_full   no file can become longer than a random limit
    damage      the newest checkpoint, or each one, is cut short, has a flipped bit or a zeroed tail,
                or is an empty file, a Git LFS pointer or an HTML page

A case survived if the broken process ended with an exit code of its fault and without a traceback,
and the same command then ran to the end. It is equal if all numbers in metrics.csv but the measured
ones
(as `float.hex`), and the weights, optimizer state and progress in the last checkpoint, are those of
the undisturbed run to the last bit, and no unfinished file is left. Each case is a function of
(--seed, kind, round) and of the moment that `kill` and `signal` hit. All runs have gradient
accumulation and dropout; the case chooses a token file or a stream, and 0 or 1 worker processes.
`--break-resume` ends each case with another seed, to show that the comparison can fail.

The programs are forks of this one, with the fault put into their `os` module: nothing in the
product knows of it. Needs Linux or macOS.
"""

import argparse
import contextlib
import csv
import errno
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from tinylm.checkpoint import format as checkpoint_format  # noqa: E402
from tinylm.common.platform import STOP_SIGNALS  # noqa: E402
from tinylm.runs.metrics_csv import MEASURED  # noqa: E402

CONFIG = """
recipe: {recipe}
model:
  {{n_layers: 1, d_model: 16, n_heads: 2, max_seq_len: 32,
   residual_dropout: 0.1, attention_dropout: 0.1}}
data:
  {{dataset: {dataset}, num_workers: {workers}, streaming: {stream}, shuffle_window: 32,
   cache_dir: {folder}/cache}}
training:
  {{seq_len: 32, micro_batch_size: 4, grad_accum_steps: 3, max_steps: {steps}, lr: 1e-3,
   val_every_steps: 8, val_batches: 4, log_every_steps: 1, save_every_steps: 3, keep_last: 3,
   checkpoint_dir: {folder}/checkpoints, log_dir: {folder}/logs, run_name: run}}
hardware: {{accelerator: cpu, threads: 1}}
"""
DATASET = ROOT / "data" / "tiny_corpus.txt"
COMPARED = ("weights", "optimizer", "progress", "cursor")
SEAMS = ("fsync", "replace", "link", "unlink")  # functions of `os`
MAX_SECONDS = 120  # of one process
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
HTML_PAGE = b"<!DOCTYPE html><html><title>404</title></html>"


class Broken(Exception):
    """A process that did not end as its fault demands."""


def require(condition: bool, problem: str) -> None:
    """Raise Broken unless `condition`."""
    if not condition:
        raise Broken(problem)


# --- a run ---


@dataclass(frozen=True)
class Run:
    """A training run in a folder of its own."""

    folder: Path
    steps: int
    recipe: str
    stream: bool = False
    workers: int = 0

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    def write_config(self) -> Path:
        """Write its config into its folder; return the path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.yaml"
        stream = str(self.stream).lower()
        text = CONFIG.format(**(vars(self) | {"stream": stream, "dataset": DATASET}))
        path.write_text(text, encoding="utf-8")
        return path

    def start(self, *flags: str, fault: Callable[[], None] = lambda: None) -> int:
        """Start or resume it in a child process, in which `fault` is called first;
        return the process id.
        """
        config = self.write_config()
        # The program itself unblocks Ctrl-C, once it handles it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        process = os.fork()
        if not process:
            self._run_and_exit(["--config", str(config), *flags], fault)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return process

    def _run_and_exit(self, arguments: list[str], fault: Callable[[], None]) -> None:
        code = 1
        try:
            output = os.open(self.folder / "output.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            for number in STOP_SIGNALS:  # nohup and background jobs ignore some
                signal.signal(number, signal.SIG_DFL)
            fault()
            code = train.main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def finish(self, *flags: str, fault: Callable[[], None] = lambda: None) -> int:
        """Start or resume it and wait for its end; return its exit code."""
        return wait(self.start(*flags, fault=fault))

    def start_until(self, step: int) -> tuple[int, int | None]:
        """Start or resume it and wait until `step` is in metrics.csv: its process id,
        and its exit code if it ended before.
        """
        process = self.start()
        deadline = time.monotonic() + MAX_SECONDS
        while self.last_step() < step:
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                return process, os.waitstatus_to_exitcode(status)
            require(time.monotonic() < deadline, f"step {step} was not reached")
            time.sleep(0.002)
        return process, None

    def kill(self, process: int) -> int:
        """kill -9; its worker processes may print that they lost it, which does not count."""
        os.kill(process, signal.SIGKILL)
        code = wait(process)
        (self.folder / "output.txt").unlink(missing_ok=True)
        return code

    def rows(self) -> list[dict[str, str]]:
        """The rows of metrics.csv."""
        path = self.folder / "logs" / "run" / "metrics.csv"
        if not path.exists():
            return []
        with open(path, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def last_step(self) -> int:
        """The last step in metrics.csv."""
        steps = [row["step"] or "" for row in self.rows()]
        return max((int(step) for step in steps if step.isdigit()), default=0)

    def output(self) -> str:
        """What its processes printed."""
        return (self.folder / "output.txt").read_text(encoding="utf-8", errors="replace")


def wait(process: int) -> int:
    """The exit code of a process, or -n if signal n ended it."""
    deadline = time.monotonic() + MAX_SECONDS
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise Broken(f"the process did not end in {MAX_SECONDS} s")
        time.sleep(0.002)


@dataclass(frozen=True)
class Undisturbed:
    """The run that a case is compared with."""

    run: Run
    n_seams: int
    """calls of `SEAMS` that it makes"""


# --- the faults: each breaks `run` and returns its description, or raises Broken ---


def kill(run: Run, reference: Undisturbed, rng: random.Random, number: int) -> str:
    """kill -9, within a step, an accumulation, a save or the preparation of data."""
    killed = []
    for n in range(times := rng.randint(1, 3)):
        step = int(run.steps * (n + rng.random()) / times)
        process, code = run.start_until(step)
        if code is None:
            time.sleep(rng.random() * 0.1)
            code = run.kill(process)
        require(code in (0, -signal.SIGKILL), f"exit code {code}")
        killed.append(run.last_step())
    return f"killed after steps {killed}"


def send_signal(run: Run, reference: Undisturbed, rng: random.Random, number: int) -> str:
    """A stop signal; before the first step it may also end the program at once."""
    sent = STOP_SIGNALS[number % len(STOP_SIGNALS)]
    times = rng.randint(1, 2)
    process, code = run.start_until(rng.randrange(run.steps))
    if code is not None:
        raise Broken(f"exit code {code} before the signal")
    time.sleep(rng.random() * 0.1)
    step = run.last_step()
    for _ in range(times):
        os.kill(process, sent)
        time.sleep(0.005)
    code = wait(process)
    is_over = (run.checkpoints / "final.ckpt").exists()
    allowed = {128 + sent} | ({0} if is_over else set())
    allowed |= {-sent} if step == 0 or is_over else set()
    named = f"{sent.name} sent {times} times after step {step}"
    require(code in allowed, f"{named}: exit code {code}")
    return named


def watch_seams(run: Run, on_call: Callable[[], None]) -> None:
    """Call `on_call` before each call of `SEAMS` on a file of the run."""

    def wrap(true: Callable[..., Any]) -> Callable[..., Any]:
        def call(*paths: Any, **options: Any) -> Any:
            if isinstance(paths[0], int) or str(paths[0]).startswith(str(run.folder)):
                on_call()
            return true(*paths, **options)

        return call

    for name in SEAMS:
        setattr(os, name, wrap(getattr(os, name)))


def act_at_seam(run: Run, seam: int, act: Callable[[], None]) -> None:
    """Call `act` before the seam of that number (1, 2, ...)."""
    seen = []

    def on_call() -> None:
        seen.append(1)
        if len(seen) == seam:
            act()

    watch_seams(run, on_call)


def seam_of(run: Run, reference: Undisturbed, number: int) -> int:
    """The seam of a round: each one once, in a random order that all kinds share."""
    order = list(range(1, reference.n_seams + 1))
    random.Random(reference.n_seams).shuffle(order)
    return order[number % len(order)]


def die_at_seam(run: Run, reference: Undisturbed, rng: random.Random, number: int) -> str:
    """End as by kill -9, before the call."""
    seam = seam_of(run, reference, number)
    code = run.finish(fault=lambda: act_at_seam(run, seam, lambda: os._exit(137)))
    require(code == 137, f"seam {seam}: exit code {code}")
    return f"died at seam {seam} of {reference.n_seams}"


def refuse(name: str) -> Callable[..., str]:
    """The fault that a seam raises the error `name` of the operating system."""
    value = getattr(errno, name)

    def fail() -> None:
        raise OSError(value, os.strerror(value))

    def refuse_at_seam(run: Run, reference: Undisturbed, rng: random.Random, number: int) -> str:
        seam = seam_of(run, reference, number)
        code = run.finish(fault=lambda: act_at_seam(run, seam, fail))
        require(code in (0, 2), f"{name} at seam {seam}: exit code {code}")
        said = run.output()
        if code == 2:
            require(os.strerror(value) in said, f"{name} at seam {seam} is not in the error")
        return f"{name} at seam {seam} of {reference.n_seams}: exit code {code}"

    return refuse_at_seam


def fill_disk(run: Run, reference: Undisturbed, rng: random.Random, number: int) -> str:
    """A write fails in the middle of a checkpoint or, in every second case, of the token file."""
    sizes = [path.stat().st_size for path in reference.run.checkpoints.glob("step-*.ckpt")]
    limit = rng.randint(20_000, max(sizes) - 1)
    if number % 2 and not run.stream:
        shutil.copytree(reference.run.folder / "cache", run.folder / "cache")
    code = run.finish(fault=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    require(code == 2, f"limit {limit}: exit code {code}")
    return f"no file above {limit} bytes"


def damage(run: Run, reference: Undisturbed, rng: random.Random, number: int) -> str:
    """Damaged checkpoints after kill -9; if there is no whole one, the run must not start again."""
    process, code = run.start_until(rng.randint(7, run.steps - 1))
    if code is None:
        run.kill(process)
    found = checkpoint_format.candidates(run.checkpoints)
    how, each = list(DAMAGES)[number % len(DAMAGES)], rng.random() < 0.3
    backup = run.folder / "backup"
    if each:
        shutil.copytree(run.checkpoints, backup)
    for path in found if each else found[:1]:
        content = DAMAGES[how](path.read_bytes(), rng)
        path.write_bytes(content)  # in place: last.ckpt is the same file
    if not each:
        return f"{how}: {found[0].name} of {len(found)}"
    code = run.finish()
    require(code == 2, f"{how}, every checkpoint: exit code {code}")
    require("every checkpoint is damaged" in run.output(), f"{how}: the error does not say it")
    shutil.rmtree(run.checkpoints)
    backup.rename(run.checkpoints)
    return f"{how}: every checkpoint, then restored from a backup"


def _flip_bit(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    flipped = content[place] ^ 1 << rng.randrange(8)
    return content[:place] + bytes([flipped]) + content[place + 1 :]


def _zero_tail(content: bytes, rng: random.Random) -> bytes:
    n = rng.randint(1, len(content))
    return content[:-n] + bytes(n)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut short": lambda content, rng: content[: rng.randrange(len(content))],
    "flipped bit": _flip_bit,
    "zeroed tail": _zero_tail,
    "Git LFS pointer": lambda content, rng: LFS_POINTER,
    "HTML page": lambda content, rng: HTML_PAGE,
    "empty": lambda content, rng: b"",
}
FAULTS: dict[str, Callable[[Run, Undisturbed, random.Random, int], str]] = {
    "kill": kill,
    "signal": send_signal,
    "seam_kill": die_at_seam,
    "EIO": refuse("EIO"),
    "ENOSPC": refuse("ENOSPC"),
    "EACCES": refuse("EACCES"),
    "disk_full": fill_disk,
    "damage": damage,
}


# --- comparison ---


def compare(expected: Run, actual: Run) -> list[str]:
    """Describe the differences between two complete runs, and the unfinished files of the second."""
    differences = []
    theirs = [exact_numbers(row) for row in expected.rows()]
    ours = [exact_numbers(row) for row in actual.rows()]
    for a, b in zip(theirs, ours, strict=False):
        if a != b:
            differences.append(f"metrics of step {float.fromhex(a['step']):.0f}")
    if len(theirs) != len(ours) or not ours:
        differences.append(f"{len(theirs)} and {len(ours)} rows of metrics")
    states = [checkpoint_format.read(run.checkpoints / "final.ckpt") for run in (expected, actual)]
    for key in COMPARED:
        if not same(states[0][key], states[1][key]):
            differences.append(f"{key} of the last checkpoint")
    # Which steps are kept depends on where a signal stopped the run, their number does not.
    counts = [len(list(run.checkpoints.glob("*.ckpt"))) for run in (expected, actual)]
    if counts[0] != counts[1]:
        differences.append(f"{counts[0]} and {counts[1]} checkpoints")
    left = [path.name for path in actual.folder.rglob("*.tmp")]
    return differences + [f"{name} is left" for name in left]


def exact_numbers(row: dict[str, str]) -> dict[str, str]:
    """The exact numbers of a row of metrics, without those that are measured."""
    return {
        name: float(value).hex() for name, value in row.items() if value and name not in MEASURED
    }


def same(a: Any, b: Any) -> bool:
    """Whether two nested values are equal, tensors exactly."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


# --- the program ---


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all"
    )
    parser.add_argument("--rounds", type=int, default=2, help="cases of each kind (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (default: 0)")
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps (default: 14)")
    parser.add_argument("--recipe", default="default", help="as in a config (default: default)")
    parser.add_argument("--max-seconds", type=float, help="start no further case after this time")
    parser.add_argument(
        "--break-resume",
        action="store_true",
        help="end each case with another seed; the comparison must then fail",
    )
    args = parser.parse_args(argv)
    if args.steps < 9:
        parser.error("--steps must be at least 9")
    return args


def main(argv: list[str] | None = None) -> int:
    """Try all cases and print the table; return 0 if all survived and are equal."""
    args = parse(argv)
    torch.set_num_threads(1)  # a fork has no other threads
    deadline = time.monotonic() + (args.max_seconds or float("inf"))
    counts = {kind: [0, 0, 0] for kind in args.kinds}
    with tempfile.TemporaryDirectory() as name:
        warm_up(Run(Path(name) / "warm-up", 1, args.recipe))
        for number in range(args.rounds):
            for kind in args.kinds:
                if time.monotonic() < deadline:
                    survived, equal = try_case(kind, number, args, Path(name))
                    for i, value in enumerate((True, survived, equal)):
                        counts[kind][i] += value
    print(f"{'kind':<10} {'tried':>6} {'survived':>9} {'equal':>6}")
    for kind, (tried, survived, equal) in counts.items():
        print(f"{kind:<10} {tried:>6} {survived:>9} {equal:>6}")
    return 0 if all(tried == equal for tried, _, equal in counts.values()) else 1


def warm_up(run: Run) -> None:
    """Train one step in this process: its imports would take each child 4 seconds."""
    handlers = [(number, signal.getsignal(number)) for number in STOP_SIGNALS]
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        code = train.main(["--config", str(run.write_config())])
    require(code == 0, f"the first run ended with {code}")
    for signal_number, handler in handlers:
        signal.signal(signal_number, handler)


def try_case(kind: str, number: int, args: argparse.Namespace, folder: Path) -> tuple[bool, bool]:
    """Whether one case survived, and is equal to its undisturbed run; it is described on stderr,
    with the end of its output if it failed.
    """
    rng = random.Random(f"{args.seed}/{kind}/{number}")
    stream, workers = rng.random() < 0.3, int(rng.random() < 0.3)
    reference = undisturbed(folder, args.steps, args.recipe, stream)
    run = Run(folder / f"{kind}-{number}", args.steps, args.recipe, stream, workers)
    how, survived, differences = kind, False, []
    try:
        how = FAULTS[kind](run, reference, rng, number)
        flags = ["training.seed=1", "--allow-changes"] if args.break_resume else []
        code = run.finish(*flags)
        require(code == 0, f"{how}: the same command then ended with {code}")
        require("Traceback" not in run.output(), f"{how}: traceback")
        survived = True
        differences = compare(reference.run, run)
    except Broken as error:
        differences = [str(error)]
    source = f"{'stream' if stream else 'token file'}, {workers} workers"
    result = "; ".join(differences[:5]) or "equal"
    print(f"{kind} {number}: {how} ({source}): {result}", file=sys.stderr)
    if differences:
        print("\n".join(run.output().splitlines()[-8:]), file=sys.stderr)
    shutil.rmtree(run.folder)
    return survived, survived and not differences


@cache
def undisturbed(folder: Path, steps: int, recipe: str, stream: bool) -> Undisturbed:
    """Train the run that nothing disturbs, and count its seams."""
    run = Run(folder / f"undisturbed-{stream}", steps, recipe, stream)
    run.folder.mkdir(parents=True)
    calls = os.open(run.folder / "seams.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    code = run.finish(fault=lambda: watch_seams(run, lambda: os.write(calls, b".") and None))
    os.close(calls)
    require(code == 0, f"the undisturbed run ended with {code}")
    return Undisturbed(run, (run.folder / "seams.txt").stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
