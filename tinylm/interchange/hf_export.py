"""A checkpoint as a folder that transformers opens: weights, settings, tokenizer, chat template and model card.

`export_hf` writes it beside its name, loads it back through transformers' own Auto classes, compares logits, token ids and
text with ours, and only then renames it. `hf.py` says which architecture; here stands what is around the weights. What
transformers cannot say exactly is a `UserError`, never an approximation. GGUF, one file for other programs, is gguf.py.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tinylm.checkpoint.load import Loaded, load_model
from tinylm.common.errors import UserError, first_line, printable, require_package, writing
from tinylm.common.files import require_new
from tinylm.common.hub import HF_PREFIX
from tinylm.config.schema import SamplingConfig
from tinylm.interchange import architectures
from tinylm.interchange.peft import save_adapter
from tinylm.model.decoder import Decoder, count_parameters
from tinylm.model.hf_model import HFModel, HFSeq2Seq, quiet_transformers
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import KNOWN_BOS_TOKENS
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import CHARACTER_OF_BYTE

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedModel


# Letters of several scripts, digits, runs of white space, half a word: what tokenizers disagree on.
SAMPLE = "The model's 3 tokens aren't 12345 words:\n\n\tnaïve Ünïcode, Ελληνικά, 東京 🙂  two  spaces \r\nand<|x|> an end"


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: Path
    model_type: str
    difference: float
    """largest difference between our logits and those of what was written; see `hf.logit_difference`"""
    tokenizer_class: str = "AutoTokenizer"
    """what of transformers reads its tokenizer as it is"""
    needs: dict[str, int] = field(default_factory=dict)
    """settings that stand in a GGUF file and that transformers has to be told all the same; other readers have not"""


def export_hf(ckpt: Path, out: Path) -> Exported:
    """Write the checkpoint `ckpt` as the new Hugging Face folder `out`, whole or not at all; an adapter is merged into its base.

    Raises:
        UserError: no architecture or tokenizer there says the same; `out` already exists; or what was written does not give our logits.
    """
    require_package("transformers")
    from transformers import AutoModelForCausalLM

    require_new(out)
    loaded = load_model(ckpt)
    if isinstance(loaded.model, HFSeq2Seq):
        told = "an encoder-decoder, whose adapters can be exported, and not the whole model"
        raise UserError(
            f"{printable(ckpt)}: {told}. Tune it with a lora section, and leave --merge out: peft merges what is written."
        )
    backend, template = backend_of(loaded.tokenizer), chat_template(loaded)
    with quiet_transformers(), scratch_beside(out) as folder:
        # A Hugging Face model is one already, of whatever architecture.
        theirs = with_token_ids(
            loaded.model.inner
            if isinstance(loaded.model, HFModel)
            else architectures.to_hf(loaded.model),
            loaded,
        )
        model_type = theirs.config.model_type
        with writing(out, "where it goes"):
            save_weights(theirs, folder, out)
            write_tokenizer(folder, backend, loaded, template)
        del theirs
        tokenizer_class = check_folder_tokenizer(folder, backend, loaded.tokenizer)
        difference = check_model(
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True
            ),
            loaded.model,
        )
        with writing(out, "where it goes"):
            write_text(
                folder / "README.md",
                model_card(loaded, model_type, tokenizer_class, has_template=template is not None),
            )
        publish(folder, out)
    return Exported(out, model_type, difference, tokenizer_class)


def export_adapter(ckpt: Path, out: Path) -> Path:
    """Write the adapter that the checkpoint `ckpt` holds as the new folder `out`, for peft, whole or not at all.

    Raises:
        UserError: peft is missing, the checkpoint holds no adapter, or `out` already exists.
    """
    require_package("peft")
    require_new(out)
    with scratch_beside(out) as folder:
        save_adapter(ckpt, folder)
        publish(folder, out)
    return out


def save_weights(theirs: PreTrainedModel, folder: Path, out: Path) -> None:
    """model.safetensors, config.json and generation_config.json."""
    from safetensors import SafetensorError

    try:
        theirs.save_pretrained(folder, max_shard_size="1000GB")
    except SafetensorError as error:  # a full disk, among others
        raise UserError(
            f"{printable(out)}: the weights could not be written: {first_line(error)}. Make room, or choose another folder."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Write a file whose line ends are the same everywhere."""
    path.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, from where a rename gets there; it is removed at the end."""
    with writing(out, "where it goes"):
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(made: Path, out: Path) -> None:
    """Give a finished file or folder its name, once it is on the disk."""
    with writing(out, "where it goes"):
        for path in (*(made.iterdir() if made.is_dir() else ()), made):
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
            path.chmod(
                0o755 if path.is_dir() else 0o644
            )  # what tempfile and safetensors make is for its owner alone
        made.rename(out)


# --- token ids and sampling -------------------------------------------------------------------------------------------


def with_token_ids(theirs: PreTrainedModel, loaded: Loaded) -> PreTrainedModel:
    """The model with the ids that open, end and fill a text, and with our defaults of sampling."""
    from transformers import GenerationConfig

    tokenizer = loaded.tokenizer
    ends = end_ids(loaded)
    # EOS opens every document here, so an empty prompt is EOS; a Hugging Face model keeps what it had.
    opening = theirs.config.bos_token_id if isinstance(loaded.model, HFModel) else tokenizer.eos_id
    ids: dict[str, Any] = {
        "bos_token_id": opening,
        "eos_token_id": ends if len(ends) > 1 else ends[0],
    }
    for name, value in ids.items():
        setattr(theirs.config, name, value)
    if (
        tokenizer.pad_id != tokenizer.eos_id
    ):  # a row called padding gets no gradient from transformers
        theirs.config.pad_token_id = tokenizer.pad_id
    beyond = list(
        range(tokenizer.vocab_size, loaded.model.embedding.num_embeddings)
    )  # rows that stand for nothing
    settings = sampling_settings(loaded.config.sampling) | (
        {"suppress_tokens": beyond} if beyond else {}
    )
    theirs.generation_config = GenerationConfig(**ids, pad_token_id=tokenizer.pad_id, **settings)
    return theirs


def sampling_settings(sampling: SamplingConfig) -> dict[str, Any]:
    """Our settings of sampling under transformers' names; `stop` and `seed` have no place in its files."""
    settings: dict[str, Any] = {
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "no_repeat_ngram_size": sampling.no_repeat_ngram or 0,
        "num_beams": sampling.n_beams,
        "do_sample": sampling.temperature > 0 and sampling.n_beams == 1,
    }
    if settings["do_sample"]:
        # top_k 0 is off; left out it would be 50
        settings |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
        }
        settings |= {"min_p": sampling.min_p} if sampling.min_p else {}
    return settings


