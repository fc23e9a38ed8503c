"""A checkpoint as a folder that transformers opens: weights, config, tokenizer,
chat template and model card.

`export_hf` writes it beside its final name, loads it through transformers' own Auto classes,
compares logits, token ids and text with ours, and only then renames it. What transformers cannot
express exactly is a UserError, never an approximation. `conversion` makes the model, `hf_tokenizer`
the tokenizer; `gguf` writes one file for other programs.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import Timeout

from tinylm.checkpoint.load import Loaded, load_model
from tinylm.common import files
from tinylm.common.errors import UserError, printable, require_package, write_error, writing
from tinylm.common.files import locked, remove, require_new
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import SamplingConfig
from tinylm.interchange import conversion
from tinylm.interchange.hf_tokenizer import (
    backend_of,
    chat_template,
    check_folder_tokenizer,
    end_ids,
    write_text,
    write_tokenizer,
)
from tinylm.interchange.peft import save_adapter
from tinylm.model.decoder import Decoder, count_parameters
from tinylm.model.hf_model import HFModel, HFSeq2Seq, quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUT = "the output path"  # for errors
SCRATCH = ".tinylm-export"
"""end of the name of an unfinished export"""


@dataclass(frozen=True)
class Exported:
    """The result of an export."""

    path: Path
    model_type: str
    difference: float
    """largest difference between our logits and those of the export;
    see `conversion.logit_difference`"""
    tokenizer_class: str = "AutoTokenizer"
    """the class of transformers that reads its tokenizer as it was written"""
    needs: dict[str, int] = field(default_factory=dict)
    """settings in a GGUF file that transformers does not read from it and must be given;
    other readers read them"""


def export_hf(ckpt: Path, out: Path) -> Exported:
    """Write the checkpoint `ckpt` as the new Hugging Face folder `out`, whole or not at all;
    an adapter is merged.

    Raises:
        UserError: transformers has no such architecture or tokenizer, `out` exists,
            or the logits differ.
    """
    require_package("transformers")
    from transformers import AutoModelForCausalLM

    require_new(out)
    loaded = load_model(ckpt)
    if isinstance(loaded.model, HFSeq2Seq):
        problem = "an encoder-decoder, of which only adapters can be exported, not the whole model"
        fix = "Tune it with a lora section, and export without --merge: peft merges the adapter"
        raise UserError(ckpt, problem, fix)
    backend, template = backend_of(loaded.tokenizer), chat_template(loaded)
    with quiet_transformers(), scratch_folder(out) as folder:
        # A Hugging Face model is written as it is, whatever its architecture.
        is_hf = isinstance(loaded.model, HFModel)
        theirs = loaded.model.inner if is_hf else conversion.to_hf(loaded.model)
        set_token_ids(theirs, loaded)
        model_type = theirs.config.model_type
        with writing(out, OUT):
            save_weights(theirs, folder, out)
            write_tokenizer(folder, backend, loaded, template)
        del theirs
        # Read it back.
        tokenizer_class = check_folder_tokenizer(folder, backend, loaded.tokenizer)
        written = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        difference = check_model(written, loaded.model)
        with writing(out, OUT):
            card = model_card(
                loaded, model_type, tokenizer_class, has_template=template is not None
            )
            write_text(folder / "README.md", card)
        publish(folder, out)
    return Exported(out, model_type, difference, tokenizer_class)


def export_adapter(ckpt: Path, out: Path) -> Path:
    """Write the adapter in the checkpoint `ckpt` as the new folder `out`, for peft,
    whole or not at all.

    Raises:
        UserError: peft is missing, the checkpoint has no adapter, or `out` exists.
    """
    require_package("peft")
    require_new(out)
    with scratch_folder(out) as folder:
        save_adapter(ckpt, folder)
        publish(folder, out)
    return out


def save_weights(theirs: PreTrainedModel, folder: Path, out: Path) -> None:
    """Write model.safetensors, config.json and generation_config.json."""
    from safetensors import SafetensorError

    try:
        theirs.save_pretrained(folder, max_shard_size="1000GB")
    except SafetensorError as error:  # for example, a full disk
        raise write_error(out, OUT, error) from None


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, so that a rename leads there; it is removed at the end,
    and by the next export into the folder of `out` if this one is killed.
    """
    with locked(out, OUT):
        require_new(out)  # another export may have made it while this one waited
        with writing(out, OUT):
            folder = out.with_name(f".{out.name}{SCRATCH}")
            remove(folder)
            remove_killed_exports(out.parent)
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_killed_exports(folder: Path) -> None:
    """Remove what killed exports left in `folder`; those whose lock is held are at work."""
    for scratch in folder.glob(f".*{SCRATCH}"):
        name = scratch.name.removeprefix(".").removesuffix(SCRATCH)
        with suppress(Timeout), locked(folder / name, OUT, timeout=0):
            remove(scratch)


def publish(made: Path, out: Path) -> None:
    """Rename a finished file or folder to `out`, readable for everyone:
    tempfile and safetensors make private ones.
    """
    with writing(out, OUT):
        for path in (*(made.iterdir() if made.is_dir() else ()), made):
            path.chmod(0o755 if path.is_dir() else 0o644)
        files.publish(made, out)


