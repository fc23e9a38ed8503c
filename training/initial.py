"""The start of a run: the model of training.init_from, if any, the settings that it decides,
and the tokenizer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

# checkpoint.initial is imported when a run starts from a model
from tinylm import checkpoint as checkpoints
from tinylm.common.errors import UserError
from tinylm.config.loader import with_model
from tinylm.config.schema import Config
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import make_tokenizer
from training.resume import ResumeState

if TYPE_CHECKING:
    from tinylm.checkpoint.initial import InitialModel

logger = logging.getLogger(__name__)

# Settings of a trained model that a new run may change: they have no weights. The first three only
# affect training; the others extend the context, unless positions are learned.
FREE_ON_INITIAL = {"attention_dropout", "residual_dropout", "gradient_checkpointing"}
FREE_CONTEXT = {"max_seq_len", "rope_scaling"}
FREE_ON_HF = {"gradient_checkpointing"}  # its dropouts are its own


def find_initial_model(config: Config, resume: ResumeState | None) -> InitialModel | None:
    """The model that training.init_from names, if this run needs it: to start from, under adapters,
    or as a reference; logs what a new run starts from.

    Raises:
        UserError: it cannot be opened.
    """
    name = config.training.init_from
    has_reference = config.dpo is not None and config.dpo.reference is not None
    has_reference = has_reference or (config.grpo is not None and config.grpo.kl > 0)
    needed_on_resume = config.lora is not None or has_reference
    if name is None or (resume is not None and not needed_on_resume):
        return None
    try:
        names = config.tokenizer.special_tokens
        initial = checkpoints.initial.open_initial_model(name, names)
    except UserError as error:
        if error.where[0] == "tokenizer.special_tokens":
            raise
        raise error.within("training.init_from") from None
    if resume is None:
        logger.info(f"start: {initial.summary}")
        if initial.new_tokens:
            logger.info(f"new tokens: {len(initial.new_tokens)} rows of the embedding and the head")
    return initial


def initialized_config(config: Config, initial: InitialModel) -> Config:
    """The settings of a run that starts from a trained model:
    the model's settings are the trained model's, besides those that have no weights.

    Raises:
        UserError: a setting of the model is given, and differs from the trained model's.
    """
    theirs = dict(initial.model)
    free = FREE_ON_HF if initial.is_hf else FREE_ON_INITIAL
    if not initial.is_hf and initial.model.position != "learned":
        free = free | FREE_CONTEXT
    given = config.model.model_fields_set - free
    for name, value in config.model:
        if name in given and value is not None and value != theirs[name]:
            problem = (
                f"must be {theirs[name]}, as in training.init_from ({initial.name}), got {value}"
            )
            fix = "Remove it; for new weights, run train.py without training.init_from"
            raise UserError(f"model.{name}", problem, fix)
    n_positions = initial.model.max_seq_len
    if "max_seq_len" in config.model.model_fields_set & free:
        n_positions = config.model.max_seq_len
    if config.training.seq_len > n_positions:
        limit = f"{n_positions}, the positions of training.init_from ({initial.name})"
        problem = f"must be at most {limit}, got {config.training.seq_len}"
        fix = "Lower training.seq_len"
        if "max_seq_len" in free:
            fix += ", or extend the context with model.max_seq_len and model.rope_scaling"
        raise UserError("training.seq_len", problem, fix)
    return with_model(config, initial.model, initial.tokenizer_config)


def prepare_tokenizer(
    config: Config,
    resume: ResumeState | None,
    initial: InitialModel | None,
    learn: Callable[[Config], Tokenizer],
) -> tuple[Tokenizer, Config]:
    """The tokenizer, from the checkpoint or the initial model, else a new one;
    and the settings with model.vocab_size set.

    Args:
        config: the settings.
        resume: the checkpoint to continue from, if any.
        initial: the model of training.init_from, if any.
        learn: the stage's function that learns a tokenizer of kind bpe, unigram or char.

    Raises:
        UserError: the tokenizer does not fit the model, or cannot encode training.sample_prompt.
    """
    if resume is not None and _was_learned(config) and config.tokenizer == resume.config.tokenizer:
        tokenizer = resume.tokenizer  # the text that it was learned from may be gone
    elif resume is None and initial is not None and initial.tokenizer is not None:
        tokenizer = _tokenizer_of(initial, config)
    elif config.tokenizer.kind in ("byte", "hf"):
        tokenizer = make_tokenizer(config.tokenizer)
    else:
        tokenizer = learn(config)
    vocab_size = config.model.vocab_size or tokenizer.vocab_size
    if vocab_size < tokenizer.vocab_size:
        fix = "Raise or remove it"
        if config.training.init_from is not None:
            fix = "Use the tokenizer that the model was trained with"
        problem = f"must be at least {tokenizer.vocab_size}, the tokenizer's, got {vocab_size}"
        raise UserError("model.vocab_size", problem, fix)
    if config.training.sample_prompt is not None:
        try:
            tokenizer.encode(config.training.sample_prompt)  # now, not at the first validation
        except UserError as error:
            raise error.within("training.sample_prompt") from None
    model = config.model.model_copy(update={"vocab_size": vocab_size})
    return tokenizer, config.model_copy(update={"model": model})


def _was_learned(config: Config) -> bool:
    """Whether a checkpoint's tokenizer was learned, or came with the initial model."""
    settings = config.tokenizer
    learned = settings.kind in ("bpe", "unigram") or settings.learn_docs is not None
    return learned or config.training.init_from is not None


def _tokenizer_of(initial: InitialModel, config: Config) -> Tokenizer:
    """The tokenizer of the initial model.

    Raises:
        UserError: the tokenizer section describes another one,
            so that ids would change their meaning.
    """
    assert initial.tokenizer is not None
    wanted = config.tokenizer
    if wanted == initial.tokenizer_config:
        return initial.tokenizer
    # byte and hf are made from their settings; bpe and char have no text here to be learned from
    ours = f"a new one of kind {wanted.kind}"
    if wanted.kind in ("byte", "hf"):
        ours = make_tokenizer(wanted).fingerprint
    if ours != initial.tokenizer.fingerprint:
        theirs = f"{initial.tokenizer.fingerprint} ({initial.tokenizer.kind})"
        problem = (
            f"{initial.name} was trained with tokenizer {theirs}, "
            f"but the tokenizer section describes {ours}"
        )
        raise UserError("training.init_from", problem, "Remove the tokenizer section")
    return initial.tokenizer
