"""A vocabulary that grows: new rows of the embedding and the head for tokens that are added later.

    embedding, head   (V, D) ─▶ (V', D): each new row is the mean of the rows that were trained
    under LoRA        the new rows are trained, all others stay frozen (`train_rows`)

The mean is a safer start than zeros or noise: the new token's logit is the mean of the others', so
no other probability moves much (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
Language Models").
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from tinylm.model.decoder import Decoder

if TYPE_CHECKING:
    from tinylm.model.hf_model import HFModel

# The end of the name of trained rows in an adapter's checkpoint.
ADDED_ROWS = ".added_rows"


@torch.no_grad()
def grow_vocabulary(model: Decoder | HFModel, tokens: range) -> Decoder | HFModel:
    """The model, changed in place, with rows for the new `tokens`, which follow the known ones.

    A vocabulary that was padded has some of these rows already; they are initialized too.
    """
    size = max(model.embedding.num_embeddings, tokens.stop)
    if isinstance(model, Decoder):
        is_tied = model.config.tie_embeddings
        model.embedding.weight = nn.Parameter(_longer(model.embedding.weight, size))
        model.embedding.num_embeddings = size
        head = model.embedding.weight
        if not is_tied:
            head = nn.Parameter(_longer(model.head.weight, size))
        model.head.weight = head
        model.head.out_features = size
        model.config = model.config.model_copy(update={"vocab_size": size})
    else:
        model.resize(size)
    for weight in _vocabulary_weights(model):
        # fp64: the same mean with any number of threads, since adapters know their base by its bits
        weight[tokens.start : tokens.stop] = weight[: tokens.start].double().mean(0).to(weight)
    return model


def _longer(weight: Tensor, size: int) -> Tensor:
    """The rows of `weight` (V, D), and zeros after them (size, D)."""
    grown = weight.new_zeros(size, *weight.shape[1:])
    grown[: len(weight)] = weight
    return grown


def vocabulary_layers(model: Decoder | HFModel) -> dict[str, nn.Module]:
    """The embedding and the head by their names in the model; without the head if it is tied."""
    layer = model.head if isinstance(model, Decoder) else model.head.layer
    wanted = [model.embedding]
    if layer.weight is not model.embedding.weight:
        wanted.append(layer)
    return {name: one for name, one in model.named_modules() if any(one is w for w in wanted)}


def _vocabulary_weights(model: Decoder | HFModel) -> list[Tensor]:
    """The matrices (V, D) of embedding and head, each once, and the bias (V,) of a head that has one."""
    layer = model.head if isinstance(model, Decoder) else model.head.layer
    weights = [model.embedding.weight]
    if layer.weight is not model.embedding.weight:
        weights.append(layer.weight)
    return weights if layer.bias is None else [*weights, layer.bias]


# --- under LoRA ---


class AddedRows(nn.Module):
    """Some rows of a matrix as a parameter of their own, put in the place of its frozen ones."""

    def __init__(self, weight: Tensor, tokens: range):
        super().__init__()
        self.tokens, self.enabled = tokens, True
        self.rows = nn.Parameter(weight[tokens.start : tokens.stop].detach().clone())  # (n, D)

    def forward(self, weight: Tensor) -> Tensor:
        """The whole matrix (V, D)."""
        if not self.enabled:
            return weight
        before, after = weight[: self.tokens.start], weight[self.tokens.stop :]
        return torch.cat((before, self.rows.to(weight.dtype), after))


class SameRows(nn.Module):
    """The rows of `AddedRows` in a tied matrix; they are a parameter only there."""

    def __init__(self, rows: AddedRows):
        super().__init__()
        self.of = (rows,)  # in a tuple: not registered a second time

    def forward(self, weight: Tensor) -> Tensor:
        """The whole matrix (V, D)."""
        return self.of[0](weight)


def train_rows(model: Decoder | HFModel, tokens: range) -> None:
    """Train the rows of these tokens, of the embedding and of an untied head; the others stay as
    they are, frozen or not.
    """
    layer = model.head if isinstance(model, Decoder) else model.head.layer
    is_tied = layer.weight is model.embedding.weight
    rows = AddedRows(model.embedding.weight, tokens)
    of_head = SameRows(rows) if is_tied else AddedRows(layer.weight, tokens)
    parametrize.register_parametrization(model.embedding, "weight", rows)
    parametrize.register_parametrization(layer, "weight", of_head)


def row_name(name: str) -> str | None:
    """The name in a checkpoint of trained rows, from that in the model; None for another weight.

    >>> row_name("embedding.parametrizations.weight.0.rows"), row_name("embedding.weight")
    ('embedding.added_rows', None)
    """
    layer, found, _ = name.partition(".parametrizations.weight.0.rows")
    return f"{layer}{ADDED_ROWS}" if found else None


@contextlib.contextmanager
def added_rows_off(model: nn.Module) -> Iterator[None]:
    """The model with the new rows as they were at first."""
    layers = [layer for layer in model.modules() if isinstance(layer, AddedRows)]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
