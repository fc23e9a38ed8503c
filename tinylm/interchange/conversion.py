"""`Decoder` to a Hugging Face model and back: first the settings, then the weights,
by the tables of `architectures`.

    ModelConfig ─ hf_config ─▶ config.json          Decoder ─ to_hf ──▶ PreTrainedModel
    ModelConfig ◀ our_config ─ config.json          Decoder ◀─ from_hf ─ PreTrainedModel

Both models give the same logits, which `logit_difference` checks. A setting that the other side
does not have is a UserError that names it. Knows nothing of tokenizers, files or the hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import ValidationError
from torch import Generator, Tensor, cat, no_grad, randint

from tinylm.checkpoint.check import empty_model
from tinylm.common.errors import UserError
from tinylm.config.schema import ModelConfig
from tinylm.interchange.architectures import (
    ARCHITECTURES,
    BY_INTERVAL,
    FULL_INTERVAL,
    LAYER_TYPES,
    MIXED,
    NO_ROPE_LAYERS,
    ROPE_PARAMETERS,
    Architecture,
    unsupported,
)
from tinylm.interchange.rope_parameters import our_settings, their_context, their_parameters
from tinylm.model.decoder import Decoder, layer_kinds
from tinylm.model.hf_model import HFModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ANOTHER = "Choose another model"

# --- settings ---


def hf_config(config: ModelConfig) -> PreTrainedConfig:
    """The Hugging Face config of the architecture that computes what this decoder computes.

    It has no special token ids: these belong to the tokenizer. Settings of training (`init`,
    `gradient_checkpointing`, and `residual_dropout` except in GPT-2) are dropped.

    Raises:
        UserError: no architecture fits; it names the setting and the nearest architecture.
    """
    from transformers import AutoConfig

    architecture = _architecture_for(config)
    ours = _flat(config)
    settings = dict(architecture.theirs)
    for name, their_name in architecture.settings.items():
        if not their_name.startswith(ROPE_PARAMETERS):
            settings[their_name] = ours[name]
    if config.position == "rope":
        by_layer = "rope_local_theta" in architecture.settings
        settings[architecture.settings["max_seq_len"]] = their_context(config)
        settings[ROPE_PARAMETERS] = their_parameters(config, by_layer=by_layer)
    if architecture.model_type == "gpt2":
        settings["embd_pdrop"] = config.residual_dropout
    settings.pop(NO_ROPE_LAYERS, None)
    settings.pop(FULL_INTERVAL, None)
    if LAYER_TYPES in settings:
        kinds, kind_of_layer = layer_kinds(config)
        windows = [kinds[kind].sliding_window for kind in kind_of_layer]
        settings[LAYER_TYPES] = [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ]
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    made = AutoConfig.for_model(architecture.model_type, **no_tokens, **_nested(settings))
    if config.position == "rope":
        # for readers older than transformers 5, which do not know rope_parameters
        made.rope_theta = config.rope_theta
    return made


def our_config(config: PreTrainedConfig) -> ModelConfig:
    """The decoder that computes what a Hugging Face model with this config computes.

    Raises:
        UserError: there is none; it names the architecture or the setting.
    """
    architecture = _architecture_in(config)
    theirs = _settings_of(config)
    settings = dict(architecture.ours)
    for name, their_name in architecture.settings.items():
        if their_name != ROPE_PARAMETERS:
            settings[name] = theirs[their_name]
    if ROPE_PARAMETERS in architecture.settings.values():
        settings |= our_settings(config)
    try:
        return ModelConfig.model_validate(_nested(settings))
    except ValidationError as error:
        first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if key in architecture.settings:
        their_name = architecture.settings[key]
        problem = f"{_as_json(theirs[their_name])} is out of bounds here ({first['msg']})"
        raise UserError(("config.json", their_name), problem, ANOTHER)
    problem = f"its settings are not supported together ({first['msg']})"
    raise UserError("config.json", problem, ANOTHER)


def _architecture_in(config: PreTrainedConfig) -> Architecture:
    """The architecture that a Hugging Face config describes."""
    known = [one for one in ARCHITECTURES if one.model_type == config.model_type]
    if not known:
        problem = unsupported(config.model_type)
        raise UserError(("config.json", "model_type"), problem, ANOTHER)
    found = _settings_of(config)
    misfits = [[key for key, value in one.theirs.items() if found[key] != value] for one in known]
    wrong = min(misfits, key=len)
    if wrong:
        key = wrong[0]
        expected = known[misfits.index(wrong)].theirs[key]
        problem = f"must be {_as_json(expected)}, got {_as_json(found[key])}"
        raise UserError(("config.json", key), problem, ANOTHER)
    return known[misfits.index(wrong)]


def _settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings by dotted name; the types of the layers as one word if they follow a rule."""
    found = dict(_dotted(config.to_dict()))
    types = found.get(LAYER_TYPES)
    if types:
        # without a full layer, the first one would come after the last layer
        every = [*types, "full_attention"].index("full_attention") + 1
        found[FULL_INTERVAL] = every
        if len(set(types)) == 1:
            found[LAYER_TYPES] = types[0]
        elif types == _mixed_types(every, len(types)):
            found[LAYER_TYPES] = MIXED
    if NO_ROPE_LAYERS in found:
        every = found["no_rope_layer_interval"]
        regular = [int((layer + 1) % every != 0) for layer in range(config.num_hidden_layers)]
        if found[NO_ROPE_LAYERS] == regular:
            found[NO_ROPE_LAYERS] = BY_INTERVAL
    return found


