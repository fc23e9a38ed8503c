"""Rendering a chat template, which is a program from elsewhere, without harm: in a process of its own, with limits.

transformers' Jinja sandbox keeps a template from Python's internals, but not from a loop that does not end or a string of
a gigabyte. So the process has little time and memory: it is ended, and the program lives on. Knows nothing of tokens.
"""

import json
import multiprocessing
import re
import signal
import sys
import weakref
from multiprocessing.connection import Connection
from typing import Any

from tinylm.common.errors import UserError, printable

RENDER_SECONDS = 5.0
# Importing transformers takes a second, on a busy machine many.
START_SECONDS = 120.0
# On top of what the process has when its libraries are loaded.
MEMORY_BYTES = 2**28
ANSWER_BYTES = 2**25

Rendered = tuple[str, list[tuple[int, int]]]


class Sandbox:
    """One template, ready to render conversations; its process starts with the first of them."""

    def __init__(self, template: str, variables: dict[str, str]):
        self._template, self._variables = template, variables
        self.marks_answers = re.search(r"{%-?\s*generation\s*-?%}", template) is not None
        self._connection: Connection | None = None

    def render(self, requests: list[tuple[list[dict[str, str]], bool]]) -> list[Rendered]:
        """The text of each conversation and where in it the template's {% generation %} blocks stand.

        Args:
            requests: messages, and whether the opening of an answer follows them.

        Raises:
            UserError: the template is no Jinja, refuses these messages, reaches for what it may not have, or takes too long.
        """
        if self._connection is None:
            self._start()
        done = self._answer(requests, RENDER_SECONDS)
        return [(text, [(start, end) for start, end in spans]) for text, spans in done]

    def _start(self) -> None:
        # spawn: a fork of a process that runs threads can stand still for ever.
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, self._template, self._variables, self.marks_answers),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        weakref.finalize(self, self._process.kill)
        self._answer([], START_SECONDS)

    def _answer(self, requests: list[Any], seconds: float) -> Any:
        """What the process makes of the requests; if that is nothing, it is ended, and the next rendering starts another."""
        assert self._connection is not None
        problem = f"took more than {seconds:g} seconds"
        try:
            self._connection.send_bytes(json.dumps(requests).encode())
            if self._connection.poll(seconds):
                answer = json.loads(self._connection.recv_bytes(ANSWER_BYTES))
                if "error" not in answer:
                    return answer["done"]
                raise UserError(
                    f"data.template: the tokenizer's chat template: {printable(answer['error'])}. Correct it, or set data.template to another."
                )
        except (EOFError, OSError):
            problem = "ended its process, perhaps for want of memory"
        self._process.kill()
        self._connection = None
        raise UserError(
            f"data.template: the tokenizer's chat template {problem}. Correct it, or set data.template to another."
        )


def _serve(
    connection: Connection, template: str, variables: dict[str, str], marks_answers: bool
) -> None:
    """Render what comes in until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the program's to answer
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        _send(connection, {"error": "reading it needs transformers: pip install transformers"})
        return
    settings = {
        "chat_template": template,
        "return_assistant_tokens_mask": marks_answers,
        **variables,
    }
    _limit_memory()
    while True:
        try:
            requests = json.loads(connection.recv_bytes())
        except EOFError:
            return
        _send(connection, _rendered(render_jinja_template, requests, settings))


def _rendered(render: Any, requests: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The rendered conversations, or what went wrong."""
    try:
        done = []
        for messages, prompt in requests:
            [text], spans = render(
                conversations=[messages], add_generation_prompt=prompt, **settings
            )
            if len(text) > ANSWER_BYTES // 16:  # characters escaped as JSON take up to 12 bytes
                return {
                    "error": f"it makes {len(text)} characters of {sum(len(message['content']) for message in messages)}"
                }
            done.append((text, spans[0] if spans else []))
        return {"done": done}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # the template is foreign code: what it raises, from syntax errors on, is its own fault
        return {"error": str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__}


def _send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def _limit_memory() -> None:
    """Let this process take `MEMORY_BYTES` more; where the system cannot say what it has, time is the only limit."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