# --- tokenizer --------------------------------------------------------------------------------------------------------


def backend_of(tokenizer: Tokenizer) -> Backend:
    """The same tokenizer as one of the `tokenizers` library that adds nothing to a text."""
    from tokenizers import Tokenizer as Backend

    if isinstance(tokenizer, ByteTokenizer):
        return byte_backend(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        return char_backend(tokenizer)
    assert isinstance(tokenizer, HFTokenizer), tokenizer.kind
    description = json.loads(tokenizer.to_plain()["tokenizer_json"])
    if Backend.from_str(json.dumps(description)).num_special_tokens_to_add(False):
        description["post_processor"] = (
            None  # it would open each text with a token that training has not shown the model
        )
    return Backend.from_str(json.dumps(description))


def byte_backend(tokenizer: ByteTokenizer) -> Backend:
    """Byte-level BPE that has no merge, so that each byte stays what it is."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(
        models.BPE({character: byte for byte, character in CHARACTER_OF_BYTE.items()}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([name for _, name in sorted(tokenizer.special_names.items())])
    return backend


def char_backend(tokenizer: CharTokenizer) -> Backend:
    """A vocabulary of words, where every word is a character."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocabulary = {character: id for id, character in enumerate(tokenizer.characters)}
    special = [
        name for id, name in sorted(tokenizer.special_names.items()) if id != tokenizer.unk_id
    ]
    vocabulary |= {name: len(vocabulary) + place for place, name in enumerate(special)}
    unknown = "<|unk|>"  # where it is no token of ours, a character that is not known is an error there too
    if tokenizer.unk_id is not None:
        vocabulary[unknown] = tokenizer.unk_id
    backend = Backend(models.WordLevel(vocabulary, unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(unknown, "\ufffd"), decoders.Fuse()])
    backend.add_special_tokens(special)
    return backend


def write_tokenizer(folder: Path, backend: Backend, loaded: Loaded, template: str | None) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template."""
    tokenizer = loaded.tokenizer
    eos, pad = tokenizer.special_names[tokenizer.eos_id], tokenizer.special_names[tokenizer.pad_id]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # what transformers 5 would write is unknown to older readers
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": loaded.model.config.max_seq_len,
    }
    write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    write_text(
        folder / "tokenizer_config.json", json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
    )
    if template is not None:
        write_text(folder / "chat_template.jinja", template)


# --- the templates of fine-tuning, in Jinja ---------------------------------------------------------------------------

# What each writes is what prompts.py writes. A user's message may have an `input` beside its `content`, as Alpaca's rows do.
# OPEN and CLOSE are put in place below: the token that opens a text, if the tokenizer has one, and the one that ends an answer.
_WHOLE = "(message.content + '\\n\\n' + message.input if message.input else message.content)"
_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_REQUEST = "Write a response that appropriately completes the request."

CHAT_TEMPLATES = {
    "instruction": """\
{{- OPEN }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '### Output: ' + message.content + '\\n' + CLOSE }}
    {%- else %}
        {{- '### ' + ('System' if message.role == 'system' else 'Instruction') + ': ' + message.content + '\\n' }}
        {%- if message.input %}
            {{- '### Input: ' + message.input + '\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '### Output:' }}
{%- endif %}
""",
    "alpaca": f"""\
{{{{- OPEN }}}}
{{%- for message in messages %}}
    {{%- if message.role == 'system' %}}
        {{{{- message.content + '\\n\\n' }}}}
    {{%- elif message.role == 'user' %}}
        {{%- if loop.first %}}
            {{{{- '{_ALPACA_TASK}' + (', paired with an input that provides further context' if message.input else '') + '. {_ALPACA_REQUEST}\\n\\n' }}}}
        {{%- elif messages[loop.index0 - 1].role == 'assistant' %}}
            {{{{- '\\n\\n' }}}}
        {{%- endif %}}
        {{{{- '### Instruction:\\n' + message.content + '\\n\\n' }}}}
        {{%- if message.input %}}
            {{{{- '### Input:\\n' + message.input + '\\n\\n' }}}}
        {{%- endif %}}
    {{%- else %}}
        {{{{- '### Response:\\n' + message.content + CLOSE }}}}
    {{%- endif %}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- '### Response:\\n' }}}}
{{%- endif %}}
""",
    "chatml": f"""\
{{{{- OPEN }}}}
{{%- for message in messages %}}
    {{{{- ('' if loop.first else '\\n') + '<|im_start|>' + message.role + '\\n' + {_WHOLE} + '<|im_end|>' }}}}
{{%- endfor %}}
{{%- if add_generation_prompt %}}
    {{{{- '\\n<|im_start|>assistant\\n' }}}}
{{%- endif %}}
""",
    "plain": f"""\
{{{{- OPEN }}}}
{{%- for message in messages %}}
    {{%- set before = messages[loop.index0 - 1] %}}
    {{%- if message.role == 'assistant' %}}
        {{%- set apart = (before.input or before.content)[-1:].isspace() or message.content[:1].isspace() %}}
        {{{{- ('' if apart else '\\n') + message.content + CLOSE }}}}
    {{%- else %}}
        {{{{- ('\\n' if not loop.first and before.role == 'system' else '') + {_WHOLE} }}}}
    {{%- endif %}}
{{%- endfor %}}
""",
}


def chat_template(loaded: Loaded) -> str | None:
    """The template that the checkpoint was fine-tuned with, in Jinja; else its tokenizer's own, if it has one."""
    tokenizer = loaded.tokenizer
    if loaded.template in (None, "chat_template"):
        return tokenizer.chat_template if isinstance(tokenizer, HFTokenizer) else None
    names = tokenizer.special_names.values() if isinstance(tokenizer, HFTokenizer) else ()
    opening = next((token for token in KNOWN_BOS_TOKENS if token in names), "")
    tokens = {"OPEN": opening, "CLOSE": tokenizer.special_names[end_ids(loaded)[0]]}
    source = CHAT_TEMPLATES[loaded.template]
    for place, token in tokens.items():
        source = source.replace(place, json.dumps(token))
    return source


