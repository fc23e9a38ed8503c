"""`infer.py --chat`: a conversation in the terminal, or with a file of questions."""

import contextlib
import logging
import re
import signal
import sys
from collections.abc import Iterator

from tinylm.cli.screen import log_ignored, log_incomplete, write
from tinylm.common.console import readable
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.chat import Chat, StreamingStrip
from tinylm.generate.constraint import Constraint
from tinylm.generate.engine import Engine
from tinylm.rows.templates import Template

logger = logging.getLogger(__name__)


def chat(
    engine: Engine,
    template: Template,
    sampling: SamplingConfig,
    system: str | None,
    *,
    constraint: Constraint | None,
    lookup: bool,
) -> int:
    """Answer one line after another until the input ends or a line is /exit."""
    conversation = Chat(engine, template, sampling.max_new_tokens, system)
    is_typed = sys.stdin.isatty()
    logger.info(
        "chat: one question per line; /reset forgets the conversation, "
        "/exit or Ctrl-D quits, Ctrl-C stops an answer"
    )
    if is_typed:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # run_program restores its own
    for line in input_lines(is_typed):
        if line == "/exit":
            break
        try:
            handle_line(line, conversation, sampling, constraint, lookup)
        except KeyboardInterrupt:
            if not is_typed:  # nobody is there to continue
                raise
    return 0


def handle_line(
    line: str,
    conversation: Chat,
    sampling: SamplingConfig,
    constraint: Constraint | None,
    lookup: bool,
) -> None:
    """Run a command, or answer a question; an invalid question does not end the chat."""
    if line == "/reset":
        conversation.forget()
        logger.info("conversation reset")
    elif re.fullmatch("/[a-z]+", line):
        logger.info("%s: unknown command; the commands are /reset and /exit", line)
    elif line.strip():
        try:
            answer(line, conversation, sampling, constraint, lookup)
        except UserError as error:
            logger.error("error: %s", error)


def answer(
    text: str,
    conversation: Chat,
    sampling: SamplingConfig,
    constraint: Constraint | None,
    lookup: bool,
) -> None:
    """Stream the answer to a question and remember it;
    of a stopped answer only the printed part.
    """
    question = conversation.ask(text)
    if question.n_forgotten:
        logger.info(
            "the context is full: the oldest exchanges are dropped (%d)", question.n_forgotten
        )
    log_ignored(question.prompt, sampling)
    shown = ""
    strip = StreamingStrip()
    try:
        for piece in conversation.engine.stream(
            question.prompt,
            sampling,
            stop_ids=question.stop_ids,
            constraint=constraint,
            lookup=lookup,
        ):
            part = strip(piece.text)
            shown += part
            write(readable(part))
        log_incomplete(constraint, [piece.finish_reason])
    finally:
        conversation.remember(question, shown)
        write("\n")


def input_lines(is_typed: bool) -> Iterator[str]:
    """The lines of standard input, typed or piped; a line that is not UTF-8 is skipped."""
    if is_typed:
        with contextlib.suppress(ImportError):  # not available on Windows
            import readline  # noqa: F401  (gives `input` its editing keys)
    while True:
        try:
            line = typed_line() if is_typed else piped_line()
        except EOFError:
            return
        except UnicodeDecodeError:
            logger.error("error: standard input: not UTF-8 text. The line is skipped.")
        except KeyboardInterrupt:
            if not is_typed:
                raise
            logger.info("")
        else:
            yield line


def typed_line() -> str:
    """The next line from the terminal, asked for with a prompt sign; EOFError at Ctrl-D."""
    return input("> " if sys.stdout.isatty() else "")


def piped_line() -> str:
    """The next line of a pipe or file, without its end; EOFError after the last."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode().rstrip("\r\n")
