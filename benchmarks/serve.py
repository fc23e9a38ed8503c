"""Servers of OpenAI's API under load: this project, llama.cpp and transformers, equal weights.

    pip install accelerate==1.15.0 xllamacpp==2026.10.11549
    python benchmarks/serve.py
    python benchmarks/serve.py --clients 1 16 --names "tinylm serve" --rounds 1 --json load.json

A model of 13.8M parameters is written once with random weights (that of benchmarks/decode.py), and
exported for the others. All servers run during the whole benchmark, and only one of them is asked
at a time. They take turns, round after round, so noise of the machine affects all of them.

In a turn, each of N clients asks for one text after another: a prompt that no other request has,
32 new tokens (`--new-tokens`), greedy, as a stream. No text ends early. `first` is the time from the request to the
first text that arrives. Values are of all rounds together; `speed` and `CPU speed` are medians of the
ratios within a round. CPU ms is processor time of the server for each token of output, prompts
included: on a busy machine it is more reliable than the rest.

Each server generates with the threads of `--threads`, and up to 8 texts at once if it can.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent))
from decode_engines import (  # noqa: E402
    QUICK,
    ROOT,
    LlamaCpp,
    Shape,
    Transformers,
    is_installed,
    write_model,
)

from tinylm.cli.program import Parser, run_program  # noqa: E402
from tinylm.common.console import say
from tinylm.common.errors import UserError
from tinylm.common.files import writing  # noqa: E402
from tinylm.common.tables import Table, print_table  # noqa: E402

SLOTS = 8
START_SECONDS = 900
WORDS = ("the", "model", "reads", "a", "token", "and", "predicts", "what", "comes", "next", "from")

# --- the servers ----------------------------------------------------------------------------------

# llama.cpp's own server, which its command-line program runs too; xllamacpp has it compiled.
LLAMA_SERVER = """
import signal, sys, xllamacpp
file, port, threads, slots, context = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.port = file, port
params.n_parallel, params.n_ctx = slots, slots * context
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.no_extra_bufts = True  # as in decode_engines.py
params.fit_params = False
params.verbosity = 0
server = xllamacpp.Server(params)
signal.sigwait([signal.SIGTERM])
"""
TRANSFORMERS = "from transformers.cli.transformers import main; main()"


class Kind(NamedTuple):
    """How a server is started; {model}, {port}, ... in its command are filled in."""

    module: str
    install: str
    """for pip"""
    command: str
    """for Python, its words separated by spaces"""
    model: str
    """the file or folder below the folder of the model"""


KINDS = {
    "tinylm serve": Kind(
        "torch", "torch", "-m tinylm serve {model} --port {port} --slots {slots}", "model.ckpt"
    ),
    "tinylm serve --no-deterministic": Kind(
        "torch",
        "torch",
        "-m tinylm serve {model} --port {port} --slots {slots} --no-deterministic",
        "model.ckpt",
    ),
    "llama.cpp server": Kind(
        "xllamacpp",
        "xllamacpp==2026.10.11549",
        "-c {code} {model} {port} {threads} {slots} {context}",
        "f32.gguf",
    ),
    "transformers serve": Kind(
        "accelerate",
        "accelerate==1.15.0",
        "-c {code} serve {model} --port {port} --device cpu",
        "hf",
    ),
}
CODE = {"llama.cpp server": LLAMA_SERVER, "transformers serve": TRANSFORMERS}
OURS = "tinylm serve"


class Load(NamedTuple):
    """One turn of one server."""

    requests_per_s: float
    tokens_per_s: float
    first_seconds: list[float]
    """of each request"""
    cpu_seconds: float
    """of the server, for each token"""


@dataclass
class Server:
    """A running server, and its turns in the present case."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    model: str
    loads: list[Load] = field(default_factory=list)

    @property
    def url(self) -> str:
        """Where texts are asked for."""
        return f"http://127.0.0.1:{self.port}/v1/completions"

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system


