"""What `infer.py` does: check the flags, load the model, generate.

infer               the steps in order
generate_texts      the continuations of a prompt, or the answers to it
generate_best       one of several answers, chosen by a verifier
chat                a conversation (chat.py)
"""

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tinylm.cli.sampling_flags import flag, given_settings, sampling_settings
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig

if TYPE_CHECKING:
    from tinylm.checkpoint.load import Loaded
    from tinylm.generate.chat import FormattedPrompt
    from tinylm.generate.engine import Engine
    from tinylm.generate.output import Completion, TokenOutput
    from tinylm.rows.templates import Template
    from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)


def infer(arguments: argparse.Namespace) -> int:
    """Check the flags, load the model and generate; the exit code."""
    # Mistakes in the flags are reported before torch and the model are loaded.
    given = given_settings(arguments)
    sampling_settings(given, SamplingConfig())
    check_chat(arguments, given)
    check_best_of(arguments, given)
    prompt = None if arguments.chat else read_prompt(arguments.prompt)

    device, reason = pick_device(arguments.device)
    logger.info("device: %s (%s)", device, reason)
    from tinylm.checkpoint.load import load_model
    from tinylm.cli.chat import chat
    from tinylm.cli.loading import choose_checkpoint, choose_template, choose_tokenizer
    from tinylm.generate.engine import Engine

    loaded = load_model(choose_checkpoint(arguments), device)
    logger.info("checkpoint: %s, step %d", loaded.info.path, loaded.info.step)
    sampling = sampling_settings(given, loaded.config.sampling)
    engine = Engine(loaded.model, choose_tokenizer(arguments.tokenizer, loaded.tokenizer))
    template = choose_template(arguments, loaded, engine.tokenizer)
    if prompt is None:
        assert template is not None, "choose_template requires one for --chat"
        return chat(engine, template, sampling, arguments.system)
    return generate_texts(prompt, engine, template, sampling, loaded, arguments)


def generate_texts(
    prompt: str,
    engine: "Engine",
    template: "Template | None",
    sampling: SamplingConfig,
    loaded: "Loaded",
    arguments: argparse.Namespace,
) -> int:
    """Print the continuations of one prompt, or the answers to it."""
    from tinylm.cli.chat import log_ignored
    from tinylm.cli.screen import Screen, write
    from tinylm.generate.chat import format_prompt
    from tinylm.generate.output import Completion

    formatted = format_prompt(engine, prompt, template, system=arguments.system)
    log_ignored(formatted.prompt, sampling)
    if arguments.best_of is not None:
        return generate_best(prompt, engine, formatted, sampling, arguments)
    screen = None
    if not arguments.json:
        screen = Screen(
            prompt,
            engine.tokenizer,
            sampling.n_samples,
            is_answer=template is not None,
            show_probs=arguments.show_probs,
        )
    samples: list[list[TokenOutput]] = [[] for _ in range(sampling.n_samples)]
    start = time.perf_counter()
    for piece in engine.stream(formatted.prompt, sampling, stop_ids=formatted.stop_ids):
        samples[piece.sample].append(piece)
        if screen is not None:
            screen.show(piece)
    seconds = time.perf_counter() - start
    if screen is not None:
        screen.show_rest(samples)
    if template and not any(piece.text.strip() for pieces in samples for piece in pieces):
        logger.info("the answer is blank: the model generated no text; more training may help")
    if arguments.json:
        completions = [Completion.of(formatted.prompt, pieces) for pieces in samples]
        tokenizer = engine.tokenizer if arguments.show_probs else None
        result = {
            "prompt": prompt,
            "template": template and template.name,
            "checkpoint": str(loaded.info.path),
            "step": loaded.info.step,
            "completions": [
                completion_row(completion, pieces, tokenizer)
                for completion, pieces in zip(completions, samples, strict=True)
            ],
        }
        write(json.dumps(result, indent=2) + "\n")
    n_tokens = sum(map(len, samples))
    logger.info("%d tokens in %.1f s, %.0f tokens/s", n_tokens, seconds, n_tokens / seconds)
    return 0


def completion_row(
    completion: "Completion", pieces: "Sequence[TokenOutput]", tokenizer: "Tokenizer | None"
) -> dict[str, Any]:
    """A completion as plain values; with a tokenizer also the probability of each token."""
    row = dataclasses.asdict(completion)
    if tokenizer is not None:
        row["tokens"] = [
            {"token": tokenizer.token_text(piece.token_id), "probability": piece.probability}
            for piece in pieces
        ]
    return row


