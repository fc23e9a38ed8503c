import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tinylm.checkpoint.format import CheckpointInfo, _info, read
from tinylm.common.errors import UserError, printable
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import Config, LoraConfig, ModelConfig, TokenizerConfig
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import HFModel, find_hf_model, rebuild_hf_model
from tinylm.model.lora import merge
from tinylm.model.verifier import Verifier
from tinylm.rows.conversation import CHAT_STAGES
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain


@dataclass(frozen=True)
class Loaded:
    """A checkpoint ready for use: the model in evaluation mode, an adapter merged into its base, and what it was trained with."""

    model: Decoder | HFModel
    tokenizer: Tokenizer
    config: Config
    info: CheckpointInfo

    @property
    def template(self) -> str | None:
        """The name of the template that it was taught to answer in (`make_template`); None for a base model."""
        return self.config.data.template if self.info.stage in CHAT_STAGES else None


def load_model(path: Path, device: str = "cpu") -> Loaded:
    """The model, tokenizer and settings of the checkpoint at `path`; it needs no other file, but for an adapter its base.

    Raises:
        UserError: the base is not there any more, or is another one; or it is a verifier.
    """
    payload = read(path)
    refuse_verifier(path, payload)
    config = Config.from_plain(payload["config"])
    model = (
        (
            _with_base(path, payload, config.lora)
            if config.lora
            else whole_model(config.model, payload)
        )
        .to(device)
        .eval()
    )
    return Loaded(model, tokenizer_from_plain(payload["tokenizer"]), config, _info(path, payload))


@dataclass(frozen=True)
class LoadedVerifier:
    """A verifier ready for use, in evaluation mode, and what it was trained with."""

    model: Verifier
    tokenizer: Tokenizer
    config: Config
    info: CheckpointInfo


def load_verifier(path: Path, device: str = "cpu") -> LoadedVerifier:
    """The verifier, tokenizer and settings of the checkpoint at `path`.

    Raises:
        UserError: it holds a model that writes.
    """
    payload = read(path)
    if payload["stage"] != "verifier":
        holds = f"a model of stage {printable(payload['stage'])}, which writes and does not judge"
        raise UserError(
            f"{printable(path)}: {holds}. Train a verifier: python finetune.py --config configs/verifier.yaml"
        )
    config = Config.from_plain(payload["config"])
    model = build_verifier(config.model, payload["weights"]).to(device).eval()
    return LoadedVerifier(
        model, tokenizer_from_plain(payload["tokenizer"]), config, _info(path, payload)
    )


