"""Low-rank adapters (Hu et al. 2021): two small matrices are trained beside each frozen linear
layer.

    y = W x + (alpha / r) · B A x  A (r, in) random, B (out, r) zero:
    at first the model is unchanged

               ┌──── W (out, in), frozen ─────┐
        x ─────┤                              ├─ + ─▶ y
               └─ A (r, in) ─▶ B (out, r) ────┘

With lora.dora the magnitudes m (out,) of the rows of W are trained separately, and the adapters
change their directions only (Liu et al. 2024, arXiv:2402.09353, equation 5; peft takes the gradient
of their section 4.3, in which the norm is a constant):

    W' = m · (W + (alpha / r) · B A) / ‖W + (alpha / r) · B A‖  norms of rows, m at first ‖W‖

`attach` puts adapters into a model with peft, for training. `merge` adds them to the weights, for
everything else: the result is an ordinary model, and peft is not needed. In checkpoints and
exported files a matrix has the name that it has in peft's files:
`blocks.0.attention.qkv.lora_A.weight`. Rows of special tokens that were added to the base are
trained beside the adapters (growth.py), as `embedding.added_rows`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

# model.growth is imported for a model with adapters
from tinylm import model as models
from tinylm.common.bnb import block_downloads
from tinylm.common.device import return_freed_memory
from tinylm.common.errors import UserError, first_line, require_package
from tinylm.config.schema import LoraConfig
from tinylm.model.decoder import Decoder
from tinylm.model.nf4 import quantize, round_weights, weight_matrix

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel

# Of `Decoder`. The router of a mixture decides which expert computes,
# and gets an adapter only if it is named.
TARGETS = ("qkv", "out", "up", "down")
# What a layer of routers is called in Hugging Face's models and in `Decoder`.
ROUTERS = {"gate", "router"}
# Mamba and its hybrids in transformers: their code reads `weight` of some linear layers, which are
# not called as modules.
READS_WEIGHTS = {
    *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba"),
    *("mamba", "mamba2", "nemotron_h", "zamba2"),
}
NO_TOKENS = range(0)
# The end of the name of DoRA's magnitudes in an adapter's checkpoint, and in peft's files.
MAGNITUDE = ".lora_magnitude_vector"


def attach(
    model: Decoder | HFModel,
    lora: LoraConfig,
    *,
    seed: int,
    new_tokens: range = NO_TOKENS,
    dtype: torch.dtype | None = None,
) -> None:
    """Put adapters into `model` and freeze its own weights, except the rows of `new_tokens`;
    the values of A depend on the seed alone. A base in 4 bits computes in `dtype`; None: fp32.

    Raises:
        UserError: peft is missing, a target matches no layer, the rank is larger than a layer, or
            lora.dora is set and a row of a weight is all zero.
    """
    layers = target_layers(model, lora)
    if lora.dora:
        _require_directions(layers)
    require_package("peft")
    block_downloads()
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    is_nf4 = lora.base_weights == "nf4"
    config = PeftConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules or default_targets(model)),
        # GPT-2's Conv1D stores (in, out), but not in 4 bits
        fan_in_fan_out=not (is_nf4 or all(isinstance(one, nn.Linear) for one in layers.values())),
    )
    # before peft changes the first layers
    names = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
    inner = model if isinstance(model, Decoder) else model.inner
    if is_nf4:
        layers.clear()  # which holds the weights in fp32
        quantize(inner, [*frozen_matrices(model)], dtype)
    torch.manual_seed(seed)
    try:
        inject_adapter_in_model(config, inner)
    except ValueError as error:  # layers whose weights a fused kernel reads, as in Mamba
        problem = f"peft refuses a layer: {first_line(error)}"
        raise UserError(
            "lora.target_modules", problem, f"Name others of {', '.join(names)}"
        ) from None
    if new_tokens:
        models.growth.train_rows(model, new_tokens)
    if is_nf4:
        return_freed_memory()


def default_targets(model: Decoder | HFModel) -> tuple[str, ...]:
    """The last names of the layers that get adapters if lora.target_modules is null:
    attention and feed-forward, without gates of one output, which no rank fits.
    """
    layers = linear_layers(model)
    names = {name.rpartition(".")[2] for name in layers}
    if isinstance(model, Decoder):
        names &= set(TARGETS)
    for name, layer in layers.items():
        if min(layer.weight.shape) == 1:
            names.discard(name.rpartition(".")[2])
    return tuple(sorted(names))


def linear_layers(model: Decoder | HFModel) -> dict[str, nn.Module]:
    """The layers that can have adapters, by the names that peft sees:
    those that are called as modules.

    The head is not: the loss takes its matrix, so that an adapter on it would be ignored.
    """
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    inner: nn.Module = model
    head: nn.Module = model.head if isinstance(model, Decoder) else model.head.layer
    if not isinstance(model, Decoder):
        from transformers.pytorch_utils import Conv1D

        kinds = (nn.Linear, Conv1D)
        inner = model.inner
    return {
        name: layer
        for name, layer in inner.named_modules()
        if isinstance(layer, kinds) and layer is not head
    }


def frozen_matrices(model: Decoder | HFModel) -> dict[str, nn.Module]:
    """The layers that lora.base_weights is for, with adapters or not: the linear layers without
    routers, whose choices a rounded weight could change.

    Raises:
        UserError: the model reads packed weights as numbers, as Mamba would.
    """
    layers = linear_layers(model)
    if isinstance(model, Decoder):
        return {name: layers[name] for name in layers if name.rpartition(".")[2] in TARGETS}
    kind = model.inner.config.model_type
    if kind in READS_WEIGHTS:
        problem = f"nf4 is not supported with {kind}, whose code reads the weights of some layers"
        raise UserError("lora.base_weights", problem, "Set lora.base_weights=fp32")
    return {name: layers[name] for name in layers if ROUTERS.isdisjoint(name.split("."))}


def target_layers(model: Decoder | HFModel, lora: LoraConfig) -> dict[str, nn.Module]:
    """The layers that get adapters.

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
            problem = f"must name layers that can have an adapter ({known}), got {target}"
            raise UserError("lora.target_modules", problem)
        chosen |= found
    for name, layer in chosen.items():
        assert isinstance(layer.weight, Tensor)
        limit = min(layer.weight.shape)
        if lora.r > limit:
            problem = f"must be at most {limit}, the smaller side of {name}, got {lora.r}"
            raise UserError("lora.r", problem)
    return chosen


