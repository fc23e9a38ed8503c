"""A Hugging Face model as a checkpoint. Nothing in its folder is trusted, and no code in it is run.

    folder or hub name ─▶ config.json ─▶ names, shapes, types of all tensors ─▶ weights ─▶ tokenizer ─▶ .ckpt

Only safetensors are read, never pickled weights. Each step is checked before the next one allocates
memory: no more is read than the settings need, and they need no more than is on the disk.
`conversion` makes the decoder.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylm.checkpoint import format as checkpoint_format
from tinylm.common.errors import UserError, first_line, require_package
from tinylm.common.files import open_regular, reading, require_new
from tinylm.common.hub import download, read_json
from tinylm.config.schema import Config
from tinylm.interchange import architectures, conversion
from tinylm.model.decoder import Decoder
from tinylm.model.hf_files import (
    AGAIN,
    GIVE_A_FOLDER,
    INDEX,
    find_hf_model,
    plain_settings,
    require_folder_or_hub_name,
)
from tinylm.model.hf_model import quiet_transformers
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import OLDER_VOCABULARIES, TOKENIZER_FILES, load_hf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


WEIGHT_FILES = ("model.safetensors", INDEX, "model-*.safetensors")
FILES = (*TOKENIZER_FILES, *OLDER_VOCABULARIES, *WEIGHT_FILES)
JSON_FILES = ("config.json", "tokenizer_config.json", "generation_config.json")
# A config has some kB, an index or header of the largest models here some hundred kB.
CONFIG_BYTES = 1_000_000
INDEX_BYTES = HEADER_BYTES = 10_000_000
FLOATS = ("F32", "F16", "BF16")
# Tables that older versions of transformers stored and that follow from the settings.
NOT_WEIGHTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
# What transformers raises for settings and files that it cannot use, besides StrictDataclassError.
NOT_LOADED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ZeroDivisionError,
)
FIX = "Give another model, or download it again"


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    path: Path
    model_type: str
    stored_as: str
    """types of its tensors; ours are F32"""
    difference: float
    """largest difference between our logits and transformers'; see `conversion.logit_difference`"""
    config: Config


def import_hf(name: str, out: Path) -> Imported:
    """Write the Hugging Face model `name`, a folder or a name on the hub, as the checkpoint `out`.

    Raises:
        UserError: it cannot be read, our decoder cannot compute it, or the logits differ;
            nothing is written.
    """
    require_package("transformers")
    if out.suffix != ".ckpt":
        raise UserError(out, "the name of a checkpoint must end in .ckpt")
    require_new(out)
    folder = find_folder(name)
    theirs = read_config(folder, name)
    with quiet_transformers(), open_tensors(folder) as stored:
        model = read_model(folder, theirs, stored)
        stored_as = " and ".join(sorted({tensor.dtype for tensor in stored.values()}))
    tokenizer = read_tokenizer(folder)
    n_rows = model.embedding.num_embeddings
    if tokenizer.vocab_size > n_rows:
        problem = (
            f"its tokenizer has {tokenizer.vocab_size} tokens, but its embedding {n_rows} rows"
        )
        raise UserError(folder, problem, FIX)
    difference = conversion.logit_difference(model, load_theirs(folder, theirs))
    if not difference <= conversion.TOLERANCE:  # also for NaN
        problem = (
            f"our logits differ from transformers' by {difference:.2g}: it computes something "
            "that our decoder does not; nothing was written"
        )
        raise UserError(folder, problem, "Choose another model")
    config = Config.model_validate(
        {
            "model": model.config.model_dump(),
            "tokenizer": {"kind": "hf", "path": name},
            "training": {"seq_len": min(Config().training.seq_len, model.config.max_seq_len)},
        }
    )
    state = imported_state(config, tokenizer, model.state_dict())
    checkpoint_format.write(out, state, "OUT.ckpt")
    return Imported(out, theirs.model_type, stored_as, difference, config)


def imported_state(
    config: Config, tokenizer: HFTokenizer, weights: dict[str, Tensor]
) -> dict[str, Any]:
    """The state of a checkpoint of step 0, without an optimizer: it cannot be resumed,
    but a run can start from it.
    """
    import transformers

    return {
        "format": checkpoint_format.FORMAT,
        "schema": checkpoint_format.SCHEMA,
        "stage": "pretrain",
        "step": 0,
        "tokens": 0,
        "train_loss": None,
        "val_loss": None,
        "created": time.time(),
        "config": config.to_plain(),
        "tokenizer": tokenizer.to_plain(),
        "weights": weights,
        "data": {"train": "not known", "val": "not known"},
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
    }


