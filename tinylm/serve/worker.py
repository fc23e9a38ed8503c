"""One thread that generates with one model, for all requests of the server.

    event loop                        thread of the model
    submit ── Job ──▶ commands ─────▶ engine.add
    cancel ─────────▶ commands ─────▶ engine.cancel      before the next step
    job.items ◀────── events ◀─────── engine.step        a first token, or one of each running text

Only the thread touches the engine; only the event loop touches a job. Tokens are handed over once
per step, so that the event loop wakes once and not for each text.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tinylm.common.device import return_freed_memory
from tinylm.common.errors import UserError
from tinylm.generate.engine import Engine, Request
from tinylm.generate.output import TokenOutput
from tinylm.serve.errors import ApiError, busy, internal_error, of_user_error, where_of

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Job:
    """The texts of one request: `items` gets (index of the text, token) or (index, error)."""

    requests: Sequence[Request]
    items: asyncio.Queue[tuple[int, TokenOutput | ApiError]] = field(default_factory=asyncio.Queue)
    numbers: dict[int, int] = field(default_factory=dict)
    """number in the engine -> index of the text; only the thread uses it"""


class EngineWorker:
    """Generates with one engine, in a thread of its own.

    Args:
        make_engine: called again after an error of the model, whose cache may be half written.
        max_waiting: texts that may wait for a free slot; more are refused.
    """

    def __init__(self, make_engine: Callable[[], Engine], *, max_waiting: int):
        self.engine = make_engine()
        self._make_engine = make_engine
        self.slots = self.engine.slots
        self.limit = self.slots + max_waiting
        self.n_texts = 0
        """texts that are generated or wait"""
        self.loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for the event loop ---

    async def generate(self, requests: Sequence[Request]) -> AsyncIterator[tuple[int, TokenOutput]]:
        """The tokens of the texts, with the index of the text, as they are generated.

        Closing the iterator, as at the end of its task, ends the texts and frees their slots.

        Raises:
            ApiError: a text cannot be generated.
        """
        job = Job(requests)
        self._commands.put(lambda: self._add(job))
        running = len(requests)
        try:
            while running:
                index, item = await job.items.get()
                if isinstance(item, ApiError):
                    raise item
                if item.finish_reason is not None:
                    running -= 1
                yield index, item
        finally:
            if running:
                self._commands.put(lambda: self._cancel(job))

    @contextmanager
    def reserved(self, n: int) -> Iterator[None]:
        """Count `n` texts as running or waiting.

        Raises:
            ApiError: too many texts wait.
        """
        if n > self.limit:
            raise ApiError(400, f"At most {self.limit} texts can be asked for at once, got {n}.")
        if self.n_texts + n > self.limit:
            raise busy(f"{self.n_texts} texts are generated or wait; try again later.")
        self.n_texts += n
        try:
            yield
        finally:
            self.n_texts -= n

    async def call(self, function: Callable[[Engine], Any]) -> Any:
        """The result of a function that uses the engine, between two steps."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self.engine))
            except Exception as error:
                future.set_exception(error)

        self._commands.put(run)
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """End the thread after its current step."""
        self._commands.put(None)

    # --- in the thread ---

    def _run(self) -> None:
        while True:
            while not (self.engine.is_busy and self._commands.empty()):
                if not self.engine.is_busy and self._commands.empty():
                    return_freed_memory()  # that of its texts, and of a model that left
                command = self._commands.get()
                if command is None:
                    return
                command()
            try:
                events = self.engine.step()
            except Exception as error:  # of the model: the server must live
                self._fail(error)
                continue
            found: list[tuple[Job, int, TokenOutput | ApiError]] = []
            for event in events:
                job, index = self._jobs[event.number]
                if event.ends:  # another engine may give the number again
                    del self._jobs[event.number], job.numbers[event.number]
                item = event.output
                if item is None:
                    item = of_user_error(event.error, None)
                found.append((job, index, item))
            self._deliver(found)

    def _add(self, job: Job) -> None:
        for index, request in enumerate(job.requests):
            try:
                number = self.engine.add(request)
            except UserError as error:
                self._deliver([(job, index, of_user_error(error, "response_format"))])
                return
            except Exception as error:  # the thread must live
                logger.error("a text was not added: %s", where_of(error))
                self._deliver([(job, index, internal_error(error))])
                return
            self._jobs[number] = job, index
            job.numbers[number] = index

    def _cancel(self, job: Job) -> None:
        self.engine.cancel(*job.numbers)
        for number in job.numbers:
            self._jobs.pop(number, None)

    def _fail(self, error: Exception) -> None:
        """End all texts with an error, and begin with a new cache."""
        logger.error("the model failed: %s", where_of(error))
        failed = [(job, index, internal_error(error)) for job, index in self._jobs.values()]
        for job, _ in self._jobs.values():
            job.numbers.clear()  # the new engine counts from 1 again
        self._jobs.clear()
        self._deliver(failed)  # first: whoever waits need not wait for the new engine
        self.engine = self._make_engine()

    def _deliver(self, found: list[tuple[Job, int, TokenOutput | ApiError]]) -> None:
        def put() -> None:
            for job, index, item in found:
                job.items.put_nowait((index, item))

        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(put)