def build_verifier(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Verifier:
    """A verifier with exactly these weights; a missing, extra or misshapen one is torch's RuntimeError, which names it."""
    model = Verifier(config)
    model.load_state_dict(weights, strict=True)
    return model


def refuse_verifier(path: Path, payload: dict[str, Any]) -> None:
    """UserError for a checkpoint that judges where one is wanted that writes."""
    if payload["stage"] == "verifier":
        raise UserError(
            f"{printable(path)}: a verifier, which judges answers and writes none. Give a model that writes; this one is for --verifier."
        )


def whole_model(config: ModelConfig, payload: dict[str, Any]) -> Decoder | HFModel:
    """The model of a checkpoint that holds all its weights, with the settings `config`."""
    if payload["hf_config"] is not None:
        return rebuild_hf_model(payload["hf_config"], payload["weights"])
    return build_decoder(config, payload["weights"])


def _with_base(path: Path, payload: dict[str, Any], lora: LoraConfig) -> Decoder | HFModel:
    """The base that the adapter at `path` belongs to, with the adapter merged into it."""
    wanted = payload["base"]
    try:
        base = open_initial_model(resolve_reference(wanted["path"], path))
        model = base.build(base.model)
    except UserError as error:
        raise UserError(
            f"{printable(path)}: an adapter of {printable(wanted['path'])}, which cannot be used: {error}"
        ) from None
    if fingerprint_of(model) != wanted["fingerprint"]:
        found = f"an adapter of {printable(base.name)} as it was with fingerprint {wanted['fingerprint']}, and it has {fingerprint_of(model)} now"
        raise UserError(f"{printable(path)}: {found}. Put the model back that it was trained on.")
    merge(model, payload["weights"], lora)
    return model


def build_decoder(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Decoder:
    """A decoder with exactly these weights; a missing, extra or misshapen one is torch's RuntimeError, which names it."""
    model = empty_decoder(config)
    model.load_state_dict(weights, strict=True, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    for weight in model.parameters():
        weight.data = weight.data.clone()  # off the mapped file, which may be replaced
        weight.requires_grad_(True)
    return model


def empty_decoder(config: ModelConfig) -> Decoder:
    """A decoder on the meta device: shapes without numbers, for `load_state_dict(..., assign=True)`."""
    with torch.device("meta"), _NoInit():
        return Decoder(config)


class _NoInit(TorchFunctionMode):
    """Leaves new weights unfilled: on the meta device filling them imports torch's compiler, which takes two seconds."""

    _fillers = (
        nn.init.normal_,
        nn.init.uniform_,
        nn.init.kaiming_uniform_,
        nn.init.trunc_normal_,
        torch.Tensor.normal_,
        torch.Tensor.uniform_,
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._fillers:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class InitialModel:
    """A whole model that a run starts from, or that an adapter belongs to: a checkpoint of ours or a Hugging Face model."""

    name: str
    """a path, or hf:NAME"""
    model: ModelConfig
    tokenizer_config: TokenizerConfig
    tokenizer: Tokenizer | None
    """None: that of a Hugging Face model is read when it is wanted, by `tokenizer_config`"""
    is_hf: bool
    """whether it is a Hugging Face model, also one that a checkpoint of ours holds"""
    build: Callable[[ModelConfig], Decoder | HFModel]
    """the model with its weights; the settings may change the dropouts of our own decoder"""


def open_initial_model(name: str) -> InitialModel:
    """The model that training.init_from calls `name`, opened; its weights are read when it is built.

    Raises:
        UserError: it is not there, is damaged, or is an adapter.
    """
    if name.startswith(HF_PREFIX):
        files = find_hf_model(name.removeprefix(HF_PREFIX))
        return InitialModel(
            name,
            files.sizes,
            TokenizerConfig(kind="hf", path=name.removeprefix(HF_PREFIX)),
            None,
            True,
            lambda config: files.load(),
        )
    payload = read(Path(name))
    refuse_verifier(Path(name), payload)
    config = Config.from_plain(payload["config"])
    if config.lora is not None:
        holds = f"holds a LoRA adapter of stage {printable(payload['stage'])} and no whole model, as one of stage pretrain or sft without lora does"
        base = resolve_reference(payload["base"]["path"], Path(name))
        raise UserError(
            f"{printable(name)}: {holds}. Start from its base, {printable(base)}, or from the two merged."
        )
    foreign = payload["hf_config"] is not None
    return InitialModel(
        name,
        config.model,
        config.tokenizer,
        tokenizer_from_plain(payload["tokenizer"]),
        foreign,
        lambda config: whole_model(config, payload),
    )


def reference_to(base: InitialModel, model: nn.Module, folder: Path) -> dict[str, str]:
    """What an adapter's checkpoint in `folder` holds of its base, whose `model` has no adapter yet.

    The path is relative to the folder, so that the two can move together.
    """
    path = base.name.removeprefix(HF_PREFIX)
    if os.path.exists(path):
        path = os.path.relpath(Path(path).resolve(), folder.resolve())
    return {
        "path": f"{HF_PREFIX if base.name.startswith(HF_PREFIX) else ''}{path}",
        "fingerprint": fingerprint_of(model),
    }


def resolve_reference(recorded: str, checkpoint: Path) -> str:
    """The inverse of `reference_to`'s path: the name of the base for whoever works elsewhere."""
    path = recorded.removeprefix(HF_PREFIX)
    beside = os.path.normpath(checkpoint.resolve().parent / path)
    if recorded.startswith(HF_PREFIX):
        return f"{HF_PREFIX}{beside}" if os.path.isdir(beside) else recorded
    return beside


def fingerprint_of(model: nn.Module) -> str:
    """16 hex digits that identify the weights of `model`: SHA-256 over their names, types, shapes and bytes."""
    return _fingerprint(model.state_dict())


def weights_fingerprint(path: Path) -> str:
    """`fingerprint_of` the model or adapter that the checkpoint at `path` holds, without building it."""
    return _fingerprint(read(path)["weights"])


def _fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
