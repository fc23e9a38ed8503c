"""Serve models to clients that misbehave, and measure what they leave behind.

    python benchmarks/soak.py                              10 minutes and at least 1000 disconnects
    python benchmarks/soak.py --seconds 20 --disconnects 50

Kinds of clients:
    leaves          asks for a text and leaves: before the first token, in the stream, or in the
                    middle of an answer without stream; with FIN or with RST
    no_reader       asks for 8 long texts with 20 alternatives a token, and reads nothing
    slow_reader     takes 500 bytes of a stream every half second
    half            sends a part of a request, some of it byte by byte, and waits to be closed
    junk            no HTTP, wrong lengths, bodies that are too large or no JSON, wrong fields
    storm           HEAD, Range, other methods and path tricks, 40 requests on one connection
    other_model     asks for one of three models, of which two fit in memory, and may leave
    good            asks for a text with a seed, whose text must be the same each time

The server is `python -m tinylm serve` with its own limits. Its resident memory, open files and
threads are read from /proc when warm and at the end, when all clients have left; texts that still run
or wait are read from its /metrics. Memory has a high-water mark, which is that of many heavy requests
at once: to warm up, clients of the same kind come together, of one kind after the other, and then
all kinds for a minute, or a quarter of the time. Each client is a function of (--seed, its number).
Needs Linux.

tests/serve/test_load.py lets the same clients loose on a server with deadlines of a second.
"""

import argparse
import asyncio
import contextlib
import csv
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tinylm.checkpoint import format as checkpoint_format  # noqa: E402
from tinylm.config.schema import Config  # noqa: E402
from tinylm.model.decoder import Decoder  # noqa: E402
from tinylm.tokenizer.byte_char import ByteTokenizer  # noqa: E402

CONTEXT = 1024
MODELS = ("first", "second", "third")
PLAIN = "/v1/completions"
ASK = {"prompt": "ab", "temperature": 1.5, "max_tokens": 40}
JSON_TYPE = "content-type: application/json"
# Of memory in MB, open files and threads, what a server may have more at the end than when warm.
LIMITS = {"rss_mb": 20.0, "files": 2, "threads": 2, "texts": 0}
MAX_WARM_UP = 60
CLOSED_AFTER = 25  # seconds; the server closes at its deadlines of 20
ANSWERED_AFTER = 120  # seconds, on a machine that does other work
ENDED_AFTER = 120


# --- the server ---


def write_model(path: Path, seed: int) -> None:
    """Write a checkpoint of a random model whose texts are not all the same."""
    shape = {
        "vocab_size": 260, "max_seq_len": CONTEXT, "n_layers": 2, "d_model": 64, "n_heads": 4,
        "tie_embeddings": False,
    }  # fmt: skip
    config = Config.model_validate({"model": shape})
    torch.manual_seed(seed)
    model = Decoder(config.model)
    with torch.no_grad():
        model.head.weight.normal_()
    state = {
        "format": checkpoint_format.FORMAT,
        "schema": checkpoint_format.SCHEMA,
        "stage": "pretrain",
        "step": 1,
        "tokens": 1,
        "train_loss": 2.5,
        "val_loss": None,
        "created": 1.0,
        "config": config.to_plain(),
        "tokenizer": ByteTokenizer().to_plain(),
        "weights": model.state_dict(),
    }
    path.parent.mkdir(parents=True)
    checkpoint_format.write(path, state)


