"""Whether the state of a checkpoint is one that this program could have written.

The digest of a file says that it is as its author wrote it, not that its author was this program.
So `read` (format.py) passes every state through `checked`, in this order: the types of its keys,
its settings, the names and shapes of its weights, and that they are finite numbers. Afterwards
every program can use it without a check of its own, except for what needs another file: the base
of an adapter (`model/lora.py`) and the code of a Hugging Face model (`model/hf_files.py`).
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# model.verifier and model.reward_model are imported for a checkpoint of that stage, model.rounded for
# one with fewer bits
from tinylm import model as models
from tinylm.checkpoint.old_schemas import SCHEMA, upgrade
from tinylm.common.errors import DamagedError, UserError, first_line
from tinylm.config.finetuning import VerifierConfig
from tinylm.config.messages import explain
from tinylm.config.schema import Config, ModelConfig
from tinylm.model.decoder import Decoder
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.factory import tokenizer_from_plain

ANOTHER = "Use another checkpoint"
OTHER_VERSION = f"{ANOTHER}, or the version of this program that wrote it"
# The types of the keys in a state; `None` if a key can be null, ABSENT if it can be missing.
ABSENT = "absent"
_NUMBER = (float, int)
_TYPES: dict[str, tuple[Any, ...]] = {
    "schema": (int,),
    "stage": (str,),
    "step": (int,),
    "tokens": (int,),
    "train_loss": (*_NUMBER, None),
    "val_loss": (*_NUMBER, None),
    "created": _NUMBER,
    "config": (dict,),
    "settled": (dict, ABSENT),
    "tokenizer": (dict,),
    "weights": (dict,),
    "hf_config": (str, None, ABSENT),
    "base": (dict, None, ABSENT),
    "reference": (dict, None, ABSENT),
    "int8": (dict, ABSENT),
    "int4": (dict, ABSENT),
    "system": (str, None, ABSENT),
    "source_passes": (list, ABSENT),
    "data": (dict, ABSENT),
    "progress": (dict, ABSENT),
    "rollouts": (list, ABSENT),
}
# The types of the keys that a run needs to resume; an imported model has none of them.
_RESUME_TYPES: dict[str, tuple[Any, ...]] = {
    "optimizer": (dict,),
    "precision": (dict,),
    "progress": (dict,),
    "cursor": (list, None),
    "data": (dict,),
    "world_size": (int,),
    "threads": (int,),
}
# The keys of matrices with fewer bits, and the bits: the fewest first.
ROUNDED = {"int4": 4, "int8": 8}
# Larger counts cannot be written into metrics and file names.
_LARGEST_COUNT = 2**63 - 1


def checked(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """The state of the checkpoint at `path` in the form of the current schema.

    Raises:
        DamagedError: naming the key or the weight, and what is wrong with it.
        UserError: it has a newer schema.
    """
    _check_keys(path, state)
    if state["schema"] > SCHEMA:
        problem = f"has schema {state['schema']}, but this version reads up to schema {SCHEMA}"
        raise UserError(path, problem, "Update this program")
    state = upgrade(state)
    config = _check_config(path, state)
    _check_weights(path, state, config)
    return state | {"config": config.to_plain()}  # with every setting, so that none is missing


def tokenizer_of(path: Path, state: dict[str, Any]) -> Tokenizer:
    """The tokenizer in the state of the checkpoint at `path`.

    Raises:
        UserError: it is not one, or it has more tokens than the model.
    """
    try:
        tokenizer = tokenizer_from_plain(state["tokenizer"])
    except UserError as error:
        raise error.within(path) from None
    size = state["config"]["model"]["vocab_size"]
    if size is not None and tokenizer.vocab_size > size:
        problem = f"has {tokenizer.vocab_size} tokens, but the model has {size}"
        raise DamagedError((path, "tokenizer"), problem, ANOTHER)
    return tokenizer


def rounded_weights(state: dict[str, Any]) -> dict[str, tuple[torch.Tensor, ...]]:
    """The matrices in 8 or 4 bits in a state, by name; empty if it has none."""
    return state.get("int8", {}) | state.get("int4", {})


def rounding_of(state: dict[str, Any]) -> str | None:
    """int4 if a state has matrices in 4 bits, int8 if all rounded ones have 8, None if none is."""
    return next((key for key in ROUNDED if key in state), None)


# --- keys ---


def _check_keys(path: Path, state: dict[str, Any]) -> None:
    types = _TYPES | (_RESUME_TYPES if "optimizer" in state else {})
    for key, allowed in types.items():
        if key in state or ABSENT not in allowed:
            _check_type(path, key, state.get(key), allowed)
    for key in ("schema", "step", "tokens", "world_size", "threads"):
        smallest = 1 if key == "schema" else 0
        if not smallest <= state.get(key, smallest) <= _LARGEST_COUNT:
            problem = f"must be a count of at least {smallest}, got {state[key]}"
            raise DamagedError((path, key), problem, ANOTHER)
    for key in ("base", "reference"):
        if state.get(key) is not None:
            for part in ("path", "fingerprint"):
                _check_type(path, f"{key}.{part}", state[key].get(part), (str,))
    for split in ("train", "val"):
        if "data" in state:
            _check_type(path, f"data.{split}", state["data"].get(split), (str,))
    if "progress" in state:
        _check_validations(path, state["progress"].get("validations"))
    if "optimizer" in state:
        _check_cursor(path, state["cursor"])
    for section in ("model", "training"):
        _check_type(path, f"config.{section}", state["config"].get(section), (dict,))
    if state.get("hf_config") is not None:
        _check_json(path, state["hf_config"])


def _check_type(path: Path, key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    types = tuple(kind for kind in allowed if isinstance(kind, type))
    if isinstance(value, types) or (value is None and None in allowed):
        return
    names = [kind.__name__ for kind in types] + ["null"] * (None in allowed)
    found = "null or missing" if value is None else type(value).__name__
    raise DamagedError((path, key), f"must be of type {' or '.join(names)}, got {found}", ANOTHER)


def _check_json(path: Path, text: str) -> None:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedError((path, "hf_config"), f"not JSON: {first_line(error)}", ANOTHER) from None
    _check_type(path, "hf_config", values, (dict,))


def _check_validations(path: Path, validations: Any) -> None:
    pairs = validations if isinstance(validations, list) else [None]
    for pair in pairs:
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or not all(isinstance(number, _NUMBER) for number in pair):
            problem = "must be pairs of a step and a loss"
            raise DamagedError((path, "progress.validations"), problem, ANOTHER)


def _check_cursor(path: Path, cursor: list[Any] | None) -> None:
    if cursor is not None:
        is_count = [isinstance(part, int) and 0 <= part <= _LARGEST_COUNT for part in cursor]
        if is_count != [True] * 5:  # `tokens.stream.Cursor`
            raise DamagedError((path, "cursor"), "must be five counts", ANOTHER)


def _is_plain(value: Any) -> bool:
    """Whether a value could be read from JSON."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(part) for key, part in value.items())
    if isinstance(value, list):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, str | int | float)


