"""Connections with deadlines: a client that sends slowly, or reads nothing, is closed.

reading    a request, head and body, must be complete some seconds after its first byte, or
           after the connection was opened
idle       a connection without request is closed after uvicorn's own `timeout_keep_alive`
writing    text that a client does not take must be taken within some seconds
number     more connections than the limit are closed at once
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinylm.common.errors import UserError

READ_SECONDS = 20.0
WRITE_SECONDS = 20.0
MAX_CONNECTIONS = 512


class Connection(H11Protocol):
    """HTTP/1.1 with deadlines."""

    read_seconds = READ_SECONDS
    write_seconds = WRITE_SECONDS
    max_connections = MAX_CONNECTIONS
    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first request."""
        self.access_log = False  # its lines have what clients write; security.py logs
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        # A client that does not read fills this buffer; then `pause_writing` starts the clock.
        transport.set_write_buffer_limits(high=64 * 1024)
        self._start_reading()

    def data_received(self, data: bytes) -> None:
        """Stop the clock when the request is complete."""
        if self._reading is None:
            self._start_reading()
        super().data_received(data)
        self._check_reading()

    def handle_events(self) -> None:
        """Also after a pipelined request."""
        super().handle_events()
        self._check_reading()

    def _start_reading(self) -> None:
        self._reading = self.loop.call_later(self.read_seconds, self._abort)

    def _check_reading(self) -> None:
        if self._reading is not None and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._reading.cancel()
            self._reading = None

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.write_seconds, self._abort)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def _abort(self) -> None:
        self.transport.abort()


class HttpServer(Server):
    """uvicorn's server, which keeps the signal that ended it instead of raising it again.

    Args:
        on_stop: called when the server is asked to end.
    """

    def __init__(self, config: Config, on_stop: Callable[[], None]):
        super().__init__(config)
        self.on_stop = on_stop
        self.stop_signal: int | None = None

    def handle_exit(self, sig: int, frame: Any) -> None:
        """No new requests from now on; the second signal ends running ones too."""
        self.force_exit = self.should_exit
        self.stop_signal = self.stop_signal or sig
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let running requests end, within the time that the config grants."""
        self.on_stop()
        await super().shutdown(sockets)


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UserError: the port is taken or not allowed, or the address is not one of this machine.
    """
    if not 0 <= port <= 65535:
        raise UserError("--port", f"must be from 0 to 65535, got {port}", "Give --port 8000")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise UserError("--host", f"no such address: {host}", "Give --host 127.0.0.1") from None
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(128)
    except OSError as error:
        found.close()
        problem = f"cannot listen on {host} port {port}: {error.strerror}"
        fix = f"End the program that uses it, or choose another: --port {min(port + 1, 65535)}"
        raise UserError("--port", problem, fix) from None
    return found