@contextlib.contextmanager
def serving(folder: Path):
    """The process of a server of three models, and its port."""
    for number, name in enumerate(MODELS):
        write_model(folder / "models" / name / "final.ckpt", number)
    command = [sys.executable, "-m", "tinylm", "serve", str(folder / "models"), "--port", "0"]
    log = folder / "server.log"
    with open(log, "wb") as errors:
        process = subprocess.Popen([*command, "--max-models", "2"], stderr=errors, cwd=ROOT)
    try:
        port = None
        while port is None:
            if process.poll() is not None:
                raise RuntimeError(f"the server ended: {log.read_text(encoding='utf-8')}")
            time.sleep(0.2)
            port = re.search(r"serving http://127\.0\.0\.1:(\d+)/", log.read_text(encoding="utf-8"))
        yield process, int(port[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(ENDED_AFTER)


@dataclass(frozen=True)
class Usage:
    """What the server holds."""

    rss_mb: float
    files: int
    threads: int
    texts: int
    """that are generated or wait"""


async def usage(pid: int, port: int) -> Usage:
    """Read it from /proc and /metrics."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = {name: int(n) for name, n in re.findall(r"^(VmRSS|Threads):\s+(\d+)", status, re.M)}
    text = await asyncio.to_thread(get, port, "/metrics")
    texts = re.search(rb"^tinylm_texts (\S+)", text, re.M)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Usage(found["VmRSS"] / 1024, files, found["Threads"], int(float(texts[1])))


def get(port: int, path: str) -> bytes:
    """The answer to a GET, with its head."""
    with socket.create_connection(("127.0.0.1", port), timeout=ANSWERED_AFTER) as connection:
        head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        connection.sendall(head.encode())
        data = b""
        while part := connection.recv(65536):
            data += part
    return data


# --- clients ---


def request(body: dict | bytes, *headers: str) -> bytes:
    """A POST request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {PLAIN} HTTP/1.1", "host: localhost", JSON_TYPE, *headers]
    if not any(line.startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"content-length: {len(data)}")
    return "\r\n".join([*lines, "", ""]).encode() + data


class Client:
    """A connection, and a random number generator that decides how it misbehaves."""

    def __init__(self, soak: "Soak", number: int):
        self.soak = soak
        self.chance = random.Random(f"{soak.seed}/{number}")

    async def __aenter__(self) -> "Client":
        made = socket.socket()
        made.setblocking(False)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", self.soak.port))
        self.reader, self.writer = await asyncio.open_connection(sock=made, limit=4096)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.chance.random() < 0.5:  # RST instead of FIN
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        self.writer.transport.abort()

    def ask(self, *headers: str, **changes: object) -> bytes:
        """A request for a text of the first model."""
        return request(ASK | {"model": self.soak.models[0]} | changes, *headers)

    async def send(self, data: bytes) -> None:
        """Send, as far as the server reads."""
        self.writer.write(data)
        await self.writer.drain()

    async def until_closed(self, seconds: float = CLOSED_AFTER) -> bytes:
        """All that the server sends until it closes the connection."""
        async with asyncio.timeout(seconds):
            data = b""
            while part := await self.reader.read(65536):
                data += part
            return data


async def leaves(client: Client) -> None:
    """Leaves before the first token, in the stream, or in the middle of an answer."""
    chance = client.chance
    await client.send(client.ask(stream=chance.random() < 0.7, max_tokens=200))
    when = chance.randrange(3)
    if when == 1:
        await asyncio.sleep(chance.uniform(0, 0.3))
    elif when == 2:
        async with asyncio.timeout(ANSWERED_AFTER):
            await client.reader.read(chance.randrange(1, 2000))
    client.soak.disconnects += 1


async def no_reader(client: Client) -> None:
    """The texts fill the buffers of the sockets; the server closes at its deadline."""
    await client.send(client.ask(stream=True, n=8, logprobs=20, max_tokens=CONTEXT))
    waits = client.chance.choice((1, 5, CLOSED_AFTER))
    await asyncio.sleep(waits if client.soak.is_warm else CLOSED_AFTER)
    client.soak.disconnects += 1


async def slow_reader(client: Client) -> None:
    """Takes a little now and then."""
    await client.send(client.ask(stream=True, n=2, logprobs=20, max_tokens=500))
    for _ in range(client.chance.randrange(2, 30)):
        async with asyncio.timeout(ANSWERED_AFTER):
            await client.reader.read(500)
        await asyncio.sleep(0.5)
    client.soak.disconnects += 1


async def half(client: Client) -> None:
    """A part of a request."""
    chance = client.chance
    whole = client.ask()
    part = whole[: chance.randrange(1, len(whole))]
    if chance.random() < 0.3:
        for byte in part[:20]:
            await client.send(bytes([byte]))
            await asyncio.sleep(1)
    else:
        await client.send(part)
    if chance.random() < 0.3:
        client.writer.write_eof()
    if chance.random() < 0.5:
        await asyncio.sleep(chance.uniform(0, 2))
        client.soak.disconnects += 1
    else:
        await client.until_closed()


def junk_requests(client: Client) -> list[bytes]:
    """Requests that must be refused."""
    chance = client.chance
    deep = b'{"a":' * 20_000 + b"1" + b"}" * 20_000
    return [
        chance.randbytes(300) + b"\r\n\r\n",
        request(b""),
        request(chance.randbytes(3000)),
        request(deep),
        request(b'{"prompt": "\\ud800"}'),
        request(b'{"seed": ' + b"9" * 100_000 + b"}"),
        client.ask(prompt="a" * 3_000_000),
        client.ask(prompt=[10**9] * 1000),
        client.ask(max_tokens=True),
        client.ask(temperature=1e9),
        client.ask(model="../first"),
        client.ask("content-length: 100000000"),
        client.ask("content-length: 5"),
        client.ask("content-length: -1"),
        request(b"10000\r\n" + b"a" * 65536 + b"\r\n", "transfer-encoding: chunked"),
        request(b"zz\r\n", "transfer-encoding: chunked"),
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000,
    ]


async def junk(client: Client) -> None:
    """One of them; of a body that is sent without an end, up to 6 MB."""
    chance = client.chance
    data = chance.choice(junk_requests(client))
    await client.send(data)
    if b"transfer-encoding" in data[:200] and b"zz" not in data[-5:]:
        for _ in range(100):
            await client.send(b"10000\r\n" + b"a" * 65536 + b"\r\n")
    async with asyncio.timeout(ANSWERED_AFTER):
        answer = await client.reader.read(12)
    if answer and not re.match(rb"HTTP/1.1 4\d\d", answer):
        client.soak.problems.append(f"junk was answered with {answer!r}")


PATHS = (
    "/", "/app.js", "/style.css", "/vendor/marked.js", "/health", "/metrics", "/v1/models", "/runs",
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/vendor/", "/v1/models/%00",
)  # fmt: skip


async def storm(client: Client) -> None:
    """Many requests at once; half of the clients leave without reading."""
    chance = client.chance
    data = b""
    for _ in range(40):
        method = chance.choice(("GET", "HEAD", "HEAD", "OPTIONS", "DELETE", "TRACE"))
        start = chance.randrange(-10, 10**6)
        ranges = ",".join(f"{start + n}-{start + 2 * n}" for n in range(chance.randrange(200)))
        head = f"{method} {chance.choice(PATHS)} HTTP/1.1\r\nhost: localhost\r\n"
        data += f"{head}range: bytes={ranges}\r\nif-none-match: *\r\n\r\n".encode()
    await client.send(data)
    if chance.random() < 0.5:
        client.soak.disconnects += 1
        return
    client.writer.write_eof()
    if b"root:" in await client.until_closed():
        client.soak.problems.append("a file outside the page was served")


async def other_model(client: Client) -> None:
    """May leave while the model is loaded."""
    name = client.chance.choice(client.soak.models)
    await client.send(client.ask(model=name, max_tokens=5))
    if client.chance.random() < 0.5:
        await asyncio.sleep(client.chance.uniform(0, 0.2))
        client.soak.disconnects += 1
        return
    async with asyncio.timeout(ANSWERED_AFTER):
        answer = await client.reader.read(12)
    if answer not in (b"HTTP/1.1 200", b"HTTP/1.1 503"):
        client.soak.problems.append(f"another model was answered with {answer!r}")


async def good(client: Client) -> None:
    """The same text each time, and /health within a second."""
    await client.send(client.ask("connection: close", seed=1))
    answer = await client.until_closed(ANSWERED_AFTER)
    if answer.startswith(b"HTTP/1.1 200"):
        client.soak.texts.add(json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["text"])
    elif not answer.startswith(b"HTTP/1.1 503"):
        client.soak.problems.append(f"a good request was answered with {answer[:80]!r}")
    start = time.monotonic()
    await asyncio.to_thread(get, client.soak.port, "/health")
    client.soak.health_seconds.append(time.monotonic() - start)


Kind = Callable[[Client], Awaitable[None]]
# Kind, how often; the slow ones have tasks of their own.
QUICK = {leaves: 6, junk: 3, storm: 2, other_model: 1, good: 2}
SLOW = {no_reader: 1, slow_reader: 2, half: 3}


# --- the soak ---


@dataclass
class Soak:
    """What the clients did and found."""

    port: int
    seed: int
    models: tuple[str, ...] = MODELS
    is_warm: bool = True
    disconnects: int = 0
    counts: Counter = field(default_factory=Counter)
    """clients of each kind"""
    cut: int = 0
    """connections that the server closed while the client was sending or waiting"""
    texts: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)
    n_clients: int = 0

    async def run_client(self, kind: Kind) -> None:
        """One client."""
        self.n_clients += 1
        try:
            async with Client(self, self.n_clients) as client:
                await kind(client)
        except TimeoutError:
            self.problems.append(f"{kind.__name__}: no answer in time")
        except OSError:
            self.cut += 1
        self.counts[kind.__name__] += 1

    async def run_clients(self, kinds: dict[Kind, int]) -> None:
        """One client after the other, until canceled."""
        while True:
            chance = random.Random(f"{self.seed}/kind/{self.n_clients}")
            [kind] = chance.choices([*kinds], [*kinds.values()])
            await self.run_client(kind)
            await asyncio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def crowd(self, n_clients: int) -> AsyncIterator[None]:
        """Within the block, this many quick and slow clients at a time."""
        kinds = (*[QUICK] * n_clients, *[SLOW] * n_clients)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.run_clients(each)) for each in kinds]
            yield
            for task in tasks:
                task.cancel()


