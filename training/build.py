"""Builds the parts of a run, in the order in which `run.train` asks for them: the model of
training.init_from, if any, and the settings that it decides; the tokenizer; the model with its
weights and adapters; Lightning's trainer.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from data import RunData
from model import LanguageModule

# hf_model and checkpoint.initial are imported when a run uses such a model
from tinylm import checkpoint as checkpoints
from tinylm import model as models
from tinylm.checkpoint.format import NO_REFERENCES
from tinylm.common.device import autocast_dtype, keep_freed_memory
from tinylm.common.errors import UserError
from tinylm.config.loader import with_model
from tinylm.config.schema import Config
from tinylm.eval.perplexity import byte_length_table
from tinylm.model.decoder import Decoder
from tinylm.model.lora import attach, load_adapter
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import make_tokenizer
from training.context import RunContext, find_launcher
from training.resume import ResumeState, require_same_model
from training.support import require_supported

if TYPE_CHECKING:
    from tinylm.checkpoint.initial import InitialModel
    from tinylm.model.hf_model import HFModel

logger = logging.getLogger(__name__)

# --- the initial model and the tokenizer ---

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


# --- the model ---


def build_model(
    context: RunContext, resume: ResumeState | None, initial: InitialModel | None
) -> tuple[Decoder | HFModel, dict[str, Any]]:
    """The model that is trained, with adapters if there is a lora section;
    and the references in its checkpoints.

    Raises:
        UserError: a setting is not supported with this model.
    """
    config, references = context.config, dict(NO_REFERENCES)
    model = build_weights(config, resume, initial)
    if not isinstance(model, Decoder):
        features = {"hf_model", "encoder-decoder"} if model.has_encoder else {"hf_model"}
        require_supported(context.stage, config, context.device, frozenset(features))
        if context.stage == "sft" and config.data.packing == "packed":
            models.hf_model.check_packing(model)
        if config.model.gradient_checkpointing:
            model.checkpoint_gradients()
        references["hf_config"] = model.settings
    if config.lora is not None:
        assert initial is not None, "the table of unsupported pairs sees to it"
        references["base"] = checkpoints.initial.reference_to(
            initial, model, context.checkpoint_dir
        )
        require_same_model(
            resume, references["base"], name="base", init_from=config.training.init_from
        )
        attach(
            model,
            config.lora,
            seed=config.training.seed,
            new_tokens=initial.new_tokens,
            dtype=autocast_dtype(config.hardware.precision),
        )
        if resume is not None:
            load_adapter(model, resume.state["weights"])
    return model, references


def build_weights(
    config: Config, resume: ResumeState | None, initial: InitialModel | None
) -> Decoder | HFModel:
    """A model with the weights of the checkpoint, else of the initial model, else new ones,
    which depend on the seed.
    """
    if resume is not None and config.lora is None:
        return checkpoints.initial.whole_model(config.model, resume.state, resume.path)
    if initial is not None:
        return build_initial(config, initial)
    torch.manual_seed(config.training.seed)
    return Decoder(config.model)


def build_initial(config: Config, initial: InitialModel) -> Decoder | HFModel:
    """The model of training.init_from with its weights."""
    try:
        return initial.build(config.model)
    except UserError as error:
        raise error.within("training.init_from") from None


def build_language_model(
    context: RunContext, data: RunData, resume: ResumeState | None, initial: InitialModel | None
) -> LanguageModule:
    """The module of stages pretrain and sft: a model that predicts the next token."""
    model, references = build_model(context, resume, initial)
    byte_lengths = byte_length_table(data.tokenizer, model.embedding.num_embeddings)  # for val_bpb
    return LanguageModule(context.config, model, byte_lengths, context.stage, references)


# --- the trainer ---

LIGHTNING_PRECISION = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
# Warnings that do not apply here.
IGNORED_WARNINGS = (
    ".*`srun` command is available.*",  # how the processes were started is decided in context.py
    ".*LeafSpec.* is deprecated",  # Lightning 2.6 under torch 2.13
    ".*does not have many workers.*",  # data.num_workers is the user's choice
    ".*`IterableDataset` has `__len__` defined.*",  # all workers but one are idle
    # the reference model of preferences stays in eval mode
    ".*in eval mode at the start of training.*",
)


def build_trainer(config: Config, device: str, callback: L.Callback) -> L.Trainer:
    """Lightning's trainer: one epoch of micro-batches; validation,
    logging and checkpoints are ours (callbacks.py).
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    if device == "cpu":
        keep_freed_memory()
    hardware = config.hardware
    strategy: Any = hardware.strategy
    if strategy == "fsdp":
        # FSDP2; Lightning's older FSDP strategy loses the optimizer's state on resume
        # and flattens the weights
        strategy = ModelParallelStrategy(
            data_parallel_size=hardware.devices * hardware.num_nodes,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    return L.Trainer(
        accelerator={"cpu": "cpu", "cuda": "gpu", "mps": "mps"}[device],
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=strategy,
        precision=LIGHTNING_PRECISION[hardware.precision],  # type: ignore[arg-type]
        plugins=[find_launcher(hardware)],
        # Lightning looks for files of its own here (hpc_ckpt_*.ckpt under SLURM):
        # nothing can lie in it.
        default_root_dir=os.devnull,
        max_epochs=1,
        accumulate_grad_batches=config.training.grad_accum_steps,
        callbacks=[callback],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
