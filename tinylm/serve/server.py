"""Start, run and end of the server."""

import asyncio
import logging
import socket
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tinylm.common.device import share_one_heap
from tinylm.common.errors import UserError
from tinylm.serve.app import TIMEOUT, make_app
from tinylm.serve.connections import MAX_CONNECTIONS, Connection, HttpServer, open_socket
from tinylm.serve.models import EngineSettings, ModelStore, find_models
from tinylm.serve.security import Rules, known_hosts, read_keys, read_origins

logger = logging.getLogger(__name__)

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServerSettings:
    """Where the server listens, whom it answers, and its limits."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    no_auth: bool = False
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    max_models: int = 1
    max_body: int = 4 * 2**20
    max_connections: int = MAX_CONNECTIONS
    timeout: float = TIMEOUT
    grace: float = 10.0
    logs: Path | None = None
    """folder of the runs that the page shows"""


def serve(path: Path, settings: ServerSettings, engine: EngineSettings) -> int | None:
    """Serve the checkpoints at `path` until a signal; returns its number.

    Raises:
        UserError: the settings are not safe, the port is taken, or there is no checkpoint.
    """
    share_one_heap()
    rules = make_rules(settings)
    listening = open_socket(settings.host, settings.port)
    try:
        store = ModelStore(find_models(path), engine, max_models=settings.max_models)
        return asyncio.run(_serve(listening, store, rules, settings))
    finally:
        listening.close()


def make_rules(settings: ServerSettings) -> Rules:
    """Whom to answer; an address that others can reach needs a key, or an explicit --no-auth."""
    keys = () if settings.api_key_file is None else read_keys(settings.api_key_file)
    if settings.host not in LOCAL and not keys and not settings.no_auth:
        raise UserError(
            "--host",
            f"{settings.host} can be reached from other machines, and no key is asked for",
            "Give --api-key-file FILE, or --no-auth to let everyone use the server",
        )
    if keys and settings.no_auth:
        raise UserError(
            "--no-auth", "cannot be combined with --api-key-file", "Remove one of the two"
        )
    return Rules(
        hosts=known_hosts(settings.host, settings.allow_hosts),
        keys=keys,
        origins=read_origins(settings.allow_origins),
        max_body=settings.max_body,
    )


def make_server(
    store: ModelStore, rules: Rules, settings: ServerSettings, **deadlines: float
) -> HttpServer:
    """A server for a socket that listens already.

    Args:
        deadlines: attributes of `Connection` to change.
    """
    app, guarded = make_app(store, rules, timeout=settings.timeout, logs=settings.logs)
    limits = {"max_connections": settings.max_connections, **deadlines}
    config = uvicorn.Config(
        guarded,
        http=type("LimitedConnection", (Connection,), limits),
        ws="none",
        loop="asyncio",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=settings.grace,
        h11_max_incomplete_event_size=32 * 1024,
    )
    return HttpServer(config, on_stop=lambda: setattr(app.state, "is_closing", True))


async def _serve(
    listening: socket.socket, store: ModelStore, rules: Rules, settings: ServerSettings
) -> int | None:
    server = make_server(store, rules, settings)
    await store.load_first()  # its memory is printed before the first request
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("models: %s", ", ".join(store.paths))
    logger.info("page: http://%s:%d/", shown, port)
    logger.info("serving http://%s:%d/v1 (Ctrl-C ends it)", shown, port)
    await server.serve(sockets=[listening])
    return server.stop_signal