async def soak(pid: int, port: int, args: argparse.Namespace) -> tuple[Soak, list[Usage]]:
    """Let clients misbehave; what the server held when warm, every 10 seconds, and at the end."""
    found = Soak(port, args.seed, is_warm=False)
    for kind in (*SLOW, *QUICK):
        await asyncio.gather(*(found.run_client(kind) for _ in range(args.clients)))
    found.is_warm = True
    async with found.crowd(args.clients):
        await asyncio.sleep(min(args.seconds / 4, MAX_WARM_UP))
        held = [await usage(pid, port)]
        start, n_before = time.monotonic(), found.disconnects
        while (
            time.monotonic() - start < args.seconds
            or found.disconnects - n_before < args.disconnects
        ):
            await asyncio.sleep(min(10, args.seconds / 10))
            held.append(await usage(pid, port))
    for _ in range(60):  # the deadlines of the server, and of idle threads
        held.append(await usage(pid, port))
        if not excess(held[0], held[-1]):
            break
        await asyncio.sleep(1)
    return found, held


def excess(before: Usage, after: Usage) -> list[str]:
    """What is above its limit at the end."""
    found = []
    for name, limit in LIMITS.items():
        base = 0 if name == "texts" else getattr(before, name)
        value = getattr(after, name)
        if value > base + limit:
            found.append(f"{name}: {value:g}, when warm {base:g}, limit +{limit:g}")
    return found


