"""A Hugging Face model as a checkpoint of ours. Nothing in its folder is trusted, and nothing in it is run.

    name or folder ─▶ config.json ─▶ names, shapes and types of all tensors ─▶ weights ─▶ tokenizer ─▶ same logits? ─▶ .ckpt

Only safetensors are read, never pickled weights, and no code that a config names. Each step is checked before the next one
takes memory: what is read is no more than what the settings need, and that is no more than what is on the disk. `hf.py`
knows the architectures; this file knows folders.
"""

from __future__ import annotations

import json
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
from tinylm.common.errors import UserError, first_line, printable, reading, require_package
from tinylm.common.files import require_new
from tinylm.common.hub import hub_errors, is_hub_name, require_hub
from tinylm.config.schema import Config
from tinylm.interchange import architectures
from tinylm.model.decoder import Decoder
from tinylm.model.hf_model import quiet_transformers
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.hf_files import OLDER_VOCABULARIES, TOKENIZER_FILES, load_hf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", INDEX, "model-*.safetensors")
FILES = (*TOKENIZER_FILES, *OLDER_VOCABULARIES, *WEIGHT_FILES)
# A config has some kB, an index or header of the largest models here some hundred kB.
CONFIG_BYTES = 1_000_000
INDEX_BYTES = HEADER_BYTES = 10_000_000
FLOATS = ("F32", "F16", "BF16")
# Tables that older versions of transformers stored and that follow from the settings.
NOT_WEIGHTS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias)")
# What transformers raises for settings and files that it cannot use, beside StrictDataclassError.
NOT_LOADED = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,
    ZeroDivisionError,
)
MEND = "Give another model, or download it again."


@dataclass(frozen=True)
class Imported:
    """What became of a Hugging Face model."""

    path: Path
    model_type: str
    stored_as: str
    """types of its tensors; ours are F32"""
    difference: float
    """largest difference between our logits and transformers'; see `hf.logit_difference`"""
    config: Config


def import_hf(name: str, out: Path) -> Imported:
    """Write the checkpoint `out` with the weights, tokenizer and settings of the Hugging Face model `name`, a folder here or a name on the hub.

    Raises:
        UserError: naming what cannot be read, what our decoder cannot compute, or by how much the logits differ; nothing is written then.
    """
    require_package("transformers")
    if out.suffix != ".ckpt":
        raise UserError(f"{printable(out)}: a checkpoint's name ends in .ckpt. Give such a name.")
    require_new(out)
    folder = find_folder(name)
    theirs = read_config(folder)
    with quiet_transformers(), open_tensors(folder) as stored:
        model = read_model(folder, theirs, stored)
        stored_as = " and ".join(sorted({tensor.dtype for tensor in stored.values()}))
    tokenizer = read_tokenizer(folder)
    rows = model.embedding.num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"{printable(folder)}: its tokenizer has {tokenizer.vocab_size} tokens, and its embedding {rows} rows. {MEND}"
        )
    difference = architectures.logit_difference(model, load_theirs(folder, theirs))
    if not difference <= architectures.TOLERANCE:  # NaN is not
        raise UserError(
            f"{printable(folder)}: our logits differ from transformers' by {difference:.2g}, so it computes something that our decoder does not. "
            "Nothing was written. Choose another model."
        )
    config = Config.model_validate(
        {
            "model": model.config.model_dump(),
            "tokenizer": {"kind": "hf", "path": name},
            "training": {"seq_len": min(Config().training.seq_len, model.config.max_seq_len)},
        }
    )
    checkpoint_format.write(out, payload_of(config, tokenizer, model.state_dict()))
    return Imported(out, theirs.model_type, stored_as, difference, config)


def payload_of(
    config: Config, tokenizer: HFTokenizer, weights: dict[str, Tensor]
) -> dict[str, Any]:
    """A checkpoint of step 0: all that sampling, scoring, listing and `training.init_from` need, and no optimizer to resume with."""
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


# --- the folder -------------------------------------------------------------------------------------------------------


def find_folder(name: str) -> Path:
    """The folder `name`, or the one in the hub library's cache that holds the model of that name.

    Raises:
        UserError: there is none, the hub cannot be reached, or a file in it is a link that leads out of it.
    """
    if os.path.isdir(name):
        folder = Path(name)
    elif os.path.lexists(name) or not is_hub_name(name):
        found = "is not a folder" if os.path.lexists(name) else "not found"
        raise UserError(
            f"{printable(name)}: {found}. Give a folder with config.json and model.safetensors, or a Hugging Face name such as gpt2."
        )
    else:
        read_config(
            _download(name, ["*.json"])
        )  # what cannot be used is refused before its weights are fetched
        folder = _download(name, list(FILES))
    refuse_links_out(folder)
    return folder


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    mend = "Give a local folder with config.json and model.safetensors."
    require_hub(name, mend)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (*hub_errors(), ValueError) as error:
        raise UserError(
            f"{name}: not a folder here, and the Hugging Face hub says: {first_line(error)}. {mend}"
        ) from error


