"""The checks that every request must pass before a route reads it, and the headers of each answer.

Host      a name of this server. Else a page of another site, whose name was made to point to
          127.0.0.1 (DNS rebinding), could use the server as the user.
Origin    the page's own; another site's page may not ask, and gets no CORS header.
key       `Authorization: Bearer KEY`, compared in constant time; /health and the page need none
body      JSON, and not larger than the limit, whatever Content-Length says
"""

import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tinylm.common.errors import UserError
from tinylm.common.files import read_regular, reading
from tinylm.serve.errors import ApiError, busy, internal_error, where_of
from tinylm.serve.responses import Record

logger = logging.getLogger(__name__)

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
MIN_KEY_LENGTH = 16
HEADERS = {
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True)
class Rules:
    """Who may ask."""

    hosts: frozenset[str] = frozenset(LOCAL_NAMES)
    """names in a Host header, without port; `*`: any"""
    keys: tuple[bytes, ...] = ()
    """none: no key is asked for"""
    origins: frozenset[str] = frozenset()
    """of other sites whose pages may ask"""
    max_body: int = 4 * 2**20
    open_paths: frozenset[str] = frozenset({"/health"})
    """paths that need no key"""


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys in a file, one a line.

    Raises:
        UserError: there is none, or one is too short or has characters that no header may have.
    """
    with reading(path):
        lines = read_regular(path).splitlines()
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith(b"#"))
    if not keys:
        raise UserError(path, "contains no key", "Write one a line: openssl rand -hex 32")
    for number, key in enumerate(keys, 1):
        if len(key) < MIN_KEY_LENGTH or not key.isascii() or b" " in key:
            problem = f"key {number} must have at least {MIN_KEY_LENGTH} ASCII characters, no space"
            raise UserError(path, problem, "Make one: openssl rand -hex 32")
    return keys


class Guard:
    """ASGI middleware: checks, limits, headers of each answer, and its line in the log."""

    def __init__(
        self,
        app: ASGIApp,
        rules: Rules,
        *,
        is_closing: Callable[[], bool],
        on_end: Callable[[str, int, float, Record], None],
    ):
        self.app, self.rules = app, rules
        self.is_closing, self.on_end = is_closing, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, record, status = time.monotonic(), Record(), 0
        scope["record"] = record
        origin = Headers(scope=scope).get("origin")
        n_bytes = 0

        async def limited() -> Message:
            """The next part of the body, as long as it is not too large."""
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            if n_bytes > self.rules.max_body:
                raise self._too_large()
            return message

        async def decorated(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                if origin in self.rules.origins:
                    headers["access-control-allow-origin"] = origin
                    headers["vary"] = "Origin"
            await send(message)

        try:
            response = self._check(scope)
            if response is None:
                await self.app(scope, limited, decorated)
            else:
                await response(scope, receive, decorated)
        except Exception as error:
            problem = error
            if not isinstance(error, ApiError):
                logger.error("request failed: %s", where_of(error))
                problem = internal_error(error)
            if not status:
                response = JSONResponse(problem.body, problem.status, problem.headers)
                await response(scope, receive, decorated)
        seconds = time.monotonic() - start
        route = scope.get("route")
        path = getattr(route, "path", "other path")
        logger.info(
            "%s %s: %d in %.2f s, body of %d bytes, %d + %d tokens",
            *(scope["method"] if scope["method"] in METHODS else "other method", path, status),
            *(seconds, n_bytes, record.n_prompt_tokens, record.n_new_tokens),
        )
        self.on_end(path, status, seconds, record)

    def _check(self, scope: Scope) -> Response | None:
        """None if a route may answer; raises an ApiError, or returns the answer to a preflight."""
        headers, rules = Headers(scope=scope), self.rules
        host = headers.get("host", "")
        if len(headers.getlist("host")) != 1 or not self._knows(host):
            raise ApiError(
                400, "The Host header is not a name of this server; see --allow-host.", code="host"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in rules.origins and not _is_own(origin, host):
            raise ApiError(403, "Pages of other sites may not ask; see --allow-origin.")
        if scope["method"] == "OPTIONS" and origin in rules.origins:
            allowed = {
                "access-control-allow-methods": "GET, POST",
                # openai-js adds headers of its own; authorization is not part of "*"
                "access-control-allow-headers": "authorization, *",
                "access-control-max-age": "600",
            }
            return Response(status_code=204, headers=allowed)
        if rules.keys and scope["path"] not in rules.open_paths and not self._has_key(headers):
            raise ApiError(
                401,
                "A valid key is needed: Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self.is_closing() and scope["path"] != "/health":
            raise busy("The server is shutting down.", 10)
        if scope["method"] == "POST":
            self._check_body(headers)
        return None

    def _knows(self, host: str) -> bool:
        name = host.lower()
        if not name.endswith("]"):
            before, colon, port = name.rpartition(":")
            name = before if colon and port.isdecimal() else name
        return name in self.rules.hosts or (bool(name) and "*" in self.rules.hosts)

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = given.strip().encode("latin-1")
        # All are compared, so that the time reveals neither which key matches nor how much of it.
        found = [hmac.compare_digest(key, known) for known in self.rules.keys]
        return scheme.lower() == "bearer" and any(found)

    def _check_body(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # A page of another site may send other types without asking first.
            raise ApiError(400, "The header Content-Type must be application/json.")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self.rules.max_body:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        limit = self.rules.max_body
        message = f"The body must have at most {limit} bytes."
        return ApiError(413, message, code="body_too_large", headers={"Connection": "close"})


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def read_origins(urls: Sequence[str]) -> frozenset[str]:
    """Sites as a browser writes them in an Origin header.

    Raises:
        UserError: one is not scheme://name, with or without port: it could never be equal.
    """
    origins = frozenset(url.lower().removesuffix("/") for url in urls)
    for origin in origins:
        scheme, _, name = origin.partition("://")
        if scheme not in ("http", "https") or not name or set(name) & set("/*?#@ "):
            problem = f"must be the address of a site without path, got {origin}"
            raise UserError("--allow-origin", problem, "Give for example https://example.com")
    return origins


def _is_own(origin: str, host: str) -> bool:
    """Whether a page comes from this server."""
    return origin.lower() in (f"http://{host.lower()}", f"https://{host.lower()}")


def known_hosts(host: str, allowed: Sequence[str]) -> frozenset[str]:
    """The names in a Host header that mean this server.

    Raises:
        UserError: an allowed name has a port or a path: it could never be equal.
    """
    for name in allowed:
        if "/" in name or (":" in name and not name.endswith("]")):
            problem = f"must be a name without port, got {name}"
            raise UserError("--allow-host", problem, "Give for example example.com")
    own = f"[{host}]" if ":" in host else host
    names = {*LOCAL_NAMES, *(name.lower() for name in allowed)}
    if own not in ("0.0.0.0", "[::]"):  # noqa: S104
        names.add(own.lower())
    return frozenset(names)