def report(found: Soak, held: list[Usage], seconds: float) -> list[str]:
    """The problems; the figures are printed."""
    print(f"{seconds:.0f} s, {found.n_clients} clients, {found.disconnects} of them left early")
    print(", ".join(f"{kind} {n}" for kind, n in sorted(found.counts.items())))
    print(f"closed by the server while sending or waiting: {found.cut}")
    print(f"/health: at most {1000 * max(found.health_seconds, default=0):.0f} ms")
    print(f"{'':<8} {'warm':>8} {'highest':>8} {'end':>8}")
    for name in LIMITS:
        values = [getattr(usage, name) for usage in held]
        shown = (values[0], max(values), values[-1])
        print(f"{name:<8} " + " ".join(f"{value:>8.0f}" for value in shown))
    problems = [*dict.fromkeys(found.problems), *excess(held[0], held[-1])]
    if len(found.texts) != 1:
        problems.append(f"a text with a seed was different: {len(found.texts)} texts")
    return problems


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="least time after warming up (600)"
    )
    parser.add_argument("--disconnects", type=int, default=1000, help="least number (1000)")
    parser.add_argument("--clients", type=int, default=8, help="quick and slow ones at once (8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="CSV of the server's memory, files, threads, texts"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the soak; 0 if nothing remained and every answer was right."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        start = time.monotonic()
        with serving(Path(name)) as (process, port):
            found, held = asyncio.run(soak(process.pid, port, args))
            seconds, ending = time.monotonic() - start, time.monotonic()
        print(f"ended {time.monotonic() - ending:.1f} s after SIGTERM")
        log = (Path(name) / "server.log").read_text(encoding="utf-8")
        problems = report(found, held, seconds)
        if "Traceback" in log or "request failed" in log:
            problems.append("the server's log has errors: " + log[log.find("Traceback") :][:2000])
    if args.out:
        with open(args.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(LIMITS)
            writer.writerows([getattr(usage, name) for name in LIMITS] for usage in held)
    for problem in problems:
        print(f"problem: {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
