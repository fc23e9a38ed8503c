"""The models that other models start from: opened by name, built, identified by fingerprint,
and referred to.

A run starts from the model of training.init_from: a checkpoint, or a Hugging Face model
(`hf:NAME`). An adapter belongs to a base, and preference training is compared with a reference;
their checkpoints record which model that was, by a path relative to their own folder and a
fingerprint of its weights.

    open_initial_model(name) ─▶ InitialModel ─▶ .build(config) ─▶ Decoder or HFModel
    reference_to(initial, model, folder) ─▶ {"path", "fingerprint"} ─▶ resolve_reference(path, checkpoint) ─▶ name
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

# models.hf_files is imported when a model of Hugging Face is opened or rebuilt
from tinylm import model as models
from tinylm.checkpoint.check import empty_model, tokenizer_of
from tinylm.checkpoint.format import read
from tinylm.checkpoint.info import info_of
from tinylm.common.errors import UserError
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import Config, ModelConfig, TokenizerConfig
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel


# --- weights to a model ---


def whole_model(config: ModelConfig, state: dict[str, Any], path: Path) -> Decoder | HFModel:
    """The model of the checkpoint at `path`, which has all its weights,
    with the settings `config`.
    """
    if state["hf_config"] is not None:
        try:
            return models.hf_files.rebuild_hf_model(state["hf_config"], state["weights"])
        except UserError as error:
            raise error.within(path) from None
    return build_decoder(config, state["weights"])


def build_decoder(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Decoder:
    """A decoder with exactly these weights; RuntimeError names one that is missing,
    extra or of another shape.
    """
    model = empty_model(config)
    model.load_state_dict(weights, strict=True, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    for weight in model.parameters():
        weight.data = weight.data.clone()  # the mapped file may be replaced
        weight.requires_grad_(True)
    return model


# --- the model to start from ---


@dataclass(frozen=True)
class InitialModel:
    """A whole model that a run starts from, or that an adapter belongs to:
    a checkpoint or a Hugging Face model.
    """

    name: str
    """a path, or hf:NAME"""
    model: ModelConfig
    tokenizer_config: TokenizerConfig
    tokenizer: Tokenizer | None
    """None for hf:NAME: made from `tokenizer_config` when it is needed"""
    is_hf: bool
    """whether it is a Hugging Face model, also one in a checkpoint"""
    build: Callable[[ModelConfig], Decoder | HFModel]
    """the model with its weights; the settings may change the dropouts of a decoder"""
    summary: str
    """its name, and of a checkpoint which step it is"""


def open_initial_model(name: str) -> InitialModel:
    """The model that training.init_from calls `name`; its weights are read when it is built.

    Raises:
        UserError: it is missing or damaged, or it is an adapter or a verifier.
    """
    if name.startswith(HF_PREFIX):
        hf_name = name.removeprefix(HF_PREFIX)
        files = models.hf_files.find_hf_model(hf_name)
        tokenizer_config = TokenizerConfig(kind="hf", path=hf_name)
        return InitialModel(
            name, files.sizes, tokenizer_config, None, True, lambda _: files.load(), name
        )
    state = read(Path(name))
    refuse_verifier(Path(name), state)
    config = Config.from_plain(state["config"])
    if config.lora is not None:
        base = resolve_reference(state["base"]["path"], Path(name))
        problem = (
            f"is a LoRA adapter (stage {state['stage']}), not a whole model "
            "(stage pretrain, or sft without lora)"
        )
        raise UserError(name, problem, f"Start from its base, {base}, or from the merged model")
    return InitialModel(
        name=name,
        model=config.model,
        tokenizer_config=config.tokenizer,
        tokenizer=tokenizer_of(Path(name), state),
        is_hf=state["hf_config"] is not None,
        build=lambda config: whole_model(config, state, Path(name)),
        summary=info_of(Path(name), state).summary(),
    )


def refuse_verifier(path: Path, state: dict[str, Any]) -> None:
    """Raise a UserError if the checkpoint is a verifier, where a language model is needed."""
    if state["stage"] == "verifier":
        problem = "is a verifier, which scores answers and cannot generate text"
        raise UserError(path, problem, "Give a language model; --verifier takes a verifier")


# --- which model it was ---


def reference_to(initial: InitialModel, model: nn.Module, folder: Path) -> dict[str, str]:
    """The reference to another model that a checkpoint in `folder` stores: path and fingerprint.

    Args:
        initial: the model, as opened.
        model: the same, as built, without adapters.
        folder: where the checkpoint will be; the path is relative to it,
            so that the two can be moved together.
    """
    prefix = HF_PREFIX if initial.name.startswith(HF_PREFIX) else ""
    path = initial.name.removeprefix(HF_PREFIX)
    if os.path.exists(path):
        path = os.path.relpath(Path(path).resolve(), folder.resolve())
    return {"path": f"{prefix}{path}", "fingerprint": fingerprint_of(model)}


def resolve_reference(recorded: str, checkpoint: Path) -> str:
    """The name, for `open_initial_model`, of the model that `checkpoint` refers
    to by the path `recorded`.
    """
    path = recorded.removeprefix(HF_PREFIX)
    local = os.path.normpath(checkpoint.resolve().parent / path)
    if recorded.startswith(HF_PREFIX):
        return f"{HF_PREFIX}{local}" if os.path.isdir(local) else recorded
    return local


def fingerprint_of(model: nn.Module) -> str:
    """16 hex digits that identify the weights of `model`: SHA-256 over their names, types,
    shapes and bytes.
    """
    return _fingerprint(model.state_dict())


def weights_fingerprint(path: Path) -> str:
    """`fingerprint_of` the model or adapter in the checkpoint at `path`, without building it."""
    return _fingerprint(read(path)["weights"])


def _fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
