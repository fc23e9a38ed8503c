"""Hugging Face models from their files: found here or on the hub, checked, and built.

    folder or hub name ─▶ config.json, checked ─▶ safetensors, checked ─▶ HFModel, or HFSeq2Seq for T5 and others

Files are not trusted. Weights are read from safetensors only, no code of a model's author is ever
run, and every name, shape and type is compared with config.json before memory is allocated. A model
that does not generate text is an error. `find_hf_model` opens a model's files; `rebuild_hf_model`
makes one from a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinylm.common.errors import UserError, first_line, is_out_of_memory, no_folder, require_package
from tinylm.common.files import require_regular
from tinylm.common.hub import download, is_hub_name, read_json
from tinylm.config.schema import ModelConfig
from tinylm.model.hf_model import (
    HFModel,
    HFSeq2Seq,
    model_sizes,
    quiet_transformers,
    require_plain_head,
)
from tinylm.tokenizer.hf_files import OLDER_VOCABULARIES, TOKENIZER_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", "model*.safetensors", INDEX)
JSON_BYTES_LIMIT = 50_000_000  # the index of the largest published models has some megabytes
WEIGHT_TYPES = ("F64", "F32", "F16", "BF16")
# Keys of config.json that would make transformers run or fetch something other
# than its own model code.
REFUSED_KEYS = {
    "auto_map": "requires running code of its author, which this program never does",
    "quantization_config": "its weights are quantized, but training needs full precision",
}
# The end of the keys that choose among implementations: attn_implementation, experts_implementation.
IMPLEMENTATION = ("_implementation", "_implementation_internal")
# What the classes of transformers raise for odd settings: sizes that make no tensor, names that are
# in no table, numbers in place of text.
ODD_SETTINGS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
)
ANOTHER = "Choose another model"
GIVE_A_FOLDER = "Give a local folder with config.json and model.safetensors"
AGAIN = "Download it again"
BOTH_AGAIN = "Download config.json and the weights again"


# --- find ---


@dataclass(frozen=True)
class HFModelFiles:
    """A Hugging Face model on disk, its config read and checked, its weights not read yet."""

    folder: Path
    config: PreTrainedConfig

    @property
    def sizes(self) -> ModelConfig:
        """Its sizes in our names."""
        return model_sizes(self.config)

    def load(self) -> HFModel:
        """The model in fp32.

        Raises:
            UserError: naming the file, and the tensor that is damaged, missing,
                unexpected or of another shape.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        weights: dict[str, Tensor] = {}
        for file in self._weight_files():
            require_regular(file)
            try:
                _check_types(file)
                weights |= load_file(file)
            except (SafetensorError, OSError) as error:
                problem = f"not valid safetensors: {first_line(error)}"
                raise UserError(file, problem, AGAIN) from None
        return _assemble(self.config, weights, self.folder)

    def _weight_files(self) -> list[Path]:
        """The files with the weights: one, or those that an index names."""
        single, index = self.folder / "model.safetensors", self.folder / INDEX
        if single.exists():
            return [single]
        if not index.exists():
            fix = "Convert the weights to safetensors: other formats are not read"
            raise UserError(self.folder, "no model.safetensors", fix)
        shards = read_json(index, AGAIN, JSON_BYTES_LIMIT).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise UserError((index, "weight_map"), "must be an object from tensor to file", AGAIN)
        for name in shards.values():
            _require_file_name(name, index)
        return [self.folder / name for name in sorted(set(shards.values()))]