@contextlib.contextmanager
def start_servers(
    names: list[str], folder: Path, shape: Shape, threads: int
) -> Iterator[list[Server]]:
    """Start the servers, wait until each has answered, and stop them at the end."""
    running: list[Server] = []
    with contextlib.ExitStack() as stack:
        for name in names:
            kind = KINDS[name]
            port = free_port()
            values = {"model": str(folder / kind.model), "port": port, "threads": threads}
            values |= {"slots": SLOTS, "context": shape.max_seq_len, "code": CODE.get(name)}
            words = [word.format(**values) for word in kind.command.split()]
            log = stack.enter_context((folder / f"{port}.log").open("wb"))
            environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, env=environment, stdout=log, stderr=log
            )
            stack.callback(stop, process)
            model = str(folder / kind.model) if name == "transformers serve" else folder.name
            running.append(Server(name, process, port, model))
        for server in running:
            wait_for(server, folder / f"{server.port}.log")
        yield running


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a server; kill it if it does not end by itself."""
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def wait_for(server: Server, log: Path) -> None:
    """Wait until a server has answered a short prompt."""
    say(f"waiting for {server.name}")
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.process.poll() is None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            asyncio.run(turn(server, [["the"]], 2))
            return
        time.sleep(1)
    print(log.read_text(encoding="utf-8", errors="replace")[-4000:], file=sys.stderr)
    raise RuntimeError(f"{server.name} does not answer; its output is above")


# --- the clients ----------------------------------------------------------------------------------


def make_prompts(n_clients: int, n_requests: int, n_words: int, seed: str) -> list[list[str]]:
    """The prompts of each client; words in random order, so no two begin alike."""
    draw = random.Random(seed)
    return [
        [" ".join(draw.choices(WORDS, k=n_words)) for _ in range(n_requests)]
        for _ in range(n_clients)
    ]


async def turn(server: Server, prompts: list[list[str]], n_new: int) -> Load:
    """Let as many clients as there are lists ask for one text after another."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start, cpu_start = time.perf_counter(), server.cpu_seconds()
        clients = [ask_all(session, server, own, n_new) for own in prompts]
        first = [seconds for found in await asyncio.gather(*clients) for seconds in found]
        seconds, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu_start
    n_tokens = len(first) * n_new
    return Load(len(first) / seconds, n_tokens / seconds, first, cpu / n_tokens)


async def ask_all(
    session: aiohttp.ClientSession, server: Server, prompts: list[str], n_new: int
) -> list[float]:
    """The seconds until the first text, of each prompt of one client."""
    return [await ask(session, server, prompt, n_new) for prompt in prompts]


async def ask(session: aiohttp.ClientSession, server: Server, prompt: str, n_new: int) -> float:
    """The seconds until the first text of an answer; waits for its end."""
    body = {"model": server.model, "prompt": prompt, "max_tokens": n_new, "temperature": 0}
    start, first, reason = time.perf_counter(), None, None
    async with session.post(server.url, json=body | {"stream": True}) as response:
        if response.status != 200:
            raise RuntimeError(f"{server.name}: {response.status}: {await response.text()}")
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if not line.startswith(b"data: ") or data == b"[DONE]":
                continue
            for choice in json.loads(data).get("choices", ()):
                if choice["text"] and first is None:
                    first = time.perf_counter() - start
                reason = choice.get("finish_reason") or reason
    if reason != "length":
        raise RuntimeError(f"{server.name}: a text ended early: finish_reason {reason}")
    return time.perf_counter() - start if first is None else first


# --- the comparison -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One row of the table."""

    clients: int
    name: str
    requests_per_s: float
    tokens_per_s: float
    speed: float
    """tokens a second relative to `OURS` in the same round: above 1, this one is faster"""
    first_median_ms: float
    first_p95_ms: float
    first_ratio: float
    """median time to the first text relative to `OURS`: above 1, this one is slower"""
    cpu_ms: float
    cpu_speed: float


