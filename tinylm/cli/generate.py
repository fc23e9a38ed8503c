"""What `infer.py` does with a prompt: load the model, generate, print.

generate            the steps in order
open_generator      the model and its settings
generate_samples    the continuations of the prompt, or the answers to it, streamed
generate_best       one of several answers, chosen by a verifier
chat                a conversation (chat.py)
"""

import argparse
import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tinylm.checkpoint.load import Loaded
from tinylm.cli.chat import chat
from tinylm.cli.loading import (
    choose_checkpoint,
    choose_system,
    choose_template,
    choose_tokenizer,
)
from tinylm.cli.sampling_flags import sampling_settings
from tinylm.cli.screen import Screen, log_ignored, log_incomplete, write
from tinylm.common.console import readable
from tinylm.common.device import pick_device
from tinylm.common.errors import UserError
from tinylm.config.schema import SamplingConfig
from tinylm.generate.chat import FormattedPrompt, format_prompt
from tinylm.generate.constraint import Constraint
from tinylm.generate.engine import DEFAULT_SLOTS, Engine
from tinylm.generate.output import Completion, TokenOutput
from tinylm.generate.weights import open_model, round_weights
from tinylm.rows.templates import Template
from tinylm.tokenizer.base import Tokenizer

logger = logging.getLogger(__name__)


