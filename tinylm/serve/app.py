"""The routes of the server: OpenAI's API for the models of a `ModelStore`.

request ─▶ Guard (security.py) ─▶ route ─▶ BodyReader ─▶ GenerationResponse ─▶ EngineWorker
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from tinylm.serve.answers import ChatAnswer, CompletionAnswer
from tinylm.serve.body import BodyReader
from tinylm.serve.errors import ApiError, internal_error
from tinylm.serve.metrics import Metrics
from tinylm.serve.models import ModelStore
from tinylm.serve.pages import FILES, add_pages
from tinylm.serve.prompts import conversation_ids, require_known, text_ids
from tinylm.serve.responses import GenerationResponse
from tinylm.serve.runs import add_runs
from tinylm.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from tinylm.serve.security import Guard, Rules

TIMEOUT = 600.0


def make_app(
    store: ModelStore, rules: Rules, *, timeout: float = TIMEOUT, logs: Path | None = None
) -> tuple[FastAPI, ASGIApp]:
    """The FastAPI application, and the guarded application that the server runs.

    Args:
        timeout: seconds that a generation may take.
        logs: the folder of the runs that the page shows.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        store.close()

    # No documentation pages: they load scripts from other sites.
    app = FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    app.state.is_closing = False
    metrics, bodies = Metrics(store), BodyReader()
    _add_generation(app, store, bodies, timeout)
    _add_tokens(app, store, bodies)
    _add_information(app, store, metrics)
    _add_errors(app)
    add_runs(app, logs)
    add_pages(app, FILES)
    guarded = Guard(
        app,
        replace(rules, open_paths=rules.open_paths | {*FILES}),
        is_closing=lambda: app.state.is_closing,
        on_end=metrics.add,
    )
    return app, guarded


def _add_generation(app: FastAPI, store: ModelStore, bodies: BodyReader, timeout: float) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await bodies.read(request, ChatRequest)
        record = request.scope["record"]
        return GenerationResponse(store, ChatAnswer(body), record, timeout=timeout)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        body = await bodies.read(request, CompletionRequest)
        record = request.scope["record"]
        return GenerationResponse(store, CompletionAnswer(body), record, timeout=timeout)


def _add_tokens(app: FastAPI, store: ModelStore, bodies: BodyReader) -> None:
    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await bodies.read(request, TokenizeRequest)
        async with store.use(body.model) as served:
            if body.messages is not None:
                ids = await conversation_ids(served, body.messages)
            elif body.prompt in served.tokenizer.special_names.values():
                ids = served.tokenizer.encode(body.prompt, allowed_special=[body.prompt])
            else:
                ids = await text_ids(served, body.prompt)
            answer = {"tokens": ids, "count": len(ids), "max_model_len": served.context}
        return JSONResponse(answer)

    @app.get("/tokenizer_info")
    async def tokenizer_info(model: str | None = None) -> Response:
        """The end of a text, which lm-evaluation-harness asks for, and all special tokens, which the
        page marks.
        """
        async with store.use(model) as served:
            tokenizer = served.tokenizer
            name = tokenizer.special_names.get(tokenizer.eos_id)
            info = {"tokenizer_class": tokenizer.kind, "eos_token": name}
            info["special_tokens"] = list(tokenizer.special_names.values())
        return JSONResponse(info)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await bodies.read(request, DetokenizeRequest)
        async with store.use(body.model) as served:
            require_known(served, body.tokens, "tokens")
            text = served.tokenizer.decode(body.tokens)
        return JSONResponse({"prompt": text})


def _add_information(app: FastAPI, store: ModelStore, metrics: Metrics) -> None:
    def model(name: str) -> dict[str, Any]:
        created = store.created[name]
        return {"id": name, "object": "model", "created": created, "owned_by": "tinylm"}

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model(name) for name in store.paths]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name not in store.paths:
            message = "There is no such model; GET /v1/models lists them."
            raise ApiError(404, message, param="model", code="model_not_found")
        return JSONResponse(model(name))

    @app.get("/health")
    async def health() -> Response:
        if app.state.is_closing:
            return JSONResponse({"status": "shutting down"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def prometheus() -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(metrics.text(), media_type=kind)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        """No such path, or another method."""
        problem = ApiError(error.status_code, f"{error.detail}.", headers=error.headers)
        return JSONResponse(problem.body, problem.status, problem.headers)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        """A bug; it is raised again after this answer, and security.py logs it."""
        problem = internal_error(error)
        return JSONResponse(problem.body, problem.status)

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)