def compare(running: list[Server], n_clients: int, args: argparse.Namespace) -> list[Result]:
    """Run all rounds of one number of clients."""
    n_requests = max(1, -(-args.requests // n_clients))
    for server in running:
        server.loads = []
    for number in range(args.rounds):
        say(f"{n_clients} clients: round {number + 1} of {args.rounds}")
        for server in running:
            seed = f"{n_clients} {number}"  # the same prompts for all
            prompts = make_prompts(n_clients, n_requests, args.prompt_words, seed)
            server.loads.append(asyncio.run(turn(server, prompts, args.new_tokens)))
    ours = next(server for server in running if server.name == OURS)
    return [result(server, ours, n_clients) for server in running]


def result(server: Server, ours: Server, n_clients: int) -> Result:
    """The row of a server."""
    first = [seconds * 1e3 for load in server.loads for seconds in load.first_seconds]
    our_first = [seconds * 1e3 for load in ours.loads for seconds in load.first_seconds]
    pairs = list(zip(ours.loads, server.loads, strict=True))
    return Result(
        clients=n_clients,
        name=server.name,
        requests_per_s=statistics.median(load.requests_per_s for load in server.loads),
        tokens_per_s=statistics.median(load.tokens_per_s for load in server.loads),
        speed=statistics.median(b.tokens_per_s / a.tokens_per_s for a, b in pairs),
        first_median_ms=statistics.median(first),
        first_p95_ms=percentile(first, 95),
        first_ratio=statistics.median(first) / statistics.median(our_first),
        cpu_ms=statistics.median(load.cpu_seconds for load in server.loads) * 1e3,
        cpu_speed=statistics.median(a.cpu_seconds / b.cpu_seconds for a, b in pairs),
    )


def percentile(values: list[float], percent: int) -> float:
    """The smallest value that at least `percent` of the values do not exceed.

    >>> percentile([5, 1, 4, 2, 3], 80), percentile([7], 95)
    (4, 7)
    """
    place = -(-len(values) * percent // 100)
    return sorted(values)[place - 1]


def print_results(results: list[Result], missing: list[str], parameters: int) -> None:
    """Print the results as a table."""
    say(f"{parameters:,} parameters; ratios are relative to {OURS}")
    columns = "clients||requests/s|tokens/s|speed|first ms|p95 ms|first ratio|CPU ms|CPU speed"
    rows = Table(tuple(columns.split("|")), text=("",))
    for found in results:
        rows.add_row(
            str(found.clients),
            found.name,
            f"{found.requests_per_s:.2f}",
            f"{found.tokens_per_s:,.0f}",
            f"{found.speed:.2f}",
            f"{found.first_median_ms:,.0f}",
            f"{found.first_p95_ms:,.0f}",
            f"{found.first_ratio:.2f}",
            f"{found.cpu_ms:.2f}",
            f"{found.cpu_speed:.2f}",
        )
    for name in missing:
        rows.add_row("", f"{name}: not installed: pip install {KINDS[name].install}", *[""] * 8)
    print_table(rows)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="at once (1 4 16 64)"
    )
    parser.add_argument("--names", nargs="+", choices=list(KINDS), help="servers (all)")
    parser.add_argument("--requests", type=int, default=32, help="at least, in a turn (32)")
    parser.add_argument("--prompt-words", type=int, default=64, help="of a prompt (64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens to generate (32)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server (3)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a server (1)")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model and one round, as a smoke test"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Write the model, compare all cases, and print the table."""
    if min([*args.clients, args.requests, args.rounds]) < 1:
        raise UserError("benchmarks/serve.py", "clients, requests and rounds must be at least 1")
    if args.quick:
        args.clients, args.requests, args.rounds = [1, 3], 4, 1
        args.prompt_words, args.new_tokens = 5, 4
    shape = QUICK if args.quick else Shape()
    wanted = list(dict.fromkeys([OURS, *(args.names or KINDS)]))
    names = [name for name in wanted if is_installed(KINDS[name].module)]
    missing = [name for name in wanted if name not in names]
    files = {KINDS[name].model for name in names}
    makers = {Transformers} if "hf" in files else set()
    if "f32.gguf" in files:
        makers.add(LlamaCpp)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        parameters = write_model(folder, shape, makers)
        with start_servers(names, folder, shape, args.threads) as running:
            results = []
            for n_clients in args.clients:
                results += compare(running, n_clients, args)
    if args.json is not None:
        numbers = {
            "parameters": parameters,
            "results": [asdict(found) for found in results],
            "load": os.getloadavg()[0],
        }
        with writing(args.json, "--json"):
            args.json.write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    print_results(results, missing, parameters)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = parse(argv)
    return run_program(lambda: run(args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