# --- token ids and sampling ---


def set_token_ids(theirs: PreTrainedModel, loaded: Loaded) -> None:
    """Set the ids that begin, end and pad a text, and our defaults of sampling."""
    from transformers import GenerationConfig

    tokenizer = loaded.tokenizer
    ends = end_ids(loaded)
    # EOS precedes every document here, so that an empty prompt is EOS;
    # a Hugging Face model keeps its own.
    is_hf = isinstance(loaded.model, HFModel)
    ids: dict[str, Any] = {
        "bos_token_id": theirs.config.bos_token_id if is_hf else tokenizer.eos_id,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }
    for name, value in ids.items():
        setattr(theirs.config, name, value)
    # The embedding of a padding id gets no gradient in transformers, so EOS must not be one.
    if tokenizer.pad_id != tokenizer.eos_id:
        theirs.config.pad_token_id = tokenizer.pad_id
    settings = sampling_settings(loaded.config.sampling)
    # Rows of the embedding without a token must not be sampled.
    unused = list(range(tokenizer.vocab_size, loaded.model.embedding.num_embeddings))
    if unused:
        settings["suppress_tokens"] = unused
    theirs.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_id, **settings)


def sampling_settings(sampling: SamplingConfig) -> dict[str, Any]:
    """Our settings of sampling under transformers' names.

    `stop` and `seed` do not exist in its files. `max_new_tokens` is left to the caller: in a file
    it outranks the `max_length` that a caller gives, so that it could exceed the context.
    """
    settings: dict[str, Any] = {
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram or 0,
        "num_beams": sampling.n_beams,
        "do_sample": sampling.temperature > 0 and sampling.n_beams == 1,
    }
    if settings["do_sample"]:
        settings["temperature"] = sampling.temperature
        settings["top_k"] = sampling.top_k or 0  # 0 is off; the default is 50
        settings["top_p"] = sampling.top_p or 1.0
        if sampling.min_p:
            settings["min_p"] = sampling.min_p
    return settings


# --- the model card ---


def model_card(loaded: Loaded, model_type: str, tokenizer_class: str, *, has_template: bool) -> str:
    """README.md: the model, its training data, and how to load it."""
    config, shape, info = loaded.config, loaded.model.config, loaded.info
    origin = f"{info.step:,} optimizer steps, {info.tokens:,} tokens"
    data = ", ".join(shown(name) for name in data_names(loaded))
    if info.step == 0:
        origin = f"weights imported from {shown(config.tokenizer.path or '')}"
        data = "not known"
    if config.training.init_from is not None:
        origin += f", from {shown(config.training.init_from.removeprefix(HF_PREFIX))}"
    val_loss = "not measured"
    if info.val_loss is not None:
        val_loss = f"{info.val_loss:.4f} nats a token"
    layers = f"{shape.n_layers} layers, width {shape.d_model}, {shape.n_heads} heads"
    rows = {
        "architecture": f"{model_type}: {layers}",
        "parameters": f"{count_parameters(loaded.model):,}",
        "context": f"{shape.max_seq_len:,} tokens",
        "tokenizer": f"{loaded.tokenizer.kind}, {loaded.tokenizer.vocab_size:,} tokens",
        "training": f"{info.stage}, {origin}",
        "data": data,
        "validation loss": val_loss,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    specials = "The name of a special token in a text is text (`split_special_tokens`)."
    ask = 'ids = tokenizer("Once", return_tensors="pt")["input_ids"]'
    if has_template:
        specials = (
            "Unlike in the trainer, the name of a special token in a message becomes that token: "
            "in text from strangers, replace such names first."
        )
        ask = (
            'ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], '
            'add_generation_prompt=True, return_tensors="pt")["input_ids"]'
        )
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
---

# A language model trained with Tiny Transformer

| | |
|---|---|
{table}

```python
from transformers import AutoModelForCausalLM, {tokenizer_class}

tokenizer = {tokenizer_class}.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
{ask}
print(tokenizer.decode(model.generate(ids)[0]))
```

Exported from a checkpoint in fp32, after comparing transformers' logits with the trainer's. No token is added before
a text. {specials}
"""


def data_names(loaded: Loaded) -> list[str]:
    """The data sets that the model was trained on."""
    data = loaded.config.data
    return [part.dataset for part in data.mix] if data.mix else [data.task or data.dataset]


def shown(name: str) -> str:
    """The name of a data set or model for strangers: on the hub, the whole name; of a path,
    only the last part.
    """
    is_path = Path(name).is_absolute() or Path(name).exists()
    return printable(Path(name).name if is_path else name).replace("|", "\\|")


# --- the check ---


def check_model(theirs: PreTrainedModel, ours: Decoder | HFModel) -> float:
    """The largest difference of logits; a UserError if it is too large."""
    difference = conversion.logit_difference(ours, theirs)
    if not difference <= conversion.TOLERANCE:  # also for NaN
        problem = f"the exported model's logits differ by {difference:.2g}, so it was removed"
        raise UserError("export", problem, "Please report the settings of this model")
    return difference
