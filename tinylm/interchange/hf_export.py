"""A checkpoint as a folder that transformers opens: weights, config, tokenizer,
chat template and model card.

`export_hf` writes it beside its final name, loads it through transformers' own Auto classes,
compares logits, token ids and text with ours, and only then renames it. What transformers cannot
express exactly is a UserError, never an approximation. `conversion` makes the model, `hf_tokenizer`
the tokenizer; `gguf` writes one file for other programs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import Timeout

from tinylm.checkpoint.format import read
from tinylm.checkpoint.info import info_of
from tinylm.checkpoint.load import Loaded, load_model, template_name
from tinylm.common import files
from tinylm.common.errors import UserError, require_package, write_error
from tinylm.common.files import locked, remove, require_new, writing
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import Config, ModelConfig, SamplingConfig
from tinylm.interchange import conversion
from tinylm.interchange.hf_tokenizer import (
    chat_template,
    check_folder_tokenizer,
    end_ids,
    write_text,
    write_tokenizer,
)
from tinylm.interchange.model_card import (
    FirstQuestion,
    adapter_card,
    first_question,
    model_card,
    shown,
)
from tinylm.interchange.peft import save_adapter
from tinylm.model.decoder import Decoder
from tinylm.model.growth import ADDED_ROWS
from tinylm.model.hf_model import HFModel, HFSeq2Seq, quiet_transformers
from tinylm.tokenizer.factory import tokenizer_from_plain

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
    question: FirstQuestion | None = None
    """a first question to it; None for GGUF"""
    gguf_config: ModelConfig | None = None
    """of the decoder in a GGUF file, as `gguf.read_gguf` takes it"""
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
    refuse_encoder_decoder(ckpt, loaded)
    template = chat_template(loaded.tokenizer, loaded.template)
    question = first_question(
        loaded.tokenizer, loaded.config, loaded.template, has_template=template is not None
    )
    with quiet_transformers(), scratch_folder(out) as folder:
        # A Hugging Face model is written as it is, whatever its architecture.
        is_hf = isinstance(loaded.model, HFModel)
        theirs = loaded.model.inner if is_hf else conversion.to_hf(loaded.model)
        set_token_ids(theirs, loaded)
        model_type = theirs.config.model_type
        with writing(out, OUT):
            save_weights(theirs, folder, out)
            write_tokenizer(
                folder,
                loaded.tokenizer,
                template,
                max_seq_len=loaded.model.config.max_seq_len,
            )
        del theirs
        # Read it back.
        tokenizer_class = check_folder_tokenizer(folder, loaded.tokenizer)
        written = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
        difference = check_model(written, loaded.model)
        with writing(out, OUT):
            card = model_card(loaded, model_type, tokenizer_class, question)
            write_text(folder / "README.md", card)
        publish(folder, out)
    return Exported(out, model_type, difference, tokenizer_class, question)


def refuse_encoder_decoder(ckpt: Path, loaded: Loaded) -> None:
    """Raise a UserError if the model is an encoder-decoder."""
    if isinstance(loaded.model, HFSeq2Seq):
        problem = "an encoder-decoder, of which only adapters can be exported, not the whole model"
        fix = "Tune it with a lora section, and export without --merge: peft merges the adapter"
        raise UserError(ckpt, problem, fix)


@dataclass(frozen=True)
class ExportedAdapter:
    """The result of the export of an adapter alone."""

    path: Path
    base: str
    """the model that it belongs to"""
    code: str
    """Python that loads the two and asks a first question, in the folder `path`"""


def export_adapter(ckpt: Path, out: Path) -> ExportedAdapter:
    """Write the adapter in the checkpoint `ckpt` as the new folder `out`, for peft,
    whole or not at all: with its tokenizer, chat template and card, but without its base.

    Raises:
        UserError: peft is missing, the checkpoint has no adapter, `out` exists,
            or transformers has no such tokenizer.
    """
    require_package("peft")
    require_package("transformers")
    require_new(out)
    state = read(ckpt)
    config, info = Config.from_plain(state["config"]), info_of(ckpt, state)
    tokenizer = tokenizer_from_plain(state["tokenizer"])
    name = template_name(config, info.stage)
    template = chat_template(tokenizer, name)
    question = first_question(tokenizer, config, name, has_template=template is not None)
    with quiet_transformers(), scratch_folder(out) as folder:
        save_adapter(ckpt, folder)
        with writing(out, OUT):
            write_tokenizer(folder, tokenizer, template, max_seq_len=config.model.max_seq_len)
        check_folder_tokenizer(folder, tokenizer)
        code = adapter_code(state, config, question, end_ids(tokenizer, name))
        with writing(out, OUT):
            write_text(folder / "README.md", adapter_card(config, info, code))
        publish(folder, out)
    base = (config.training.init_from or "").removeprefix(HF_PREFIX)
    return ExportedAdapter(out, base, code)


def adapter_code(
    state: dict[str, Any], config: Config, question: FirstQuestion, ends: list[int]
) -> str:
    """Python that loads an adapter on its base and asks a first question."""
    name = (config.training.init_from or "").removeprefix(HF_PREFIX)
    base = json.dumps(shown(name), ensure_ascii=False)
    rows = [len(weight) for name, weight in state["weights"].items() if name.endswith(ADDED_ROWS)]
    if state["hf_config"] is None:
        grown = ""
        if rows:
            n_tokens = tokenizer_from_plain(state["tokenizer"]).vocab_size
            new = f"range({n_tokens - rows[0]}, {n_tokens})"
            grown = "from tinylm.model.growth import grow_vocabulary\n\n"
            grown += f"grow_vocabulary(base, {new})  # the special tokens that were added\n"
        return f"""\
