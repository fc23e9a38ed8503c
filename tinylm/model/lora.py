"""Low-rank adapters (Hu et al. 2021): two small matrices beside each frozen linear layer, trained in place of its own.

    y = W x + (alpha / r) · B A x        A (r, in) random, B (out, r) zero, so that the model begins unchanged

`attach` puts them into a model by peft, for training. `merge` adds them to the weights, for everything else: what comes out
is an ordinary model, and peft is not needed. `save_adapter` writes the files that plain peft loads. In checkpoints and
files a matrix is called as peft's files call it: `blocks.0.attention.qkv.lora_A.weight`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinylm.common.errors import UserError, printable, require_package
from tinylm.config.schema import LoraConfig
from tinylm.model.decoder import Decoder

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel

# Of our decoder. The router of a mixture decides who computes: it is left alone unless somebody names it.
TARGETS = ("qkv", "out", "up", "down")


def attach(model: Decoder | HFModel, lora: LoraConfig, *, seed: int) -> None:
    """Put adapters into `model`, whose own weights are frozen; what A holds depends on the seed alone.

    Raises:
        UserError: peft is missing, a target matches no layer, or the rank is larger than a layer.
    """
    layers = target_layers(model, lora)
    require_package("peft")
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    transposed = not all(isinstance(layer, nn.Linear) for layer in layers.values())
    names = list(lora.target_modules or default_targets(model))
    torch.manual_seed(seed)
    inject_adapter_in_model(
        PeftConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=names,
            fan_in_fan_out=transposed,
        ),
        model if isinstance(model, Decoder) else model.inner,
    )


def default_targets(model: Decoder | HFModel) -> tuple[str, ...]:
    """The last names of the layers that get adapters where the settings name none: attention and feed-forward."""
    names = {name.rpartition(".")[2] for name in linear_layers(model)}
    return tuple(sorted(names & set(TARGETS) if isinstance(model, Decoder) else names))


def linear_layers(model: Decoder | HFModel) -> dict[str, nn.Module]:
    """The layers that can have adapters: those that are called as modules, and so not the head, whose matrix the loss takes.

    The names are those within the model that peft sees.
    """
    if isinstance(model, Decoder):
        return {
            name: layer
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear) and layer is not model.head
        }
    from transformers.pytorch_utils import Conv1D

    return {
        name: layer
        for name, layer in model.inner.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and layer is not model.head
    }


def target_layers(model: Decoder | HFModel, lora: LoraConfig) -> dict[str, nn.Module]:
    """The layers that `lora` asks for.

    Raises:
        UserError: a target is the end of no layer's name, or the rank is larger than a layer.
    """
    layers = linear_layers(model)
    chosen: dict[str, nn.Module] = {}
    for target in lora.target_modules or default_targets(model):
        found = {
            name: layer
            for name, layer in layers.items()
            if name == target or name.endswith(f".{target}")
        }
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(
                f"lora.target_modules: no layer that can have an adapter is called {printable(target)}. There are {known}."
            )
        chosen |= found
    for name, layer in chosen.items():
        assert isinstance(layer.weight, Tensor)
        if lora.r > min(layer.weight.shape):
            raise UserError(
                f"lora.r: a rank of {lora.r} is more than the smaller side of {name}, {min(layer.weight.shape)}. Lower lora.r."
            )
    return chosen


def adapter_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' matrices among the weights of a model that has them, as peft's files call them.

    >>> adapter_weights({"a.base_layer.weight": torch.ones(1), "a.lora_A.default.weight": torch.ones(1)})
    {'a.lora_A.weight': tensor([1.])}
    """
    return {
        name.replace(".default.", "."): weight
        for name, weight in weights.items()
        if ".lora_A." in name or ".lora_B." in name
    }


def load_adapter(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill the adapters that `attach` made with those of a checkpoint, which must be the same ones."""
    own = adapter_weights(dict(model.named_parameters()))
    if {name: weight.shape for name, weight in own.items()} != {
        name: weight.shape for name, weight in weights.items()
    }:
        raise ValueError("these adapters are of another model or rank; compare the settings first")
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base that `model` had before `attach`, to the last bit, at no memory: the reference of preference training."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def merge(model: nn.Module, weights: Mapping[str, Tensor], lora: LoraConfig) -> None:
    """Add the adapters `weights` to the matrices of `model`, a base without adapters: W + (alpha / r) · B A."""
    for name, down in weights.items():
        layer_name, is_first, _ = name.partition(".lora_A.")
        if is_first:
            layer = model.get_submodule(layer_name)
            change = (weights[f"{layer_name}.lora_B.weight"].float() @ down.float()) * (
                lora.alpha / lora.r
            )
            layer.weight += (
                change if isinstance(layer, nn.Linear) else change.T
            )  # GPT-2 stores (in, out)