def _require_directions(layers: Mapping[str, nn.Module]) -> None:
    """Raise a UserError if a row has the norm 0, by which DoRA would divide."""
    for name, layer in layers.items():
        n_zero = int((weight_matrix(layer).norm(dim=1) == 0).sum())
        if n_zero:
            problem = f"{name} has {n_zero} all-zero rows, whose direction DoRA cannot normalize"
            raise UserError("lora.dora", problem, "Remove it, or name other lora.target_modules")


def adapter_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' matrices among the weights of a model that has them,
    by their names in peft's files.

    >>> adapter_weights({"a.base_layer.weight": torch.ones(1), "a.lora_A.default.weight": torch.ones(1)})
    {'a.lora_A.weight': tensor([1.])}
    """
    found = {}
    for name, weight in weights.items():
        if ".lora_A." in name or ".lora_B." in name:
            found[name.replace(".default.", ".")] = weight
        elif MAGNITUDE in name:
            found[name.removesuffix(".default.weight")] = weight
        elif of_rows := models.growth.row_name(name):
            found[of_rows] = weight
    return found


def load_adapter(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Fill the adapters that `attach` made with `weights`,
    those of a checkpoint with the same settings.

    Raises:
        UserError: naming a matrix that is missing, unexpected or of another shape.
    """
    own = adapter_weights(dict(model.named_parameters()))
    _require_shapes({name: tuple(weight.shape) for name, weight in own.items()}, weights)
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(weights[name])


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model without its adapters, exactly as before `attach`:
    the reference of preference training.
    """
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        with models.growth.added_rows_off(model):
            yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def _require_shapes(wanted: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> None:
    """Raise a UserError unless `weights` are the matrices of adapters with these shapes."""
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            problem = f"must have the shape {wanted.get(name)}, got {found.get(name)}"
            raise UserError(("adapter", name), problem, "Use another checkpoint")


def require_adapter(
    model: Decoder | HFModel,
    weights: Mapping[str, Tensor],
    lora: LoraConfig,
    new_tokens: range = NO_TOKENS,
) -> None:
    """Raise a UserError unless `weights` are the adapters of `model`, a base without adapters."""
    prefix = "" if isinstance(model, Decoder) else "inner."
    wanted: dict[str, tuple[int, ...]] = {}
    for name, layer in target_layers(model, lora).items():
        rows, columns = weight_matrix(layer).shape
        if lora.dora:
            wanted[f"{prefix}{name}{MAGNITUDE}"] = (rows,)
        wanted[f"{prefix}{name}.lora_A.weight"] = (lora.r, columns)
        wanted[f"{prefix}{name}.lora_B.weight"] = (rows, lora.r)
    if new_tokens:
        for name, layer in models.growth.vocabulary_layers(model).items():
            wanted[f"{name}{models.growth.ADDED_ROWS}"] = (len(new_tokens), layer.weight.shape[1])
    _require_shapes(wanted, weights)


@torch.no_grad()
def merge(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    lora: LoraConfig,
    new_tokens: range = NO_TOKENS,
) -> None:
    """Add the adapters `weights` to the matrices of `model`, a base without adapters:
    W + scale · B A, with the magnitudes of its rows if they were trained (lora.dora), and W in the
    numbers of training (lora.base_weights); and put the rows of `new_tokens` in their place.
    """
    if lora.base_weights == "nf4":
        round_weights(frozen_matrices(model))
    for name, a in weights.items():
        if name.endswith(models.growth.ADDED_ROWS):
            layer = model.get_submodule(name.removesuffix(models.growth.ADDED_ROWS))
            layer.weight[new_tokens.start : new_tokens.stop] = a
        layer_name, is_a, _ = name.partition(".lora_A.")
        if not is_a:
            continue
        b = weights[f"{layer_name}.lora_B.weight"]
        matrix = weight_matrix(model.get_submodule(layer_name))  # (out, in), changed in place
        matrix += (b.float() @ a.float()) * lora.scale
        if lora.dora:
            magnitudes = weights[f"{layer_name}{MAGNITUDE}"]  # (out,)
            matrix *= (magnitudes / matrix.norm(dim=1))[:, None]