def _require_file_name(name: object, index: Path) -> None:
    """Raise a UserError unless `name` is that of a safetensors file in the same folder."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
        problem = f"must be the name of a safetensors file beside it, got {name!r:.80}"
        raise UserError((index, "weight_map"), problem, "Do not use this model")


def find_hf_model(name: str) -> HFModelFiles:
    """The model in the folder `name` or, if no file has that name, on the Hugging Face hub.

    Raises:
        UserError: it is missing, or it does not generate text,
            or cannot be read without its author's code.
    """
    require_package("transformers")
    require_folder_or_hub_name(name)
    if os.path.isdir(name):
        folder = Path(name)
    else:
        patterns = (*MODEL_FILES, *TOKENIZER_FILES, *OLDER_VOCABULARIES)
        folder = download(name, patterns, name, GIVE_A_FOLDER)
    if (folder / "adapter_config.json").exists():
        problem = "an adapter, not a whole model"
        raise UserError(folder, problem, "Give the model that it was trained on")
    file = folder / "config.json"
    if not file.exists():
        raise UserError(folder, "no config.json", "Give the folder of a Hugging Face model")
    return HFModelFiles(folder, _read_config(read_json(file, AGAIN, JSON_BYTES_LIMIT), file))


def require_folder_or_hub_name(name: str) -> None:
    """Raise a UserError unless `name` is a folder, or is no file and can be a name on the hub."""
    if os.path.isdir(name):
        return
    exists = os.path.lexists(name)
    if exists or not is_hub_name(name):
        problem = no_folder(name)
        fix = (
            "Give a folder with config.json and model.safetensors, "
            "or a Hugging Face name such as gpt2"
        )
        raise UserError(name, problem, fix)


# --- from config and weights to a model ---


def rebuild_hf_model(settings: str, weights: Mapping[str, Tensor]) -> HFModel:
    """The model in a checkpoint, from `HFModel.settings` and the weights
    by the names of `HFModel.state_dict`.
    """
    require_package("transformers")
    inner = {name.removeprefix("inner."): weight for name, weight in weights.items()}
    return _assemble(
        _read_config(json.loads(settings), "hf_config of the checkpoint"), inner, "the checkpoint"
    )


def plain_settings(values: dict[str, Any], where: object) -> dict[str, Any]:
    """The settings in a config.json without those that name an implementation: transformers would
    look for one of another name on the hub. Also in the configs inside of it, as `text_config`.

    Raises:
        UserError: a setting needs code, or weights, that are never read.
    """
    plain = {}
    for key, value in values.items():
        if key in REFUSED_KEYS and value is not None:
            raise UserError((where, key), REFUSED_KEYS[key], ANOTHER)
        if not key.endswith(IMPLEMENTATION):
            plain[key] = plain_settings(value, where) if isinstance(value, dict) else value
    return plain


def _read_config(values: dict[str, Any], where: object) -> PreTrainedConfig:
    """The settings as transformers has them, of a model that its own code can build."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import (
        CONFIG_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        AutoConfig,
    )

    values = plain_settings(values, where)
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        problem = f"no model of the installed transformers, got {json.dumps(kind)[:80]}"
        fix = "Choose a model such as GPT-2, Llama, Qwen2 or T5, or update transformers"
        raise UserError((where, "model_type"), problem, fix)
    settings = {key: value for key, value in values.items() if key != "model_type"}
    try:
        with quiet_transformers():
            config = AutoConfig.for_model(kind, **settings)
    except (StrictDataclassError, *ODD_SETTINGS) as error:
        problem = f"transformers cannot read it: {first_line(error)}"
        raise UserError(where, problem, "Choose another model, or download it again") from None
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder:
        mapping = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        for key in ("decoder_start_token_id", "eos_token_id"):
            if config.to_dict().get(key) is None:
                raise UserError((where, key), "missing; an encoder-decoder needs it", AGAIN)
    if type(config) not in mapping:
        problem = f"must be a model that generates text, got {kind}"
        fix = "Choose one, such as GPT-2, Llama, Qwen2 or T5"
        raise UserError((where, "model_type"), problem, fix)
    model_sizes(config, str(where))
    return config


