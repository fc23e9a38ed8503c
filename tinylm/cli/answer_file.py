"""What `infer.py --input` does: ask one model or several the rows of a file, many at a time.

    rows ─▶ Questions (one per model): engine.add, engine.step ─▶ results in order ─▶ AnswerFile

The random numbers of a text depend on (seed, row number, sample number), so a text is the same in
whatever company it is generated, up to rounding (`--deterministic` removes that too), and a
continued file is the file of a run that was not stopped.
"""

import argparse
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from tinylm.checkpoint.load import fingerprint_of
from tinylm.cli.generate import OpenedModel, open_generator
from tinylm.cli.loading import choose_checkpoint
from tinylm.cli.model_flags import BATCH_SIZE
from tinylm.cli.prompt_files import (
    CHECKPOINTS,
    COMPLETIONS,
    ERROR,
    AnswerFile,
    BadRow,
    PromptRow,
    Rows,
    digest_of,
)
from tinylm.cli.screen import log_incomplete
from tinylm.cli.subjects import find_checkpoints
from tinylm.common.console import progress_bar
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError, printable
from tinylm.generate.chat import FormattedPrompt, format_prompt
from tinylm.generate.constraint import Constraint
from tinylm.generate.engine import Request
from tinylm.generate.output import Completion, FinishReason, TokenOutput

logger = logging.getLogger(__name__)

# Sample s of row r has the number r * SAMPLES_OF_A_ROW + s, so the first row has the texts that
# `--prompt` gives.
SAMPLES_OF_A_ROW = 2**32
# Rows after the first unanswered one that may be generated already: they wait for its line.
MAX_AHEAD = 256


def answer_file(
    rows: Rows,
    given: dict[str, Any],
    arguments: argparse.Namespace,
    constraint: Constraint | None,
) -> int:
    """Load the models, answer the rows that have no line yet, and count those that failed.

    Args:
        given: sampling settings from the flags, which override those in the checkpoints.
    """
    device, reason = pick_device(arguments.device)
    logger.info("device: %s (%s)", device, reason)
    if arguments.ckpt is None:
        paths = [choose_checkpoint(arguments)]
    else:
        subjects = find_checkpoints([str(path) for path in arguments.ckpt], flag="--ckpt")
        paths = [subject.paths[0] for subject in subjects]
    slots = arguments.batch_size or BATCH_SIZE
    models = [open_generator(path, device, given, arguments, slots) for path in paths]
    for model in models:
        check_constraint(model, constraint)
    made_from = dependencies(rows, models, arguments, constraint)
    described = {"checkpoint": [str(path) for path in paths]}
    with AnswerFile(arguments.output, rows, made_from, described) as output:
        if output.n_done:
            logger.info(
                "output: %d of %d rows are in %s already", output.n_done, len(rows), output.path
            )
        questions = [Questions(model, rows, output.n_done, constraint) for model in models]
        answer_rows(output, questions)
        log_summary(output, questions, constraint)
        print(printable(output.path))
        return 2 if output.errors else 0


def check_constraint(model: OpenedModel, constraint: Constraint | None) -> None:
    """Raise a UserError if no row can have the constraint with this model."""
    if constraint is None:
        return
    if model.sampling.n_beams > 1:
        raise UserError(constraint.where, "not supported with beam search", "Set n_beams to 1")
    model.engine.grammars.compile(constraint)


def dependencies(
    rows: Rows,
    models: list[OpenedModel],
    arguments: argparse.Namespace,
    constraint: Constraint | None,
) -> dict[str, Any]:
    """What the answers depend on, by name, as JSON has it."""
    return {
        "input": digest_of(rows),
        "checkpoint": [fingerprint_of(model.loaded.model) for model in models],
        "tokenizer": arguments.tokenizer,
        "template": [model.template and model.template.name for model in models],
        "system text": [model.system for model in models],
        "sampling": [model.sampling.model_dump(mode="json") for model in models],
        "constraint": constraint and [constraint.kind, constraint.source],
        # Only then the size of the batch is seen in a text, in its last bits.
        "--deterministic or --batch-size": arguments.deterministic and models[0].engine.slots,
    }


def answer_rows(output: AnswerFile, questions: list["Questions"]) -> None:
    """Write the line of each row that has none yet; with several models, their results side by
    side.
    """
    n_rows = len(output.rows)
    start = time.perf_counter()
    with progress_bar() as on_progress:
        for results in zip(*questions, strict=True):
            row = output.rows[output.n_done]
            if len(questions) == 1 or isinstance(row, BadRow):
                output.add(results[0])
            else:
                paths = [str(one.model.loaded.info.path) for one in questions]
                of_each = zip(paths, results, strict=True)
                output.add({CHECKPOINTS: [{"checkpoint": path, **one} for path, one in of_each]})
            if on_progress is not None:
                on_progress("answering rows", output.n_done, n_rows)
    seconds = time.perf_counter() - start
    n_tokens = sum(one.n_tokens for one in questions)
    if n_tokens:
        logger.info("%d tokens in %.1f s, %.0f tokens/s", n_tokens, seconds, n_tokens / seconds)


