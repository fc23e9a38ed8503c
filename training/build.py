"""Builds the parts of a run: the model with its weights and adapters, and Lightning's trainer."""

from __future__ import annotations

import logging
import os
import warnings
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
from tinylm.config.schema import Config
from tinylm.eval.perplexity import byte_length_table
from tinylm.model.decoder import Decoder
from tinylm.model.lora import attach, load_adapter
from training.context import RunContext, find_launcher
from training.resume import ResumeState, require_same_model
from training.support import require_supported

if TYPE_CHECKING:
    from tinylm.checkpoint.initial import InitialModel
    from tinylm.model.hf_model import HFModel

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