def _check_config(path: Path, state: dict[str, Any]) -> Config:
    if not _is_plain(state["config"]):
        raise DamagedError((path, "config"), "must be plain values with names", ANOTHER)
    try:
        config = Config.from_plain(state["config"])
    except ValidationError as invalid:
        found = explain(invalid.errors()[0], ())
        where = (path, *found.where)
        raise DamagedError(where, found.problem, OTHER_VERSION) from None
    if config.lora is not None and state["base"] is None:
        raise DamagedError((path, "base"), "missing, but this is an adapter", ANOTHER)
    return config


# --- weights ---


def _check_weights(path: Path, state: dict[str, Any], config: Config) -> None:
    weights, rounding = state["weights"], rounding_of(state)
    dtype = torch.float32 if rounding is None else torch.bfloat16
    for name, weight in weights.items():
        _check_tensor(path, "weights", name, weight, dtype)
    if rounding is not None:
        _check_rounded(path, state, config)
    elif config.lora is None and state["hf_config"] is None:
        model = _model_of_settings(path, config, state["stage"])
        _check_shapes(path, _shapes(weights), model)
    scales = [part for _, *scales in rounded_weights(state).values() for part in scales]
    for weight in [*weights.values(), *scales]:
        if not weight.isfinite().all():
            problem = "has weights that are not finite numbers; its training diverged"
            raise DamagedError(path, problem, "Use an earlier checkpoint")


_DTYPE_NAMES = {
    torch.float32: "32-bit floats",
    torch.bfloat16: "bf16 numbers",
    torch.int8: "8-bit integers",
    torch.uint8: "bytes",
}


