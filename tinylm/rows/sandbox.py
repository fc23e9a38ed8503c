"""Render a chat template, an untrusted program, in a separate process with limits on time
and memory.

transformers' Jinja sandbox keeps a template from Python's internals, but not from an endless loop
or a string of a gigabyte. So a template that takes too long is killed with its process, and the
program continues. Knows no tokens.
"""

import json
import multiprocessing
import re
import signal
import sys
import weakref
from multiprocessing.connection import Connection
from typing import Any

from tinylm.common.errors import UserError

RENDER_SECONDS = 5.0
# Importing transformers takes a second, on a busy machine many seconds.
START_SECONDS = 120.0
# In addition to what the process uses once its libraries are loaded.
MEMORY_BYTES = 2**28
ANSWER_BYTES = 2**25

Rendered = tuple[str, list[tuple[int, int]]]
"""text, and the spans of its {% generation %} blocks"""
_FIX = "Correct it, or set data.template to another"


class Sandbox:
    """One template, ready to render conversations; its process starts with the first one."""

    def __init__(self, template: str, variables: dict[str, str]):
        self._template, self._variables = template, variables
        self.marks_answers = re.search(r"{%-?\s*generation\s*-?%}", template) is not None
        self._connection: Connection | None = None

    def render(self, requests: list[tuple[list[dict[str, str]], bool]]) -> list[Rendered]:
        """The text of each conversation, and the spans of the template's {% generation %} blocks
        in it.

        Args:
            requests: messages, and whether the start of an answer follows them.

        Raises:
            UserError: the template is invalid, rejects these messages, does what is not allowed,
                or takes too long.
        """
        if self._connection is None:
            self._start()
        rendered = self._request(requests, RENDER_SECONDS)
        return [(text, [(start, end) for start, end in spans]) for text, spans in rendered]

    def _start(self) -> None:
        # spawn: a fork of a process that runs threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self._connection, remote = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(remote, self._template, self._variables, self.marks_answers),
            daemon=True,
        )
        self._process.start()
        remote.close()
        weakref.finalize(self, self._process.kill)
        self._request([], START_SECONDS)

    def _request(self, requests: list[Any], seconds: float) -> Any:
        """What the process renders; if it fails to answer it is killed, and the next rendering
        starts another.
        """
        assert self._connection is not None
        problem = f"took more than {seconds:g} seconds"
        try:
            self._connection.send_bytes(json.dumps(requests).encode())
            if self._connection.poll(seconds):
                answer = json.loads(self._connection.recv_bytes(ANSWER_BYTES))
                if "error" not in answer:
                    return answer["done"]
                raise UserError(
                    ("data.template", "the tokenizer's chat template"), answer["error"], _FIX
                )
        except (EOFError, OSError):
            problem = "ended its process, possibly out of memory"
        self._process.kill()
        self._connection = None
        raise UserError("data.template", f"the tokenizer's chat template {problem}", _FIX)


def _serve(
    connection: Connection, template: str, variables: dict[str, str], marks_answers: bool
) -> None:
    """Render requests until the other side closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is handled by the program
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except ImportError:
        _send(connection, {"error": "needs transformers: pip install transformers"})
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
        _send(connection, _render(render_jinja_template, requests, settings))


def _render(render: Any, requests: list[Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The rendered conversations, or what went wrong."""
    try:
        done = []
        for messages, prompt in requests:
            [text], spans = render(
                conversations=[messages], add_generation_prompt=prompt, **settings
            )
            if len(text) > ANSWER_BYTES // 16:  # characters escaped as JSON take up to 12 bytes
                given = sum(len(message["content"]) for message in messages)
                return {"error": f"it writes {len(text)} characters for {given}"}
            done.append((text, spans[0] if spans else []))
        return {"done": done}
    except MemoryError:
        return {"error": "it needs too much memory"}
    except Exception as error:  # the template is foreign code: whatever it raises is its own fault
        return {"error": str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__}


def _send(connection: Connection, answer: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(answer).encode())


def _limit_memory() -> None:
    """Allow this process `MEMORY_BYTES` more; on systems without /proc, time is the only limit."""
    if sys.platform != "linux":
        return
    import resource

    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
