"""A server in a thread, with a tiny random model, and raw sockets to it."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import state_of
from tinylm.checkpoint import format as checkpoint_format
from tinylm.config.schema import Config
from tinylm.model.decoder import Decoder
from tinylm.serve.models import EngineSettings, ModelStore
from tinylm.serve.security import Rules
from tinylm.serve.server import ServerSettings, make_server

CONTEXT = 96


def write_model(
    path: Path, *, stage: str = "sft", seed: int = 0, system: str | None = None
) -> Path:
    """Writes a checkpoint of a random model whose logits are far apart."""
    shape = {
        "vocab_size": 260, "max_seq_len": CONTEXT, "n_layers": 2, "d_model": 32, "n_heads": 4,
        "tie_embeddings": False,
    }  # fmt: skip
    config = Config.model_validate({"model": shape, "training": {"seq_len": 32}})
    torch.manual_seed(seed)
    model = Decoder(config.model)
    with torch.no_grad():
        model.head.weight.normal_()
    state = state_of(config, model, stage)
    if system is not None:
        state["system"] = system
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint_format.write(path, state)
    return path


class Running:
    """A server in a thread of its own."""

    def __init__(
        self,
        paths: dict[str, Path],
        rules: Rules,
        engine: EngineSettings,
        settings: ServerSettings,
        max_models: int,
        **deadlines: float,
    ):
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = ModelStore(paths, engine, max_models=max_models)
        self.server = make_server(self.store, rules, settings, **deadlines)
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()

    def _run(self) -> None:
        torch.set_num_threads(1)
        asyncio.run(self.server.serve(sockets=[self.listening]))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    # --- what tests ask ---

    @property
    def worker(self):
        [served] = self.store.in_memory.values()
        return served.worker

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def request(
        self, method: str, path: str, body: bytes | dict | None = None, **headers: str
    ) -> SimpleNamespace:
        """One request on a connection of its own; `content_type` is the header Content-Type."""
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        given = {"host": f"127.0.0.1:{self.port}", "connection": "close"}
        if body is not None:
            given |= {"content-type": "application/json", "content-length": str(len(body))}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(
            f"{k}: {v}\r\n" for k, v in given.items() if v is not None
        )
        with self.connect() as connection:
            connection.sendall(head.encode("latin-1") + b"\r\n" + (body or b""))
            return read_answer(connection)

    def post(self, path: str, body: bytes | dict, **headers: str) -> SimpleNamespace:
        return self.request("POST", path, body, **headers)


def read_answer(connection: socket.socket) -> SimpleNamespace:
    """The answer, until the server closes the connection."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(": ")
        headers[name.lower()] = value
    if headers.get("transfer-encoding") == "chunked":
        body = join_chunks(body)
    parsed = json.loads(body) if headers.get("content-type") == "application/json" else None
    status = int(lines[0].split()[1]) if lines[0] else None
    return SimpleNamespace(status=status, headers=headers, body=body, json=parsed)


def join_chunks(body: bytes) -> bytes:
    joined = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        joined += body[: int(size, 16)]
        body = body[int(size, 16) + 2 :]
    return joined


@pytest.fixture(scope="session")
def model_files(tmp_path_factory) -> dict[str, Path]:
    """A fine-tuned model and a base model."""
    folder = tmp_path_factory.mktemp("served")
    return {
        "chat": write_model(folder / "chat" / "final.ckpt"),
        "base": write_model(folder / "base" / "final.ckpt", stage="pretrain", seed=1),
    }


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    """Writes a checkpoint of a tiny random model."""
    return write_model


@pytest.fixture(scope="session")
def run_server(model_files) -> Callable[..., Iterator[Running]]:
    """Starts a server: a context manager."""

    @contextmanager
    def run(
        *names: str, rules: Rules | None = None, slots: int = 4, max_waiting: int = 8,
        deterministic: bool = True, max_models: int = 2, timeout: float = 60, logs: Path | None = None, paths: dict[str, Path] | None = None,
        max_connections: int = 512, grace: float = 5, **deadlines: float,
    ) -> Iterator[Running]:  # fmt: skip
        paths = paths or {name: model_files[name] for name in names or ("chat",)}
        engine = EngineSettings(slots=slots, deterministic=deterministic, max_waiting=max_waiting)
        settings = ServerSettings(
            timeout=timeout, grace=grace, max_connections=max_connections, logs=logs
        )
        running = Running(
            paths, rules or Rules(max_body=200_000), engine, settings, max_models, **deadlines
        )
        try:
            yield running
        finally:
            running.stop()

    return run


@pytest.fixture(scope="module")
def server(run_server) -> Iterator[Running]:
    """A fine-tuned and a base model."""
    with run_server("chat", "base") as running:
        yield running
