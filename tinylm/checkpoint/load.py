"""A checkpoint ready for use: `load_model` for one that writes text,
`load_verifier` for one that scores answers.

Everything is in the checkpoint; only an adapter needs another file, its base, into which it is
merged. For training, which continues from weights or puts adapters beside them, see `initial`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinylm.checkpoint.check import tokenizer_of
from tinylm.checkpoint.format import read
from tinylm.checkpoint.info import CheckpointInfo, info_of
from tinylm.checkpoint.initial import (
    fingerprint_of,
    open_initial_model,
    refuse_verifier,
    resolve_reference,
    whole_model,
)
from tinylm.common.errors import UserError
from tinylm.config.schema import Config, LoraConfig, ModelConfig
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel
from tinylm.model.lora import merge, require_adapter
from tinylm.model.verifier import Verifier
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Loaded:
    """A language model in evaluation mode, an adapter merged into its base,
    and what it was trained with.
    """

    model: Decoder | HFModel
    tokenizer: Tokenizer
    config: Config
    info: CheckpointInfo
    system: str | None = None
    """the most common system turn of the rows that it was tuned on;
    only checkpoints of such rows have the key"""

    @property
    def template(self) -> str | None:
        """The name of the template that it was tuned with (`make_template`);
        None for a base model.
        """
        return template_name(self.config, self.info.stage)


def template_name(config: Config, stage: str) -> str | None:
    """The name of the template that a model of this stage was tuned with; None for a base model."""
    return config.data.template if stage in CHAT_STAGES else None


def load_model(path: str | Path, device: str = "cpu") -> Loaded:
    """The language model in the checkpoint at `path`; raises as `model_of`."""
    path = Path(path)
    return model_of(path, read(path), device)


def model_of(path: Path, state: dict[str, Any], device: str) -> Loaded:
    """The language model in the state of the checkpoint at `path`.

    Raises:
        UserError: it is a verifier, or an adapter whose base is missing or has changed.
    """
    refuse_verifier(path, state)
    config = Config.from_plain(state["config"])
    if config.lora is None:
        model = whole_model(config.model, state, path)
    else:
        model = _merged_model(path, state, config.lora)
    tokenizer = tokenizer_of(path, state)
    info = info_of(path, state)
    return Loaded(model.to(device).eval(), tokenizer, config, info, state.get("system"))


def _merged_model(path: Path, state: dict[str, Any], lora: LoraConfig) -> Decoder | HFModel:
    """The base of the adapter at `path`, with the adapter merged into it."""
    base = state["base"]
    try:
        initial = open_initial_model(resolve_reference(base["path"], path))
        model = initial.build(initial.model)
    except UserError as error:
        raise error.within(path, f"the base of this adapter ({base['path']})") from None
    fingerprint = fingerprint_of(model)
    if fingerprint != base["fingerprint"]:
        problem = (
            f"this adapter was trained on {initial.name} with fingerprint {base['fingerprint']}, "
            f"but now it has {fingerprint}"
        )
        raise UserError(path, problem, "Restore the model that it was trained on")
    try:
        require_adapter(model, state["weights"], lora)
    except UserError as error:
        raise error.within(path) from None
    merge(model, state["weights"], lora)
    return model


@dataclass(frozen=True)
class LoadedVerifier:
    """A verifier in evaluation mode, and what it was trained with."""

    model: Verifier
    tokenizer: Tokenizer
    config: Config
    info: CheckpointInfo


def load_verifier(path: str | Path, device: str = "cpu") -> LoadedVerifier:
    """The verifier in the checkpoint at `path`; raises as `verifier_of`."""
    path = Path(path)
    return verifier_of(path, read(path), device)


def verifier_of(path: Path, state: dict[str, Any], device: str) -> LoadedVerifier:
    """The verifier in the state of the checkpoint at `path`.

    Raises:
        UserError: it is a language model.
    """
    if state["stage"] != "verifier":
        problem = f"must be a verifier, got a language model (stage {state['stage']})"
        fix = "Train a verifier: python finetune.py --config configs/verifier.yaml"
        raise UserError(path, problem, fix)
    config = Config.from_plain(state["config"])
    model = build_verifier(config.model, state["weights"]).to(device).eval()
    tokenizer = tokenizer_of(path, state)
    return LoadedVerifier(model, tokenizer, config, info_of(path, state))


def build_verifier(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Verifier:
    """A verifier with exactly these weights; RuntimeError names one that is missing,
    extra or of another shape.
    """
    model = Verifier(config)
    model.load_state_dict(weights, strict=True)
    return model


def holds_adapter(path: Path) -> bool:
    """Whether the checkpoint at `path` has an adapter alone, and no whole model."""
    return Config.from_plain(read(path)["config"]).lora is not None