def _check_types(file: Path) -> None:
    """Raise a UserError for tensors that cannot be weights, from the file's header alone."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            dtype = opened.get_slice(name).get_dtype()
            if dtype not in WEIGHT_TYPES:
                problem = f"type must be one of {', '.join(WEIGHT_TYPES)}, got {dtype}"
                raise UserError((file, name), problem, ANOTHER)


def _assemble(config: PreTrainedConfig, weights: Mapping[str, Tensor], where: object) -> HFModel:
    """The model with exactly these weights, in fp32, in training mode like a new `Decoder`."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto_class, wrapper = AutoModelForCausalLM, HFModel
    if config.is_encoder_decoder:
        auto_class, wrapper = AutoModelForSeq2SeqLM, HFSeq2Seq
    with quiet_transformers():
        with _odd_settings("build", where):
            empty, attention = _empty_model(auto_class, config)
        # Compared first: a config.json alone could make transformers allocate all memory.
        n_wanted = sum(weight.numel() for weight in empty.parameters())
        n_found = sum(weight.numel() for weight in weights.values())
        if n_wanted > n_found:
            problem = f"config.json needs {n_wanted:,} weights, but the files have {n_found:,}"
            problem += _first_difference(empty, weights)
            raise UserError(where, problem, BOTH_AGAIN)
        with _odd_settings("load", where):
            inner, report = type(empty).from_pretrained(
                None,
                config=config,
                state_dict=dict(weights),
                attn_implementation=attention,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    _check_report(report, where)
    for name, weight in inner.named_parameters():
        if not weight.isfinite().all():
            raise UserError((where, name), "has non-finite numbers", BOTH_AGAIN)
        weight.data = weight.data.clone()  # the mapped file may be replaced
        weight.requires_grad_(True)
    model = wrapper(inner.train())
    # settings that do not fit together, such as more experts per token than experts
    with _odd_settings("compute", where):
        require_plain_head(model, where)
    return model


@contextmanager
def _odd_settings(what: str, where: object) -> Iterator[None]:
    """Turn what transformers raises for odd settings into a UserError that names config.json."""
    try:
        yield
    except ODD_SETTINGS as error:
        if is_out_of_memory(error):
            raise
        problem = f"transformers cannot {what} it: {type(error).__name__}: {first_line(error)}"
        raise UserError((where, "config.json"), problem, ANOTHER) from None


def _empty_model(auto_class: Any, config: PreTrainedConfig) -> tuple[PreTrainedModel, str]:
    """The model on the meta device, and its attention: torch's fused one,
    or the eager one where transformers refuses that (GPT-Neo, Gemma 2, gpt-oss).

    Named in either case, because config.json may name another, whose code would be downloaded.
    """
    with torch.device("meta"):
        try:
            return auto_class.from_config(config, attn_implementation="sdpa"), "sdpa"
        except ValueError:
            return auto_class.from_config(config, attn_implementation="eager"), "eager"


def _first_difference(empty: PreTrainedModel, weights: Mapping[str, Tensor]) -> str:
    """`: ` and the first weight that the files lack or have in another shape; else nothing.

    Names may begin with that of the part which all models of a kind share (`transformer.`).
    """
    prefix = f"{empty.base_model_prefix}."
    for name, weight in empty.named_parameters():
        found = weights.get(name, weights.get(name.removeprefix(prefix)))
        if found is None:
            return f": {name} is missing"
        if found.shape != weight.shape:
            return f": {name} must be {list(weight.shape)}, got {list(found.shape)}"
    return ""


def _check_report(report: dict[str, Any], where: object) -> None:
    """Raise a UserError if transformers reports a weight that does not fit."""
    for key, problem in (
        ("missing_keys", "missing weight"),
        ("unexpected_keys", "unexpected weight"),
        ("mismatched_keys", "weight of another shape than in config.json"),
    ):
        names = [name if isinstance(name, str) else name[0] for name in report[key]]
        if names:
            raise UserError((where, min(names)), problem, BOTH_AGAIN)