def _mixed_types(every: int, n_layers: int) -> list[str]:
    """The types of layers of which every n-th is without a window."""
    is_full = [(layer + 1) % every == 0 for layer in range(n_layers)]
    return ["full_attention" if full else "sliding_attention" for full in is_full]


def _architecture_for(config: ModelConfig) -> Architecture:
    """The architecture that has all settings of this decoder."""
    misfits = [list(_misfits(config, one)) for one in ARCHITECTURES]
    wrong = min(misfits, key=len)
    nearest = ARCHITECTURES[misfits.index(wrong)]
    if not wrong:
        return nearest
    key, found, expected = wrong[0]
    problem = (
        f"{_as_json(found)} is not supported by any Hugging Face architecture that can be "
        f"exported; the nearest, {nearest.model_type}, has {_as_json(expected)}"
    )
    raise UserError(f"model.{key}", problem, "Train with that, or keep the model as a checkpoint")


def _misfits(config: ModelConfig, architecture: Architecture) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that the architecture cannot have: its name, its value,
    and the value that it would have there.
    """
    found = _flat(config)
    for key, value in (architecture.ours | architecture.limits_of(config)).items():
        if found[key] != value:
            yield key, found[key], value


def _flat(config: ModelConfig) -> dict[str, Any]:
    """The settings by dotted name; `moe` is also there as a section."""
    values = config.model_dump()
    return values | dict(_dotted(values))


def _dotted(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested sections, by dotted name.

    >>> dict(_dotted({"a": 1, "b": {"c": 2}}))
    {'a': 1, 'b.c': 2}
    """
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `_dotted`, one section deep."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        target = nested.setdefault(section, {}) if section else nested
        target[name] = value
    return nested


def _as_json(value: Any) -> str:
    """A setting as it is in YAML and config.json."""
    return json.dumps(value)


# --- weights ---


def to_hf(model: Decoder) -> PreTrainedModel:
    """A Hugging Face model, in eval mode, with a copy of the weights and the same logits.

    Raises:
        UserError: no architecture computes the same; see `hf_config`.
    """
    from transformers import AutoModelForCausalLM

    architecture = _architecture_for(model.config)
    dtype = model.embedding.weight.dtype
    made = AutoModelForCausalLM.from_config(hf_config(model.config), dtype=dtype)
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {}
    for pair in _pairs(architecture, model.config.n_layers, ours):
        weight = ours[pair.name] - 1 if pair.shifted else ours[pair.name]
        rows = _rows(model.config, pair.name, len(weight), len(pair.theirs))
        for their_name, part in zip(pair.theirs, weight.split(rows), strict=True):
            theirs[their_name] = part.T if pair.transposed else part
    made.load_state_dict(theirs, strict=True)
    return made.eval()


def from_hf(hf_model: PreTrainedModel) -> Decoder:
    """A decoder, in eval mode, in fp32, with a copy of a Hugging Face model's weights
    and the same logits.

    Raises:
        UserError: our decoder cannot compute the same; see `our_config`.
    """
    return from_weights(hf_model.config, hf_model.state_dict().__getitem__)


def from_weights(hf_config: PreTrainedConfig, weight: Callable[[str], Tensor]) -> Decoder:
    """A decoder for a Hugging Face config, in eval mode, in fp32;
    `weight` returns a tensor of theirs by name.

    Raises:
        UserError: our decoder cannot compute the same; see `our_config`.
    """
    config = our_config(hf_config)
    model = empty_model(config)
    ours: dict[str, Tensor] = {}
    pairs = _pairs(_architecture_in(hf_config), config.n_layers, model.state_dict())
    for name, their_names, transposed, shifted in pairs:
        if name == "head.weight" and config.tie_embeddings:  # their files need not have it
            ours[name] = ours["embedding.weight"]
            continue
        stacked = cat([weight(part) for part in their_names]).float()
        ours[name] = stacked.T.contiguous() if transposed else stacked
        if shifted:
            ours[name] = ours[name] + 1
    model.load_state_dict(ours, strict=True, assign=True)
    if config.tie_embeddings:
        model.head.weight = model.embedding.weight
    return model.eval()


