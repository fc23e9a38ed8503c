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
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

# models.growth and tokenizers.added are imported for special tokens that are added, models.hf_files
# when a model of Hugging Face is opened or rebuilt, models.rounded for weights with fewer bits
from tinylm import model as models
from tinylm import tokenizer as tokenizers
from tinylm.checkpoint.check import empty_model, rounded_weights, rounding_of, tokenizer_of
from tinylm.checkpoint.format import read
from tinylm.checkpoint.info import info_of
from tinylm.common.errors import UserError
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import Config, ModelConfig, TokenizerConfig
from tinylm.model.decoder import Decoder
from tinylm.rows.conversation import SCORING_STAGES
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import make_tokenizer

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel

logger = logging.getLogger(__name__)

# --- weights to a model ---


def whole_model(
    config: ModelConfig, state: dict[str, Any], path: Path, *, mapped: bool = False
) -> Decoder | HFModel:
    """The model of the checkpoint at `path`, which has all its weights, in fp32,
    with the settings `config`; arguments as `build_decoder`.
    """
    if state["hf_config"] is not None:
        try:
            return models.hf_files.rebuild_hf_model(state["hf_config"], state["weights"])
        except UserError as error:
            raise error.within(path) from None
    return build_decoder(config, full_weights(state), mapped=mapped)


def full_weights(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a state, in fp32; those in 8 or 4 bits as their codes say."""
    matrices = rounded_weights(state)
    if matrices:
        return models.rounded.dequantized(state["weights"], matrices)
    return state["weights"]


def build_decoder(
    config: ModelConfig, weights: dict[str, torch.Tensor], *, mapped: bool = False
) -> Decoder:
    """A decoder with exactly these weights; RuntimeError names one that is missing,
    extra or of another shape.

    Args:
        mapped: whether they may stay where they are, in a mapped file. A copy outlives the file
            being written to.
    """
    model = empty_model(config)
    model.load_state_dict(weights, strict=True, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    for weight in model.parameters():
        if not mapped:
            weight.data = weight.data.clone()
        weight.requires_grad_(True)
    return model


def rounded_decoder(config: ModelConfig, state: dict[str, Any]) -> Decoder:
    """A decoder that computes in 8 or 4 bits and bf16, with the weights as they are in the state."""
    model = empty_model(config)
    model.load_state_dict(state["weights"], strict=False, assign=True)  # `check` has compared them
    models.rounded.install(model, rounded_weights(state))
    return model.bfloat16().requires_grad_(False)


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
    has_encoder: bool
    """whether it is an encoder-decoder"""
    build: Callable[[ModelConfig], Decoder | HFModel]
    """the model with its weights; the settings may change the dropouts and positions of a decoder"""
    summary: str
    """its name, and of a checkpoint which step it is"""
    new_tokens: range = range(0)
    """the ids of special tokens that were added when it was opened"""


def open_initial_model(name: str, special_tokens: Sequence[str] = ()) -> InitialModel:
    """The model that training.init_from calls `name`, with rows for the special tokens that it
    lacks; its weights are read when it is built.

    Raises:
        UserError: it is missing or damaged, or it is an adapter, a verifier or a reward model.
    """
    initial = _open(name)
    return _grown(initial, special_tokens) if special_tokens else initial


def _grown(initial: InitialModel, names: Sequence[str]) -> InitialModel:
    """The model with these special tokens: its embedding and head grow when it is built."""
    known = initial.tokenizer or make_tokenizer(initial.tokenizer_config)
    tokenizer = tokenizers.added.add_special_tokens(known, names)
    new = range(known.vocab_size, tokenizer.vocab_size)
    all_names = tuple(dict.fromkeys((*initial.tokenizer_config.special_tokens, *names)))
    assert initial.model.vocab_size is not None
    size = max(initial.model.vocab_size, new.stop)

    def build(config: ModelConfig) -> Decoder | HFModel:
        own = config.model_copy(update={"vocab_size": initial.model.vocab_size})
        return models.growth.grow_vocabulary(initial.build(own), new) if new else initial.build(own)

    return replace(
        initial,
        model=initial.model.model_copy(update={"vocab_size": size}),
        tokenizer_config=initial.tokenizer_config.model_copy(update={"special_tokens": all_names}),
        tokenizer=tokenizer,
        build=build,
        new_tokens=new,
    )


def _open(name: str) -> InitialModel:
    """The model as it is."""
    if name.startswith(HF_PREFIX):
        hf_name = name.removeprefix(HF_PREFIX)
        files = models.hf_files.find_hf_model(hf_name)
        tokenizer_config = TokenizerConfig(kind="hf", path=hf_name)
        return InitialModel(
            name=name,
            model=files.sizes,
            tokenizer_config=tokenizer_config,
            tokenizer=None,
            is_hf=True,
            has_encoder=files.config.is_encoder_decoder,
            build=lambda _: files.load(),
            summary=name,
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
    rounding = rounding_of(state)
    if rounding:
        logger.info("%s: its weights are %s, and are used in fp32 as rounded", name, rounding)
    return InitialModel(
        name=name,
        model=config.model,
        tokenizer_config=config.tokenizer,
        tokenizer=tokenizer_of(Path(name), state),
        is_hf=state["hf_config"] is not None,
        has_encoder=holds_encoder(state),
        build=lambda config: whole_model(config, state, Path(name)),
        summary=info_of(Path(name), state).summary(),
    )


def holds_encoder(state: dict[str, Any]) -> bool:
    """Whether the model in a checkpoint is an encoder-decoder, which only Hugging Face models are."""
    settings = state["hf_config"]
    return settings is not None and bool(json.loads(settings).get("is_encoder_decoder"))


def refuse_verifier(path: Path, state: dict[str, Any]) -> None:
    """Raise a UserError if the checkpoint is a verifier or a reward model, where a language model
    is needed.
    """
    if state["stage"] in SCORING_STAGES:
        kind = state["stage"].replace("_", " ")
        problem = f"is a {kind}, which scores answers and cannot generate text"
        raise UserError(path, problem, f"Give a language model; --verifier takes a {kind}")


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
    return _fingerprint(full_weights(read(path)))


def _fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