def log_summary(
    output: AnswerFile, questions: list["Questions"], constraint: Constraint | None
) -> None:
    """Log what a user should know about the answers."""
    n_truncated = sum(one.n_truncated for one in questions)
    if n_truncated:
        logger.info(
            "prompts that are longer than the context and lost their beginning: %d", n_truncated
        )
    log_incomplete(constraint, [reason for one in questions for reason in one.finish_reasons])
    logger.info("answers: %d rows in %s", output.n_done, output.path)
    if output.errors:
        logger.error(
            "FAILED: %d of %d rows have an error; the first: %s",
            *(len(output.errors), output.n_done, output.errors[0]),
        )


class Questions:
    """The rows from number `first` on, asked of a model: an iterator over their results, in order.

    A result is {"completions": [...]}, or {"error": "..."} for a row that cannot be asked.
    """

    def __init__(self, model: OpenedModel, rows: Rows, first: int, constraint: Constraint | None):
        self.model, self.rows, self.constraint = model, rows, constraint
        self.n_tokens = self.n_truncated = 0
        self.finish_reasons: list[FinishReason | None] = []
        self._first = self._next = first
        # By the engine's number of a text: its row and sample.
        self._running: dict[int, tuple[int, int]] = {}
        # By the number of a row: its prompt, and the tokens of each sample.
        self._asked: dict[int, tuple[FormattedPrompt, list[list[TokenOutput]]]] = {}
        self._results: dict[int, dict[str, Any]] = {}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        engine = self.model.engine
        for number in range(self._first, len(self.rows)):
            while number not in self._results:
                # Ask: keep all slots of the engine in use.
                end = min(len(self.rows), number + MAX_AHEAD)
                while self._next < end and len(self._running) < engine.slots:
                    self._ask(self._next)
                    self._next += 1
                # Generate: the first token of a text, or the next one of each.
                for event in engine.step() if self._running else ():
                    if event.number not in self._running:
                        continue  # its row has failed
                    row, sample = self._running[event.number]
                    if event.error is not None:
                        self._fail(row, event.error)
                        continue
                    self._asked[row][1][sample].append(event.output)
                    if event.ends:
                        del self._running[event.number]
                        self._finish(row)
            yield self._results.pop(number)

    def _ask(self, number: int) -> None:
        """Begin the texts of a row."""
        model, row = self.model, self.rows[number]
        sampling = model.sampling
        try:
            if isinstance(row, BadRow):
                raise row.error
            prompt = self._format(row)
            outputs: list[list[TokenOutput]] = [[] for _ in range(sampling.n_samples)]
            self._asked[number] = prompt, outputs
            for sample in range(sampling.n_samples):
                request = Request(
                    prompt.prompt,
                    sampling,
                    prompt.stop_ids,
                    sample=number * SAMPLES_OF_A_ROW + sample,
                    constraint=self.constraint,
                )
                if sampling.n_beams > 1:  # a search is a batch of its own
                    [outputs[sample]] = model.engine.run([request])
                else:
                    self._running[model.engine.add(request)] = number, sample
        except UserError as error:
            self._fail(number, error)
        else:
            self._finish(number)

    def _format(self, row: PromptRow) -> FormattedPrompt:
        """The prompt of a row, as the model reads it."""
        model = self.model
        if model.template is None:
            if row.has_messages and row.fields.get("prompt") is None:
                problem = "only valid for a fine-tuned model, without --no-wrap"
                raise UserError("messages", problem, "Give prompt")
            return format_prompt(model.engine, row.text, None)
        turns = row.conversation
        has_system = turns[0].role == "system"
        system = None if has_system else model.system
        return format_prompt(model.engine, turns, model.template, system=system)

    def _finish(self, number: int) -> None:
        """Make the result of a row if all of its texts have ended."""
        prompt, outputs = self._asked[number]
        if not all(of_one and of_one[-1].finish_reason for of_one in outputs):
            return
        completions = [Completion.of(prompt.prompt, of_one) for of_one in outputs]
        self.n_tokens += sum(len(one.ids) for one in completions)
        self.n_truncated += bool(prompt.prompt.truncated)
        self.finish_reasons += [one.finish_reason for one in completions]
        del self._asked[number]
        self._results[number] = {COMPLETIONS: [asdict(one) for one in completions]}

    def _fail(self, number: int, error: UserError) -> None:
        """Make an error the result of a row, and end its texts."""
        texts = [text for text, (row, _) in self._running.items() if row == number]
        self.model.engine.cancel(*texts)
        for text in texts:
            del self._running[text]
        self._asked.pop(number, None)
        located = error.within(self.rows[number].location)
        self._results[number] = {ERROR: str(located)}