def their_shapes(hf_config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that `from_weights` asks for, and its shape.

    Raises:
        UserError: as `our_config`.
    """
    config = our_config(hf_config)
    weights = empty_model(config).state_dict()
    ours = {name: tuple(weight.shape) for name, weight in weights.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parts, transposed, _ in _pairs(_architecture_in(hf_config), config.n_layers, ours):
        if name == "head.weight" and config.tie_embeddings:
            continue
        rows = _rows(config, name, ours[name][0], len(parts))
        for part, n_rows in zip(parts, rows, strict=True):
            shape = (n_rows, *ours[name][1:])
            shapes[part] = shape[::-1] if transposed else shape
    return shapes


def stored_names(name: str, present: Container[str], n_experts: int) -> tuple[str, ...]:
    """The names in a folder's files, of which `present` exist,
    whose tensors make up their tensor `name`, in its order.

    Files may omit the part before the first dot (GPT-2's do),
    and those of mixtures have each expert by itself.
    """
    if name in present:
        return (name,)
    layer, _, part = name.partition("mlp.")
    older = f"{layer}block_sparse_moe."
    if part == "gate.weight" and f"{older}{part}" in present:
        return (f"{older}{part}",)
    alone = f"{layer}mlp.experts"
    if part.startswith("experts.") and f"{alone}.0.down_proj.weight" in present:
        names = ("gate_proj", "up_proj") if "gate" in part else ("down_proj",)
        return tuple(
            f"{alone}.{expert}.{name}.weight" for expert in range(n_experts) for name in names
        )
    matrices = {"experts.gate_up_proj": ("w1", "w3"), "experts.down_proj": ("w2",)}.get(part)
    if matrices is not None:
        return tuple(
            f"{older}experts.{expert}.{matrix}.weight"
            for expert in range(n_experts)
            for matrix in matrices
        )
    bare = name.partition(".")[2]
    return (bare,) if bare in present else (name,)


def _rows(config: ModelConfig, name: str, n_rows: int, n_parts: int) -> list[int]:
    """The number of rows of each part of our weight `name`: queries, keys and values,
    or gate and value.
    """
    if n_parts == 3:
        assert ".qkv." in name, name
        n_key_rows = config.n_kv_heads * config.head_dim
        return [config.n_heads * config.head_dim, n_key_rows, n_key_rows]
    return [n_rows // n_parts] * n_parts


class WeightMapping(NamedTuple):
    """One of our weights, and their weights that are stacked in it."""

    name: str
    theirs: tuple[str, ...]
    transposed: bool
    """whether theirs are stored transposed"""
    shifted: bool
    """whether ours is 1 more than theirs"""


def _pairs(
    architecture: Architecture, n_layers: int, ours: Container[str]
) -> Iterator[WeightMapping]:
    """All pairs of weights."""
    for module, theirs in architecture.modules.items():
        parts = (theirs,) if isinstance(theirs, str) else theirs
        for layer in range(n_layers if "{}" in module else 1):
            for suffix in ("", ".weight", ".bias"):  # "": experts are a parameter, not a module
                name = module.format(layer) + suffix
                if name in ours:
                    is_weight = suffix == ".weight"
                    yield WeightMapping(
                        name,
                        tuple(part.format(layer) + suffix for part in parts),
                        is_weight and module.endswith(architecture.transposed),
                        is_weight and module.endswith(architecture.shifted),
                    )


# --- the check ---

# Of the largest logit. The two sum in another order, and fp32 has 7 digits.
TOLERANCE = 1e-4
CHECKED_POSITIONS = 64


@no_grad()
def logit_difference(ours: Decoder | HFModel, theirs: PreTrainedModel) -> float:
    """The largest difference of the two models' logits on random ids,
    relative to the largest logit (at least 1).
    """
    n_tokens = theirs.config.vocab_size
    length = min(ours.config.max_seq_len, CHECKED_POSITIONS)
    ids = randint(n_tokens, (1, length), generator=Generator().manual_seed(0))
    expected = theirs(ids).logits.float()
    difference = (ours(ids)[..., :n_tokens] - expected).abs().max()
    return (difference / expected.abs().max().clamp(min=1)).item()
