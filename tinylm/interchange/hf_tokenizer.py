"""A tokenizer and its chat template as files of transformers.

    Tokenizer ─ backend_of ─▶ tokenizer of the `tokenizers` library, which adds nothing to a text
    name   ─ chat_template ─▶ the template of its fine-tuning, in Jinja

`check_folder_tokenizer` and `check_tokenizer` compare what was written with ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError
from tinylm.rows.template_factory import make_template
from tinylm.rows.templates import KNOWN_BOS_TOKENS
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokenizer.byte_char import ByteTokenizer, CharTokenizer
from tinylm.tokenizer.hf import HFTokenizer
from tinylm.tokenizer.pretokenize import CHARACTER_OF_BYTE

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Tokenizers differ on letters of several scripts, digits, runs of white space and parts of words.
SAMPLE = (
    "The model's 3 tokens aren't 12345 words:\n\n\tnaïve Ünïcode, Ελληνικά, 東京 🙂  two  spaces \r\n"
    "and<|x|> an end"
)

# --- the tokenizer ---


def backend_of(tokenizer: Tokenizer) -> Backend:
    """The same tokenizer in the `tokenizers` library,
    without tokens that it would add to a text.
    """
    from tokenizers import Tokenizer as Backend

    if isinstance(tokenizer, ByteTokenizer):
        return byte_backend(tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        return char_backend(tokenizer)
    assert isinstance(tokenizer, HFTokenizer), tokenizer.kind
    description = json.loads(tokenizer.to_plain()["tokenizer_json"])
    if Backend.from_str(json.dumps(description)).num_special_tokens_to_add(False):
        # it would begin each text with a token that the model was not trained on
        description["post_processor"] = None
    return Backend.from_str(json.dumps(description))


def byte_backend(tokenizer: ByteTokenizer) -> Backend:
    """Byte-level BPE without merges, so that each byte is a token."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([name for _, name in sorted(tokenizer.special_names.items())])
    return backend


def char_backend(tokenizer: CharTokenizer) -> Backend:
    """A vocabulary of words, in which every word is a character."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    ids = {name: id for id, name in sorted(tokenizer.special_names.items())}
    vocabulary = {token: id for id, token in enumerate(tokenizer.characters)} | ids
    special = [name for name, id in ids.items() if id != tokenizer.unk_id]
    # If our tokenizer has no such token, an unknown character is an error there too.
    unknown = "<|unk|>"
    backend = Backend(models.WordLevel(vocabulary, unknown))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Sequence([decoders.Replace(unknown, "\ufffd"), decoders.Fuse()])
    backend.add_special_tokens(special)
    return backend


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, template: str | None, *, max_seq_len: int
) -> None:
    """Write tokenizer.json, tokenizer_config.json and, if there is one, the chat template."""
    eos = tokenizer.special_names[tokenizer.eos_id]
    settings = {
        # the class that transformers 5 would write is unknown to older readers
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eos,
        "eos_token": eos,
        "pad_token": tokenizer.special_names[tokenizer.pad_id],
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        # The name of a special token in a text is text, as here. transformers cannot tell a
        # template's markers from a user's text, so with a template the names are tokens.
        "split_special_tokens": template is None,
    }
    config = json.dumps(settings, ensure_ascii=False, indent=2)
    write_text(folder / "tokenizer.json", backend_of(tokenizer).to_str(pretty=True))
    write_text(folder / "tokenizer_config.json", f"{config}\n")
    if template is not None:
        write_text(folder / "chat_template.jinja", template)


def write_text(path: Path, text: str) -> None:
    """Write a file with the same line ends on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


# --- the chat template ---

# The templates of rows/templates.py, in Jinja. A user's message may have an `input`, as in Alpaca's
# rows. OPEN is replaced by the token that begins a text, if the tokenizer has one,
# and CLOSE by the one that ends an answer.
_WHOLE = "(message.content + '\\n\\n' + message.input if message.input else message.content)"
_ALPACA_TASK = "Below is an instruction that describes a task"
_ALPACA_INPUT = ", paired with an input that provides further context"
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
            {{{{- '{_ALPACA_TASK}' + ('{_ALPACA_INPUT}' if message.input else '') + '. {_ALPACA_REQUEST}\\n\\n' }}}}
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


def chat_template(tokenizer: Tokenizer, template: str | None) -> str | None:
    """The template that the model was fine-tuned with, of this name, in Jinja;
    else its tokenizer's own, if it has one.
    """
    is_hf = isinstance(tokenizer, HFTokenizer)
    if template in (None, "chat_template"):
        return tokenizer.chat_template if is_hf else None
    names = tokenizer.special_names.values() if is_hf else ()
    begin = next((token for token in KNOWN_BOS_TOKENS if token in names), "")
    end = tokenizer.special_names[end_ids(tokenizer, template)[0]]
    source = CHAT_TEMPLATES[template]
    return source.replace("OPEN", json.dumps(begin)).replace("CLOSE", json.dumps(end))


def end_ids(tokenizer: Tokenizer, template: str | None) -> list[int]:
    """The tokens that end a generated text: the one after each answer in fine-tuning, and EOS."""
    if template is None:
        return [tokenizer.eos_id]
    return list(make_template(template, tokenizer).stop_ids(tokenizer))


# --- the check ---


def check_folder_tokenizer(folder: Path, ours: Tokenizer) -> str:
    """The class of transformers that reads the tokenizer in the folder as it was written.

    AutoTokenizer does, except for Qwen2 models: it splits their text into Qwen2's own words
    whatever the files say.

    Raises:
        UserError: no class does.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    name, found = "AutoTokenizer", AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if _splitting_of(found.backend_tokenizer) != _splitting_of(backend_of(ours)):
        name = "PreTrainedTokenizerFast"
        found = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    check_tokenizer(found, ours)
    return name


def _splitting_of(backend: Backend) -> tuple[Any, ...]:
    """Everything that decides how a tokenizer splits a text:
    two that agree on a sample may differ on the next text.
    """
    description = json.loads(backend.to_str())
    model = description["model"]
    words = json.dumps(description["pre_tokenizer"])
    words = words.replace('"trim_offsets": false', '"trim_offsets": true')  # does not affect ids
    return description["normalizer"], words, model["type"], model["vocab"], model.get("merges")


def check_tokenizer(theirs: Any, ours: Tokenizer) -> None:
    """Raise a UserError if transformers' tokenizer encodes or decodes a sample text differently."""
    text = sample_text(ours)
    expected = ours.encode(text)
    found = theirs(text)["input_ids"]
    fix = "Train with another tokenizer"
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=False))
        shorter = min(len(found), len(expected))
        place = next((n for n, (a, b) in pairs if a != b), shorter)
        problem = (
            f"transformers encodes a sample text to other ids (token {place} of {len(expected)}); "
            "nothing was exported"
        )
        raise UserError("tokenizer", problem, fix)
    if theirs.decode(found, skip_special_tokens=True) != ours.decode(expected):
        problem = "transformers decodes the same ids to another text; nothing was exported"
        raise UserError("tokenizer", problem, fix)


def sample_text(tokenizer: Tokenizer) -> str:
    """A text on which tokenizers differ; for a character tokenizer, all characters that it has."""
    if not isinstance(tokenizer, CharTokenizer):
        return SAMPLE
    if tokenizer.unk_id is not None:
        return tokenizer.characters + SAMPLE
    return tokenizer.characters + "".join(c for c in SAMPLE if c in tokenizer.characters)
