"""The response of one generation: it ends with its client, at its deadline, or with its text.

before the first byte    an error is a status and a JSON body
after it                 an error is an event, and [DONE] follows
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tinylm.serve.answers import Answer, Json
from tinylm.serve.errors import ApiError, internal_error, where_of
from tinylm.serve.models import ModelStore

logger = logging.getLogger(__name__)


@dataclass
class Record:
    """What is counted of a request: sizes and times, nothing of its content."""

    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    first_token: float | None = None
    """seconds"""


class GenerationResponse(Response):
    """Generates while it is sent."""

    def __init__(self, store: ModelStore, answer: Answer, record: Record, *, timeout: float):
        super().__init__()
        self.store, self.answer, self.record, self.timeout = store, answer, record, timeout
        self.has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send(scope, receive, send))
        watch = asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            watch.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
        if not work.cancelled() and work.exception() is not None:
            raise work.exception()

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                await self._generate(scope, receive, send)
            return
        except (ApiError, ClientDisconnect) as error:
            problem = error
        except TimeoutError:
            problem = ApiError(504, f"The answer took more than {self.timeout:g} seconds.")
        except Exception as error:
            logger.error("request failed: %s", where_of(error))
            problem = internal_error(error)
        if isinstance(problem, ClientDisconnect):
            return
        if not self.has_begun:
            response = JSONResponse(problem.body, problem.status, problem.headers)
            await response(scope, receive, send)
            return
        await _send_part(send, event(problem.body) + DONE, more=False)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = bool(self.answer.body.stream)
        chunks = self._chunks()
        async with aclosing(chunks):
            async for group in chunks:
                if stream and group:
                    await self._begin(send)
                    await _send_part(send, b"".join(map(event, group)), more=True)
        if not stream:
            await JSONResponse(self.answer.whole())(scope, receive, send)
            return
        end = event(self.answer.usage_chunk()) if self.answer.body.includes_usage else b""
        await _send_part(send, end + DONE, more=False)

    async def _chunks(self) -> AsyncIterator[list[Json]]:
        """The chunks of each token."""
        start = asyncio.get_running_loop().time()
        async with self.store.use(self.answer.body.model) as served:
            requests = await self.answer.start(served)
            self.record.n_prompt_tokens = self.answer.n_prompt_tokens
            with served.worker.reserved(len(requests)):
                await self.answer.score_prompts()
                only_prompts = self.answer.without_tokens()
                if only_prompts is not None:
                    yield only_prompts
                    return
                texts = served.worker.generate(requests)
                async with aclosing(texts):
                    async for index, output in texts:
                        if self.record.first_token is None:
                            self.record.first_token = asyncio.get_running_loop().time() - start
                        self.record.n_new_tokens += 1
                        yield list(self.answer.add(index, output))

    async def _begin(self, send: Send) -> None:
        if self.has_begun:
            return
        self.has_begun = True
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


DONE = b"data: [DONE]\n\n"


def event(content: Json) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


async def _send_part(send: Send, data: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def _disconnect(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