def refuse_links_out(folder: Path) -> None:
    """UserError where a file that would be read is a link to somewhere else; the hub library's own cache links within a model."""
    within = (
        folder.resolve().parents[1] if folder.resolve().parent.name == "snapshots" else folder
    ).resolve()
    for path in sorted(folder.iterdir()):
        if (
            path.is_symlink()
            and any(fnmatch(path.name, pattern) for pattern in FILES)
            and not path.resolve().is_relative_to(within)
        ):
            raise UserError(
                f"{printable(path)}: a link that leads out of the folder. Put the file itself there."
            )


# --- settings ---------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> PreTrainedConfig:
    """The settings in config.json, as transformers has them.

    Raises:
        UserError: it wants code to be run, the weights are not plain floats, or it is not a model.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    refuse_code(folder)
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{printable(folder)}: adapter_config.json: an adapter, which changes another model. Merge it into its base first."
        )
    file = folder / "config.json"
    if not file.exists():
        raise UserError(
            f"{printable(folder)}: no config.json here. Give the folder of a Hugging Face model."
        )
    values = read_json(file, CONFIG_BYTES)
    if values.get("quantization_config") is not None:
        raise UserError(
            f"{printable(file)}: quantization_config: its weights are packed, and only fp32, fp16 and bf16 are read. {MEND}"
        )
    names = sorted({architecture.model_type for architecture in architectures.ARCHITECTURES})
    if values.get("model_type") not in names:
        found = printable(json.dumps(values.get("model_type")))[:80]
        raise UserError(
            f"{printable(file)}: model_type: our decoder cannot be {found}. Choose a model of {', '.join(names)}."
        )
    try:
        with quiet_transformers():
            return AutoConfig.for_model(**values)
    except (*NOT_LOADED, StrictDataclassError) as error:
        raise UserError(
            f"{printable(file)}: transformers refuses it: {printable(' '.join(str(error).split()))[:200]}. {MEND}"
        ) from None


def refuse_code(folder: Path) -> None:
    """UserError where one of the JSON files names code of its own: it is never imported."""
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        if file.exists() and "auto_map" in read_json(file, CONFIG_BYTES):
            raise UserError(
                f"{printable(file)}: auto_map: the model wants its own code to be run, which is never done. Choose a model without."
            )


def read_json(file: Path, limit: int) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        UserError: it is none, or larger than `limit` bytes.
    """
    with reading(file):
        if not file.is_file():
            raise UserError(f"{printable(file)}: not a regular file. {MEND}")
        if file.stat().st_size > limit:
            raise UserError(
                f"{printable(file)}: {file.stat().st_size} bytes, and {limit} are the most that such a file has. {MEND}"
            )
        text = file.read_bytes()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{printable(file)}: not JSON, or cut off: {first_line(error)}. {MEND}"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{printable(file)}: expected a JSON object, found {type(value).__name__}. {MEND}"
        )
    return value


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """One tensor in a file, not read yet."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Stored]]:
    """All tensors in the folder by name, of which only names, types and shapes are read yet."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, Stored] = {}
    with ExitStack() as opened:
        for file in weight_files(folder):
            check_header(file)
            try:
                tensors = opened.enter_context(safe_open(file, framework="pt"))
                found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118  (not a dict)
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{printable(file)}: not safetensors, or damaged: {first_line(error)}. {MEND}"
                ) from None
            for name, part in found.items():
                if name in stored:
                    raise UserError(
                        f"{printable(file)}: {printable(name)}: {stored[name].file.name} has a tensor of that name too. {MEND}"
                    )
                stored[name] = Stored(
                    file,
                    part.get_dtype(),
                    tuple(part.get_shape()),
                    partial(tensors.get_tensor, name),
                )
        yield stored


def weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the files that the index of a divided model names."""
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if not (folder / INDEX).exists():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        found = (
            "only pickled weights here, which can run code and are never read"
            if pickled
            else f"no model.safetensors here, and no {INDEX}"
        )
        raise UserError(f"{printable(folder)}: {found}. Give a model with safetensors.")
    index = folder / INDEX
    places = read_json(index, INDEX_BYTES).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(
            f"{printable(index)}: weight_map: expected the file of each tensor by name. {MEND}"
        )
    names = sorted(set(places.values()))
    for name in names:
        if not re.fullmatch(r"model-[\w-]+\.safetensors", name, re.ASCII):
            raise UserError(
                f"{printable(index)}: weight_map: '{printable(name)[:80]}' is not a name such as model-00001-of-00002.safetensors. {MEND}"
            )
        if not (folder / name).exists():
            raise UserError(f"{printable(folder / name)}: not found, and {INDEX} names it. {MEND}")
    return [folder / name for name in names]


def check_header(file: Path) -> None:
    """UserError for a header that is larger than the file or than any model's: the library would take memory for it first."""
    with reading(file):
        if not file.is_file():
            raise UserError(f"{printable(file)}: not a regular file. {MEND}")
        with open(file, "rb") as opened:
            claimed = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
    if claimed > min(size, HEADER_BYTES):
        raise UserError(
            f"{printable(file)}: not safetensors, or damaged: its header of {claimed} bytes is more than {min(size, HEADER_BYTES)}. {MEND}"
        )


def read_model(folder: Path, theirs: PreTrainedConfig, stored: dict[str, Stored]) -> Decoder:
    """Our decoder with the weights in `stored`.

    Raises:
        UserError: naming the tensor that is missing, too many, of another shape or type than the settings say, or not finite.
    """
    model = architectures.our_config(theirs)
    n_experts = model.moe.n_experts if model.moe else 0
    try:
        shapes = architectures.their_shapes(theirs)
    except RuntimeError as error:  # torch, where a product of sizes passes 64 bits
        raise UserError(
            f"{printable(folder / 'config.json')}: its sizes make no tensor: {first_line(error)}. {MEND}"
        ) from None
    names = {name: architectures.stored_names(name, stored, n_experts) for name in shapes}
    for name, shape in shapes.items():
        # Where experts are stored one by one, (experts, rows, columns) is several times (rows, columns) in the files.
        by_expert = len(shape) == 3 and names[name] != (name,)
        expected = (shape[0] * shape[1] // len(names[name]), shape[2]) if by_expert else shape
        for part in names[name]:
            check_tensor(folder, part, expected, stored)
    left = stored.keys() - {part for parts in names.values() for part in parts}
    extra = sorted(name for name in left if not NOT_WEIGHTS.fullmatch(name))
    if model.tie_embeddings and extra == ["lm_head.weight"]:
        embedding, *_ = names.values()  # every table of modules begins with it
        check_tied(stored["lm_head.weight"], stored[embedding[0]])
    elif extra:
        more = f", as are {len(extra) - 1} more" if len(extra) > 1 else ""
        raise UserError(
            f"{printable(stored[extra[0]].file)}: {printable(extra[0])}: not part of a {theirs.model_type}{more}. {MEND}"
        )
    return architectures.from_weights(
        theirs,
        lambda name: torch.cat([read_finite(part, stored[part]) for part in names[name]]).view(
            shapes[name]
        ),
    )


def check_tensor(
    folder: Path, name: str, shape: tuple[int, ...], stored: dict[str, Stored]
) -> None:
    """UserError unless the tensor is there, of this shape and of a type that is read."""
    if name not in stored:
        raise UserError(
            f"{printable(folder)}: {printable(name)}: no such tensor in its files. {MEND}"
        )
    tensor = stored[name]
    where = f"{printable(tensor.file)}: {printable(name)}"
    if tensor.shape != shape:
        raise UserError(
            f"{where}: its shape is {list(tensor.shape)}, and config.json makes it {list(shape)}. {MEND}"
        )
    if tensor.dtype not in FLOATS:
        raise UserError(
            f"{where}: its type is {printable(tensor.dtype)}, and {', '.join(FLOATS)} are read. {MEND}"
        )


def check_tied(head: Stored, embedding: Stored) -> None:
    """UserError where a head that config.json calls the embedding is another matrix."""
    if head.shape != embedding.shape or not torch.equal(head.read(), embedding.read()):
        raise UserError(
            f"{printable(head.file)}: lm_head.weight: differs from the embedding, and config.json says tie_word_embeddings. {MEND}"
        )


def read_finite(name: str, tensor: Stored) -> Tensor:
    """The tensor in fp32; UserError where a number is not finite."""
    values = tensor.read().float()
    if not values.isfinite().all():
        raise UserError(
            f"{printable(tensor.file)}: {printable(name)}: has numbers that are not finite. {MEND}"
        )
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
        raise UserError(
            f"{printable(folder)}: transformers cannot load it: {first_line(error)}. {MEND}"
        ) from error


# --- tokenizer --------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> HFTokenizer:
    """The tokenizer in the folder."""
    try:
        return load_hf_tokenizer(str(folder))
    except UserError as error:
        raise UserError(str(error).removeprefix("tokenizer.path: ")) from None