def generate(
    prompt: str | None,
    given: dict[str, Any],
    arguments: argparse.Namespace,
    constraint: Constraint | None,
) -> int:
    """Load the model and generate; without a prompt, chat.

    Args:
        given: sampling settings from the flags, which override those in the checkpoint.
    """
    device, reason = pick_device(arguments.device)
    logger.info("device: %s (%s)", device, reason)
    opened = open_generator(choose_checkpoint(arguments), device, given, arguments)
    loaded, engine, sampling = opened.loaded, opened.engine, opened.sampling
    template, system = opened.template, opened.system
    if prompt is None:
        assert template is not None, "choose_template requires one for --chat"
        return chat(
            engine, template, sampling, system, constraint=constraint, lookup=arguments.lookup
        )
    formatted = format_prompt(engine, prompt, template, system=system)
    log_ignored(formatted.prompt, sampling)
    if arguments.best_of is not None:
        return generate_best(prompt, engine, formatted, sampling, arguments, constraint)
    screen = None
    if not arguments.json:
        screen = Screen(
            prompt,
            engine.tokenizer,
            sampling.n_samples,
            is_answer=template is not None,
            show_probs=arguments.show_probs,
        )
    samples = generate_samples(
        engine, formatted, sampling, screen, constraint=constraint, lookup=arguments.lookup
    )
    if template and not any(output.text.strip() for outputs in samples for output in outputs):
        logger.info("the answer is blank: the model generated no text; more training may help")
    if arguments.json:
        tokenizer = engine.tokenizer if arguments.show_probs else None
        completions = [
            completion_row(Completion.of(formatted.prompt, outputs), outputs, tokenizer)
            for outputs in samples
        ]
        print_json(prompt, template, loaded, completions)
    return 0


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model that is ready to generate, with the settings that the flags leave it."""

    loaded: Loaded
    engine: Engine
    sampling: SamplingConfig
    template: Template | None
    """None: the prompt is continued as plain text"""
    system: str | None


def open_generator(
    path: Path,
    device: str,
    given: dict[str, Any],
    arguments: argparse.Namespace,
    slots: int | None = None,
) -> OpenedModel:
    """Load the model in the checkpoint at `path`; the arguments are those of `generate`.

    Args:
        slots: texts that are generated at once; None: enough for all samples of a prompt.
    """
    loaded = open_model(path, device, arguments.weights)
    logger.info("checkpoint: %s", loaded.info.summary())
    sampling = sampling_settings(given, loaded.config.sampling)
    tokenizer = choose_tokenizer(arguments.tokenizer, loaded.tokenizer)
    max_rise = arguments.max_bpb_rise
    round_weights(loaded.model, tokenizer, arguments.weights, max_rise=max_rise)
    if slots is None:  # with --deterministic always the same number
        n_texts = 1 if arguments.deterministic else arguments.best_of or sampling.n_samples
        slots = max(DEFAULT_SLOTS, n_texts)
    engine = Engine.of(loaded, tokenizer, slots=slots, deterministic=arguments.deterministic)
    template = choose_template(arguments, loaded, engine.tokenizer)
    system = choose_system(arguments, loaded, template)
    return OpenedModel(loaded, engine, sampling, template, system)


def generate_samples(
    engine: Engine,
    formatted: FormattedPrompt,
    sampling: SamplingConfig,
    screen: Screen | None,
    *,
    constraint: Constraint | None,
    lookup: bool,
) -> list[list[TokenOutput]]:
    """The tokens of each sample; they are printed while they are generated,
    and the speed is logged.
    """
    samples: list[list[TokenOutput]] = [[] for _ in range(sampling.n_samples)]
    start = time.perf_counter()
    outputs_of_all = engine.stream(
        formatted.prompt,
        sampling,
        stop_ids=formatted.stop_ids,
        constraint=constraint,
        lookup=lookup,
    )
    for output in outputs_of_all:
        samples[output.sample].append(output)
        if screen is not None:
            screen.show(output)
    seconds = time.perf_counter() - start
    if screen is not None:
        screen.show_rest(samples)
    n_tokens = sum(map(len, samples))
    logger.info("%d tokens in %.1f s, %.0f tokens/s", n_tokens, seconds, n_tokens / seconds)
    log_incomplete(constraint, [outputs[-1].finish_reason for outputs in samples])
    return samples


def completion_row(
    completion: Completion, outputs: Sequence[TokenOutput], tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """A completion as plain values; with a tokenizer also the probability of each token."""
    row = dataclasses.asdict(completion)
    if tokenizer is not None:
        row["tokens"] = [
            {"token": tokenizer.token_text(output.token_id), "probability": output.probability}
            for output in outputs
        ]
    return row


def print_json(
    prompt: str, template: Template | None, loaded: Loaded, completions: list[dict[str, Any]]
) -> None:
    """Print the result of --json."""
    result = {
        "prompt": prompt,
        "template": template and template.name,
        "checkpoint": str(loaded.info.path),
        "step": loaded.info.step,
        "completions": completions,
    }
    write(json.dumps(result, indent=2) + "\n")


def generate_best(
    prompt: str,
    engine: Engine,
    formatted: FormattedPrompt,
    sampling: SamplingConfig,
    arguments: argparse.Namespace,
    constraint: Constraint | None,
) -> int:
    """Draw several answers and print the one that the verifier or reward model scores highest.

    All answers, the majority vote and a random choice (the first that was drawn) go to stderr, or
    into the JSON. The choice of an oracle needs a task with known answers: evaluate_checkpoints.py.
    """
    if sampling.temperature == 0:
        raise UserError(
            "--temperature",
            "must be above 0 with --best-of, which chooses among different answers",
            "Give --temperature 0.7",
        )

    from tinylm.eval.best_of_n import majority_vote  # the tasks and scorers that only this needs
    from tinylm.eval.reward_scoring import load_scorer

    scorer = load_scorer(arguments.verifier, str(engine.model.embedding.weight.device))
    completions = engine.generate(
        formatted.prompt,
        sampling.model_copy(update={"n_samples": arguments.best_of, "n_beams": 1}),
        stop_ids=formatted.stop_ids,
        constraint=constraint,
    )
    log_incomplete(constraint, [completion.finish_reason for completion in completions])
    texts = [completion.text for completion in completions]
    scores = scorer.score_texts([prompt] * len(texts), texts)
    other_choices = {"majority_vote": texts[majority_vote(texts)], "random_choice": texts[0]}
    ranked = sorted(zip(scores, completions, strict=True), key=lambda pair: -pair[0])
    if arguments.json:
        result = {
            "prompt": prompt,
            "verifier": str(arguments.verifier),
            "completions": [
                {scorer.measure: score, **dataclasses.asdict(completion)}
                for score, completion in ranked
            ],
            **other_choices,
        }
        write(json.dumps(result, indent=2) + "\n")
        return 0
    for score, completion in ranked:
        logger.info("%s: %.3f  %s", scorer.name, score, completion.text.strip())
    for choice, text in other_choices.items():
        logger.info("%s: %s", choice.replace("_", " "), text.strip())
    write(readable(ranked[0][1].text.strip()) + "\n")
    return 0