# --- the folder ---


def find_folder(name: str) -> Path:
    """The folder `name`, or the one in the hub library's cache that has the model of that name.

    Raises:
        UserError: it is missing, the hub cannot be reached,
            or a file in it is a link that leads out of it.
    """
    require_folder_or_hub_name(name)
    if os.path.isdir(name):
        folder = Path(name)
    else:
        # checked before the weights are downloaded
        read_config(download(name, ["*.json"], name, GIVE_A_FOLDER), name)
        folder = download(name, FILES, name, GIVE_A_FOLDER)
    refuse_links_out(folder)
    return folder


def refuse_links_out(folder: Path) -> None:
    """Raise a UserError if a file that would be read is a link out of the folder,
    or out of the model's hub cache.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parents[1]
    for path in sorted(folder.iterdir()):
        is_read = any(fnmatch(path.name, pattern) for pattern in FILES)
        if is_read and path.is_symlink() and not path.resolve().is_relative_to(root):
            raise UserError(path, "a link out of the folder", "Put the file itself there")


# --- settings ---


def read_config(folder: Path, name: str) -> PreTrainedConfig:
    """The settings in config.json, as transformers has them, of the model `name`.

    Raises:
        UserError: it requires running code, its weights are not plain floats,
            or it is not a model of ours.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    refuse_code(folder)
    if (folder / "adapter_config.json").exists():
        problem = "an adapter, not a whole model"
        raise UserError((folder, "adapter_config.json"), problem, "Merge it into its base first")
    file = folder / "config.json"
    if not file.exists():
        raise UserError(folder, "no config.json", "Give the folder of a Hugging Face model")
    values = read_json(file, AGAIN, CONFIG_BYTES)
    if values.get("quantization_config") is not None:
        problem = "its weights are quantized, but must be fp32, fp16 or bf16"
        raise UserError((file, "quantization_config"), problem, FIX)
    names = {architecture.model_type for architecture in architectures.ARCHITECTURES}
    if str(values.get("model_type")) not in names:
        problem = architectures.unsupported(values.get("model_type"))
        raise UserError((file, "model_type"), problem, another_way(folder, name))
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(**plain_settings(values, file))
    except (*NOT_LOADED, StrictDataclassError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(file, f"transformers cannot read it: {why}", FIX) from None
    try:
        conversion.our_config(config)
    except UserError as error:
        where = (file, *error.where[1:])
        raise UserError(where, error.problem, another_way(folder, name)) from None
    return config


def another_way(folder: Path, name: str) -> str:
    """What to do with a model that our decoder cannot compute: fine-tuning may take it as it is."""
    try:
        find_hf_model(str(folder))
    except UserError:
        return "Choose another model"
    return f"Fine-tune it as it is, without import: training.init_from=hf:{name}"


def refuse_code(folder: Path) -> None:
    """Raise a UserError if one of the JSON files names code of its own: it is never imported."""
    for name in JSON_FILES:
        file = folder / name
        if file.exists() and "auto_map" in read_json(file, AGAIN, CONFIG_BYTES):
            problem = "requires running code of its author, which this program never does"
            raise UserError((file, "auto_map"), problem, "Choose another model")


# --- weights ---


@dataclass(frozen=True)
class Stored:
    """One tensor in a file, not read yet."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Stored]]:
    """All tensors in the folder by name; only names, types and shapes are read."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Stored] = {}
    with ExitStack() as opened:
        for file in weight_files(folder):
            check_header(file)
            try:
                tensors = opened.enter_context(safe_open(file, framework="pt"))
                found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (not a dict)
            except (SafetensorError, OSError) as error:
                problem = f"not valid safetensors: {first_line(error)}"
                raise UserError(file, problem, FIX) from None
            for name, part in found.items():
                if name in stored:
                    problem = f"{stored[name].file.name} also has a tensor of this name"
                    raise UserError((file, name), problem, FIX)
                read = partial(tensors.get_tensor, name)
                stored[name] = Stored(file, part.get_dtype(), tuple(part.get_shape()), read)
        yield stored


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index of a sharded model names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    index = folder / INDEX
    if not index.exists():
        problem = f"no model.safetensors and no {INDEX}"
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            problem = "has only pickled weights, which can run code and are never read"
        raise UserError(folder, problem, "Give a model with safetensors")
    shards = read_json(index, AGAIN, INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError((index, "weight_map"), "must be an object from tensor to file", FIX)
    names = sorted(set(shards.values()))
    for name in names:
        if not re.fullmatch(r"model-[\w-]+\.safetensors", name, re.ASCII):
            problem = f"must be a name such as model-00001-of-00002.safetensors, got {name!r:.80}"
            raise UserError((index, "weight_map"), problem, FIX)
        if not (folder / name).exists():
            raise UserError(folder / name, f"not found, but {INDEX} names it", FIX)
    return [folder / name for name in names]


def check_header(file: Path) -> None:
    """Raise a UserError if the header is too large: the library would allocate memory for it."""
    with reading(file), open_regular(file) as opened:
        n_bytes = int.from_bytes(opened.read(8), "little")
        limit = min(file.stat().st_size, HEADER_BYTES)
    if n_bytes > limit:
        problem = f"not valid safetensors: its header of {n_bytes} bytes is more than {limit}"
        raise UserError(file, problem, FIX)


def read_model(folder: Path, theirs: PreTrainedConfig, stored: dict[str, Stored]) -> Decoder:
    """Our decoder with the weights in `stored`.

    Raises:
        UserError: naming the tensor that is missing, unexpected, not finite,
            or of another shape or type.
    """
    model = conversion.our_config(theirs)
    n_experts = model.moe.n_experts if model.moe else 0
    try:
        shapes = conversion.their_shapes(theirs)
    except RuntimeError as error:  # torch: a product of sizes that does not fit in 64 bits
        problem = f"its sizes make no tensor: {first_line(error)}"
        raise UserError(folder / "config.json", problem, FIX) from None
    names = {name: conversion.stored_names(name, stored, n_experts) for name in shapes}
    for name, shape in shapes.items():
        # If experts are stored one by one, (experts, rows, columns) is several times
        # (rows, columns) in the files.
        by_expert = len(shape) == 3 and names[name] != (name,)
        expected = (shape[0] * shape[1] // len(names[name]), shape[2]) if by_expert else shape
        for part in names[name]:
            check_tensor(folder, part, expected, stored)
    used = {part for parts in names.values() for part in parts}
    extra = sorted(name for name in stored.keys() - used if not NOT_WEIGHTS.fullmatch(name))
    if model.tie_embeddings and extra == ["lm_head.weight"]:
        embedding, *_ = names.values()  # every table of modules begins with it
        check_tied(stored["lm_head.weight"], stored[embedding[0]])
    elif extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        problem = f"not part of a {theirs.model_type}{more}"
        raise UserError((stored[extra[0]].file, extra[0]), problem, FIX)

    def weight(name: str) -> Tensor:
        parts = [read_finite(part, stored[part]) for part in names[name]]
        return torch.cat(parts).view(shapes[name])

    return conversion.from_weights(theirs, weight)


def check_tensor(
    folder: Path, name: str, shape: tuple[int, ...], stored: dict[str, Stored]
) -> None:
    """Raise a UserError unless the tensor exists, with this shape and a type that is read."""
    if name not in stored:
        raise UserError((folder, name), "missing tensor", FIX)
    tensor = stored[name]
    if tensor.shape != shape:
        problem = f"shape must be {list(shape)} according to config.json, got {list(tensor.shape)}"
        raise UserError((tensor.file, name), problem, FIX)
    if tensor.dtype not in FLOATS:
        problem = f"type must be one of {', '.join(FLOATS)}, got {tensor.dtype}"
        raise UserError((tensor.file, name), problem, FIX)


def check_tied(head: Stored, embedding: Stored) -> None:
    """Raise a UserError if config.json ties the head to the embedding, but it is another matrix."""
    if head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
        problem = "differs from the embedding, but config.json has tie_word_embeddings"
        raise UserError((head.file, "lm_head.weight"), problem, FIX)


def read_finite(name: str, tensor: Stored) -> Tensor:
    """The tensor in fp32; a UserError if a number in it is not finite."""
    values = tensor.read().float()
    if not values.isfinite().all():
        raise UserError((tensor.file, name), "has non-finite numbers", FIX)
    return values


def load_theirs(folder: Path, theirs: PreTrainedConfig) -> Any:
    """The model as transformers reads it from the folder."""
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(
                folder,
                config=theirs,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except NOT_LOADED as error:
        problem = f"transformers cannot load it: {first_line(error)}"
        raise UserError(folder, problem, FIX) from error


# --- tokenizer ---


def read_tokenizer(folder: Path) -> HFTokenizer:
    """The tokenizer in the folder."""
    try:
        return load_hf_tokenizer(str(folder))
    except UserError as error:
        # the folder is what the user typed, not a setting
        where = tuple(part for part in error.where if part != "tokenizer.path")
        raise UserError(where, error.problem, error.fix) from None