def end_ids(loaded: Loaded) -> list[int]:
    """The tokens that end what the model writes: the one behind each answer it was tuned on, then the end of a text."""
    tokenizer = loaded.tokenizer
    return (
        list(make_template(loaded.template, tokenizer).stop_ids(tokenizer))
        if loaded.template
        else [tokenizer.eos_id]
    )


# --- the model card ---------------------------------------------------------------------------------------------------


def model_card(loaded: Loaded, model_type: str, tokenizer_class: str, *, has_template: bool) -> str:
    """README.md: what the model is, what it was trained on, how to load it."""
    config, shape, info = loaded.config, loaded.model.config, loaded.info
    origin = (
        f"weights imported from {shown(config.tokenizer.path or '')}"
        if info.step == 0
        else f"{info.step:,} optimizer steps, {info.tokens:,} tokens"
    )
    if config.training.init_from is not None:
        origin += f", from {shown(config.training.init_from.removeprefix(HF_PREFIX))}"
    rows = {
        "architecture": f"{model_type}: {shape.n_layers} layers, width {shape.d_model}, {shape.n_heads} heads",
        "parameters": f"{count_parameters(loaded.model):,}",
        "context": f"{shape.max_seq_len:,} tokens",
        "tokenizer": f"{loaded.tokenizer.kind}, {loaded.tokenizer.vocab_size:,} tokens",
        "training": f"{info.stage}, {origin}",
        "data": "not known"
        if info.step == 0
        else ", ".join(shown(name) for name in data_names(loaded)),
        "validation loss": "not measured"
        if info.val_loss is None
        else f"{info.val_loss:.4f} nats a token",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    ask = (
        'ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True, return_tensors="pt")["input_ids"]'
        if has_template
        else 'ids = tokenizer("Once", return_tensors="pt")["input_ids"]'
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

Exported from a checkpoint in fp32; transformers' logits were compared with the trainer's before this was written. No token is put before
a text. Unlike in the trainer, a text that spells a special token becomes that token.
"""


def data_names(loaded: Loaded) -> list[str]:
    """What the model was trained on."""
    data = loaded.config.data
    return [part.dataset for part in data.mix] if data.mix else [data.task or data.dataset]


def shown(name: str) -> str:
    """A data set or model as a stranger may see it: a name on the hub as it is, of a path the last part alone."""
    return printable(
        Path(name).name if Path(name).is_absolute() or Path(name).exists() else name
    ).replace("|", "\\|")


# --- the check --------------------------------------------------------------------------------------------------------


def check_folder_tokenizer(folder: Path, backend: Backend, ours: Tokenizer) -> str:
    """The class of transformers that reads the tokenizer in the folder as it is written.

    AutoTokenizer does, but for Qwen2 models: to those it gives Qwen2's own words whatever the files say.

    Raises:
        UserError: none does.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    name = "AutoTokenizer"
    if pieces_of(found.backend_tokenizer) != pieces_of(backend):
        found, name = (
            PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True),
            "PreTrainedTokenizerFast",
        )
    check_tokenizer(found, ours)
    return name


def pieces_of(backend: Backend) -> tuple[Any, ...]:
    """What decides how a tokenizer cuts a text: two that agree on a sample may differ on the next text."""
    description = json.loads(backend.to_str())
    words = json.dumps(description["pre_tokenizer"]).replace(
        '"trim_offsets": false', '"trim_offsets": true'
    )  # says nothing of ids
    return (
        description["normalizer"],
        words,
        description["model"]["type"],
        description["model"]["vocab"],
        description["model"].get("merges"),
    )


def check_model(theirs: PreTrainedModel, ours: Decoder | HFModel) -> float:
    """The largest difference of logits; UserError where it is too large."""
    difference = architectures.logit_difference(ours, theirs)
    if not difference <= architectures.TOLERANCE:  # NaN is not
        raise UserError(
            f"export: what was written gives logits that differ by {difference:.2g}, so it was removed. Please report this model's settings."
        )
    return difference


def check_tokenizer(theirs: Any, ours: Tokenizer) -> None:
    """UserError where transformers' tokenizer makes other ids of a sample text, or another text of them."""
    text = sample_text(ours)
    expected = ours.encode(text)
    found = theirs(text)["input_ids"]
    if found != expected:
        place = next(
            (n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
            min(len(found), len(expected)),
        )
        raise UserError(
            f"tokenizer: transformers makes other tokens of a text than this one (token {place} of {len(expected)}), so nothing was exported. "
            "Train with another tokenizer."
        )
    if theirs.decode(found, skip_special_tokens=True) != ours.decode(expected):
        raise UserError(
            "tokenizer: transformers makes another text of the same tokens, so nothing was exported. Train with another tokenizer."
        )


def sample_text(tokenizer: Tokenizer) -> str:
    """A text that shows how a tokenizer works; for one of characters, all that it has."""
    if not isinstance(tokenizer, CharTokenizer):
        return SAMPLE
    return tokenizer.characters + "".join(
        c for c in SAMPLE if tokenizer.unk_id is not None or c in tokenizer.characters
    )