from pathlib import Path

import torch
from peft import PeftModel
from tinylm.checkpoint.load import load_model
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
base = load_model(Path({base})).model
{grown}model = PeftModel.from_pretrained(base, ".").eval()
ids = {question.ids_code}
for _ in range({question.max_new_tokens}):
    ids = torch.cat((ids, model(ids)[:, -1:].argmax(-1)), dim=1)
print(tokenizer.decode(ids[0]))"""
    grown = f"base.resize_token_embeddings({config.model.vocab_size})\n" if rows else ""
    auto, end_of_prompt = "AutoModelForCausalLM", ""
    if json.loads(state["hf_config"]).get("is_encoder_decoder"):
        auto = "AutoModelForSeq2SeqLM"
        end_of_prompt = (
            "ids = torch.cat((ids, torch.tensor([[tokenizer.eos_token_id]])), dim=1)"
            "  # the encoder reads the prompt and EOS\n"
        )
    settings = f"max_new_tokens={question.max_new_tokens}, eos_token_id={ends}"
    return f"""\
import torch
from peft import PeftModel
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
base = {auto}.from_pretrained({base})
{grown}model = PeftModel.from_pretrained(base, ".")
ids = {question.ids_code}
{end_of_prompt}print(tokenizer.decode(model.generate(input_ids=ids, {settings})[0]))"""


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
    ends = end_ids(tokenizer, loaded.template)
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

    `stop`, `seed`, `presence_penalty` and `frequency_penalty` do not exist in its files.
    `max_new_tokens` is left to the caller: in a file it outranks the `max_length` that a caller
    gives, so that it could exceed the context.
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


# --- the check ---


def check_model(theirs: PreTrainedModel, ours: Decoder | HFModel) -> float:
    """The largest difference of logits; a UserError if it is too large."""
    difference = conversion.logit_difference(ours, theirs)
    if not difference <= conversion.TOLERANCE:  # also for NaN
        problem = f"the exported model's logits differ by {difference:.2g}, so it was removed"
        raise UserError("export", problem, "Please report the settings of this model")
    return difference