def generate_best(
    prompt: str,
    engine: "Engine",
    formatted: "FormattedPrompt",
    sampling: SamplingConfig,
    arguments: argparse.Namespace,
) -> int:
    """Draw several answers and print the one that the verifier scores highest.

    All answers, the majority vote and a random choice (the first that was drawn) go to stderr, or
    into the JSON. The choice of an oracle needs a task with known answers: evaluate_checkpoints.py.
    """
    from tinylm.cli.screen import write
    from tinylm.common.console import readable
    from tinylm.eval.best_of_n import majority_vote
    from tinylm.eval.verifier_scoring import VerifierScorer

    if sampling.temperature == 0:
        raise UserError(
            "--temperature",
            "must be above 0 with --best-of, which chooses among different answers",
            "Give --temperature 0.7",
        )
    verifier = VerifierScorer.load(arguments.verifier, str(engine.model.embedding.weight.device))
    completions = engine.generate(
        formatted.prompt,
        sampling.model_copy(update={"n_samples": arguments.best_of, "n_beams": 1}),
        stop_ids=formatted.stop_ids,
    )
    texts = [completion.text for completion in completions]
    probabilities = verifier.probabilities(prompt, texts)
    other_choices = {"majority_vote": texts[majority_vote(texts)], "random_choice": texts[0]}
    ranked = sorted(zip(probabilities, completions, strict=True), key=lambda pair: -pair[0])
    if arguments.json:
        result = {
            "prompt": prompt,
            "verifier": str(arguments.verifier),
            "completions": [
                {"probability": probability, **dataclasses.asdict(completion)}
                for probability, completion in ranked
            ],
            **other_choices,
        }
        write(json.dumps(result, indent=2) + "\n")
        return 0
    for probability, completion in ranked:
        logger.info("verifier: %.3f  %s", probability, completion.text.strip())
    for choice, text in other_choices.items():
        logger.info("%s: %s", choice.replace("_", " "), text.strip())
    write(readable(ranked[0][1].text.strip()) + "\n")
    return 0


# --- flags ------------------------------------------------------------------------------------


def check_chat(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raise a UserError for a flag that cannot be combined with --chat."""
    if not arguments.chat:
        return
    is_given = {
        "--prompt": arguments.prompt is not None,
        "--json": arguments.json,
        "--show-probs": arguments.show_probs,
        "--no-wrap": arguments.no_wrap,
        "--n-samples": given.get("n_samples", 1) != 1,
    }
    for name in is_given:
        if is_given[name]:
            raise UserError(name, "cannot be combined with --chat", "Remove one of the two")
    if sys.stdin is None:
        raise UserError(
            "--chat",
            "standard input is closed",
            "Start it in a terminal, or pipe questions into it, one per line",
        )


def check_best_of(arguments: argparse.Namespace, given: dict[str, Any]) -> None:
    """Raise a UserError for flags that cannot be combined with --best-of."""
    n = arguments.best_of
    if (n is None) != (arguments.verifier is None):
        raise UserError(
            "--best-of, --verifier",
            "each needs the other",
            "Give --best-of 8 --verifier FILE, or neither",
        )
    if n is None:
        return
    if arguments.chat:
        raise UserError("--best-of", "cannot be combined with --chat", "Remove one of the two")
    if not isinstance(n, int) or not 2 <= n <= 1024:
        raise UserError("--best-of", f"must be a whole number from 2 to 1024, got {n}")
    for name in ("n_samples", "n_beams"):
        if given.get(name, 1) != 1:
            raise UserError(
                flag(name),
                "cannot be combined with --best-of, which sets the number of answers",
                "Remove one of the two",
            )
    if arguments.show_probs:
        raise UserError(
            "--show-probs",
            "cannot be combined with --best-of, which prints finished answers",
            "Remove one of the two",
        )


def read_prompt(argument: str | None) -> str:
    """The text of --prompt, or standard input without its last newline."""
    if argument is not None and argument != "-":
        try:
            argument.encode()
        except UnicodeEncodeError:
            # Python keeps undecodable bytes of the command line as lone surrogates.
            raise UserError(
                "--prompt",
                "not UTF-8 text",
                "Type it in a UTF-8 terminal, or pipe a UTF-8 file into the program",
            ) from None
        return argument
    if sys.stdin is None or (argument is None and sys.stdin.isatty()):
        raise UserError(
            "--prompt",
            "missing",
            'Give --prompt "Attention is", or pipe a text into the program; '
            '--prompt "" starts from nothing',
        )
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            "standard input", f"not UTF-8 text (byte {error.start})", "Convert it to UTF-8"
        ) from None