def _check_tensor(path: Path, section: str, name: Any, weight: Any, dtype: torch.dtype) -> None:
    where = (path, section, name)
    if not isinstance(name, str) or not isinstance(weight, Tensor):
        raise DamagedError(where, "must be a tensor with a name", ANOTHER)
    is_plain = weight.layout == torch.strided and weight.device.type == "cpu"
    if not is_plain or weight.dtype != dtype:
        found = f"{weight.dtype}, {weight.layout}, {weight.device}"
        problem = f"must be a tensor of {_DTYPE_NAMES[dtype]}, got {found}"
        raise DamagedError(where, problem, ANOTHER)
    if weight.numel() * weight.element_size() > path.stat().st_size:
        # one number, repeated by its strides
        problem = f"has {weight.numel()} numbers, more than the file"
        raise DamagedError(where, problem, ANOTHER)


def _check_rounded(path: Path, state: dict[str, Any], config: Config) -> None:
    """Check the codes and scales of weights in 8 or 4 bits, and that these and the others are those
    of the model.
    """
    rounding = rounding_of(state)
    kinds = {
        "an adapter": config.lora is not None,
        "a Hugging Face model": state["hf_config"] is not None,
        "a verifier": state["stage"] == "verifier",
        "a reward model": state["stage"] == "reward_model",
    }
    for kind in kinds:
        if kinds[kind]:
            raise DamagedError((path, rounding), f"is not supported for {kind}", ANOTHER)
    model = _model_of_settings(path, config, state["stage"])
    names = set(models.rounded.rounded_names(model))
    for name in sorted(names ^ rounded_weights(state).keys(), key=str):
        problem = "missing weight" if name in names else "not a matrix of 8 or 4 bits"
        raise DamagedError((path, rounding, name), problem, ANOTHER)
    wanted = _shapes(model.state_dict())
    for key in ROUNDED:
        for name, matrix in state.get(key, {}).items():
            _check_matrix((path, key, name), matrix, wanted[name])
    found = {name: wanted[name] for name in names}
    if config.model.tie_embeddings:
        found["embedding.weight"] = wanted["embedding.weight"]
    _check_shapes(path, found | _shapes(state["weights"]), model)


def _check_matrix(where: tuple[Path, str, str], matrix: Any, shape: tuple[int, ...]) -> None:
    """Check the parts of a matrix of this shape in 8 or 4 bits."""
    path, key, name = where
    if key == "int4" and not models.rounded.has_groups(shape):
        raise DamagedError(where, f"a matrix of the shape {shape} cannot have 4 bits", ANOTHER)
    layout = models.rounded.layout(shape, ROUNDED[key])
    if not isinstance(matrix, tuple) or len(matrix) != len(layout):
        raise DamagedError(where, f"must be {', '.join(layout)}", ANOTHER)
    for part, (kind, (dtype, part_shape)) in zip(matrix, layout.items(), strict=True):
        _check_tensor(path, key, name, part, dtype)
        if not part.is_contiguous() or part.shape != part_shape:
            problem = f"must have {kind} of the shape {part_shape}, got {tuple(part.shape)}"
            raise DamagedError(where, problem, ANOTHER)


def _model_of_settings(path: Path, config: Config, stage: str) -> nn.Module:
    try:
        return empty_model(config.model, stage, config.verifier)
    except (UserError, ValueError, RuntimeError) as error:  # sizes that make no tensor
        problem = f"make no model: {first_line(error)}"
        raise DamagedError((path, "config.model"), problem, ANOTHER) from None


def _shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _check_shapes(path: Path, found: dict[str, tuple[int, ...]], model: nn.Module) -> None:
    wanted = _shapes(model.state_dict())
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) == found.get(name):
            continue
        if name not in found:
            problem = "missing weight"
        elif name not in wanted:
            problem = "not a weight of the model in its settings"
        else:
            problem = f"must have the shape {wanted[name]} of its settings, got {found[name]}"
        raise DamagedError((path, "weights", name), problem, ANOTHER)


def empty_model(
    config: ModelConfig, stage: str = "pretrain", verifier: VerifierConfig | None = None
) -> nn.Module:
    """The model of a stage, a decoder, verifier or reward model, on the meta device: shapes without
    numbers, for `load_state_dict(..., assign=True)`.
    """
    with torch.device("meta"), _NoInit():
        if stage == "verifier":
            kind = "encoder" if verifier is None else verifier.kind
            return models.verifier.verifier_class(kind)(config)
        if stage == "reward_model":
            return models.reward_model.RewardModel(config)
        return Decoder(config)


class _NoInit(TorchFunctionMode):
    """Leaves new weights unfilled: on the meta device, filling them imports torch's compiler
    (two seconds).
    """

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
