"""Reading the folder of a Hugging Face tokenizer, or downloading it.

    tokenizer.json                                  the library's own format, as it is
    vocab.json, merges.txt                          GPT-2's files: byte-level BPE
    *.model, vocab.txt, *.tiktoken                  older formats, converted by transformers
    tokenizer_config.json, special_tokens_map.json  which tokens end and pad a text, and the chat
    template

Reading order: `load_hf_tokenizer`; `_read_folder`, which puts a tokenizer together; the settings;
the vocabularies.
"""

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylm.common.errors import UserError, catch_panics, first_line, no_folder
from tinylm.common.files import require_regular
from tinylm.common.hub import download, is_hub_name, read_json, read_utf8
from tinylm.tokenizer.base import WELL_KNOWN_EOS
from tinylm.tokenizer.hf import HFTokenizer, read_backend

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

logger = logging.getLogger(__name__)

# Vocabularies that transformers can convert to a tokenizer.json: SentencePiece's, WordPiece's and
# tiktoken's.
OLDER_VOCABULARIES = ("*.model", "vocab.txt", "*.tiktoken")
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
)
EXPORT_AGAIN = "Export the tokenizer again"


def load_hf_tokenizer(path: str) -> HFTokenizer:
    """The tokenizer in the folder `path`, or if nothing has that name,
    of the Hugging Face model `path`.

    Raises:
        UserError: naming the file and what is wrong with it, or how to do without the network.
    """
    if os.path.isdir(path):
        return _read_folder(Path(path))
    if os.path.lexists(path) or not is_hub_name(path):
        raise UserError(
            ("tokenizer.path", path),
            no_folder(path),
            "Give a folder with tokenizer.json, or a Hugging Face name such as gpt2",
        )
    fix = "Give a local folder with tokenizer.json, or vocab.json and merges.txt"
    patterns = (*TOKENIZER_FILES, *OLDER_VOCABULARIES)
    return _read_folder(download(path, patterns, ("tokenizer.path", path), fix))


def _read_folder(folder: Path) -> HFTokenizer:
    settings = _read_settings(folder)
    file, backend = _read_backend(folder)
    vocabulary = backend.get_vocab()
    _check_ids(vocabulary, file)
    _check_named(settings, vocabulary, folder)
    special = settings.special & vocabulary.keys()
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    if file.name == "vocab.json":
        # It does not mark special tokens, but no merge makes their names.
        added = vocabulary.keys()
    well_known = (name for name in WELL_KNOWN_EOS if name in special or name in added)
    eos = settings.named.get("eos_token") or next(well_known, None)
    if eos is None:
        raise UserError(
            file,
            "no end-of-text token",
            f'Name one of its tokens in {folder / "tokenizer_config.json"}: {{"eos_token": "..."}}',
        )
    return HFTokenizer(
        backend,
        eos=eos,
        pad=settings.named.get("pad_token"),
        special=special,
        chat_template=settings.chat_template,
    )


def _check_ids(vocabulary: dict[str, int], file: Path) -> None:
    """Ids are rows of the embedding, so n tokens must have the ids 0 to n - 1, each once."""
    n = len(vocabulary)
    if not vocabulary:
        raise UserError(file, "has no tokens", EXPORT_AGAIN)
    missing = set(range(n)) - set(vocabulary.values())
    if missing:
        raise UserError(
            file,
            f"its {n} tokens must have the ids 0 to {n - 1}, but {min(missing)} is missing "
            f"(the highest is {max(vocabulary.values())})",
            EXPORT_AGAIN,
        )


def _check_named(settings: "_Settings", vocabulary: dict[str, int], folder: Path) -> None:
    for key in ("eos_token", "pad_token"):
        token = settings.named.get(key)
        if token is not None and token not in vocabulary:
            raise UserError(
                (settings.files[key], key),
                f"the tokenizer in {folder} has no token {token}",
                "Name one that it has, or add it",
            )


# --- settings beside a vocabulary ---


@dataclass
class _Settings:
    """What tokenizer_config.json and special_tokens_map.json contain about a tokenizer."""

    named: dict[str, str] = field(default_factory=dict)
    """eos_token, pad_token, ... and the text of the token"""
    files: dict[str, Path] = field(default_factory=dict)
    """the file that names it"""
    special: set[str] = field(default_factory=set)
    """tokens that no text may be encoded to"""
    chat_template: str | None = None


def _read_settings(folder: Path) -> _Settings:
    """The settings in special_tokens_map.json and tokenizer_config.json;
    the latter takes precedence.
    """
    settings = _Settings()
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _add_settings(settings, folder / name)
    if (folder / "chat_template.jinja").exists():
        settings.chat_template = read_utf8(folder / "chat_template.jinja", EXPORT_AGAIN)
    # Text that is not in the vocabulary is encoded to the unknown token, so it is not special.
    settings.special |= {token for key, token in settings.named.items() if key != "unk_token"}
    return settings


def _add_settings(settings: _Settings, file: Path) -> None:
    values = read_json(file, EXPORT_AGAIN)
    for key, value in values.items():
        is_switch = value is None or isinstance(value, bool)  # add_bos_token: true
        if key.endswith("_token") and not is_switch:
            settings.named[key] = _token_name(value, file, key)
            settings.files[key] = file
    key = "additional_special_tokens"
    more = values.get(key) or []
    if not isinstance(more, list):
        raise UserError(
            (file, key), f"must be a list of tokens, got {_short(more)}", "Write a list"
        )
    settings.special |= {_token_name(token, file, key) for token in more}
    if values.get("chat_template"):
        settings.chat_template = _chat_template(values["chat_template"], file)


def _chat_template(value: Any, file: Path) -> str:
    """The template, of several ones with names `default`, as in transformers, else the first."""
    if isinstance(value, str):
        return value
    named = {}
    for entry in value if isinstance(value, list) else [value]:
        is_named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if not is_named or not isinstance(entry.get("template"), str):
            raise UserError(
                (file, "chat_template"),
                f"must be the text of a template, or a list of name and template, got "
                f"{_short(value)}",
                "Write the text of one template",
            )
        named[entry["name"]] = entry["template"]
    if "default" in named:
        return named["default"]
    first = next(iter(named))
    logger.info(f"{file}: of the chat templates {', '.join(named)}, {first} is used")
    return named[first]


def _token_name(value: Any, file: Path, key: str) -> str:
    """The text of a token, which the files have as a string or as an object with `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    if not isinstance(content, str) or not content:
        raise UserError(
            (file, key),
            f"must be the text of a token, got {_short(value)}",
            "Write the text of one token",
        )
    return content


# --- vocabularies ---


def _read_backend(folder: Path) -> tuple[Path, "Backend"]:
    """The library's tokenizer from the files in `folder`, and the file to name in errors."""
    if (folder / "tokenizer.json").exists():
        return folder / "tokenizer.json", _read_tokenizer_json(folder / "tokenizer.json")
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return folder / "vocab.json", _read_gpt2(folder / "vocab.json", folder / "merges.txt")
    older = sorted(path for pattern in OLDER_VOCABULARIES for path in folder.glob(pattern))
    for file in folder.iterdir() if older else ():
        if not file.is_dir():
            require_regular(file)
    if older:  # transformers would make an empty tokenizer from a folder without one
        return older[0], _convert(folder)
    raise UserError(
        ("tokenizer.path", folder),
        "has no tokenizer.json, and no vocab.json with merges.txt",
        "Give the folder of a tokenizer",
    )


def _read_tokenizer_json(file: Path) -> "Backend":
    description = read_json(file, EXPORT_AGAIN)
    try:
        backend = read_backend(read_utf8(file, EXPORT_AGAIN))
    except RuntimeError as error:
        raise _not_a_tokenizer(file, error) from error
    # The library silently gives an added token with another id the next free one.
    for token in description.get("added_tokens", []):
        expected = backend.token_to_id(token["content"])
        if token["id"] != expected:
            raise UserError(
                (file, f"added token {token['content']}"),
                f"must have the id {expected} of {backend.get_vocab_size()} tokens, "
                f"got {token['id']}",
                EXPORT_AGAIN,
            )
    return backend


def _read_gpt2(vocab_file: Path, merges_file: Path) -> "Backend":
    """Byte-level BPE as GPT-2 published it: token ids in JSON,
    and one merge per line in the order they were learned.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = read_json(vocab_file, EXPORT_AGAIN)
    for token, id in vocabulary.items():
        if type(id) is not int or id < 0:
            raise UserError(
                (vocab_file, token), f"must be an id of at least 0, got {_short(id)}", EXPORT_AGAIN
            )
    _check_ids(vocabulary, vocab_file)
    merges = []
    for number, line in enumerate(read_utf8(merges_file, EXPORT_AGAIN).split("\n"), start=1):
        pair = line.rstrip("\r").split(" ")
        if line.startswith("#version") or pair == [""]:
            continue
        if len(pair) != 2:
            raise UserError(
                f"{merges_file}:{number}",
                f"must be two tokens with a space between, got {_short(line)}",
                EXPORT_AGAIN,
            )
        merges.append((pair[0], pair[1]))
    try:
        with catch_panics():
            backend = Backend(models.BPE(vocabulary, merges))
    except Exception as error:  # plain Exception, for example for a merge whose result is no token
        raise _not_a_tokenizer(merges_file, error) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _convert(folder: Path) -> "Backend":
    """The tokenizer of an older format (SentencePiece's tokenizer.model),
    converted by transformers.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        return tokenizer.backend_tokenizer
    # AttributeError: transformers has this tokenizer in Python only.
    except (OSError, ValueError, ImportError, AttributeError) as error:
        raise UserError(
            ("tokenizer.path", folder),
            f"has no tokenizer.json, and transformers cannot make one: {first_line(error)}",
            "Export the tokenizer with tokenizer.json",
        ) from error


# --- files ---


def _not_a_tokenizer(file: Path, error: Exception) -> UserError:
    return UserError(file, f"not a tokenizer: {first_line(error)}", EXPORT_AGAIN)


def _short(value: Any) -> str:
    """A JSON value, short enough for a message."""
    return json.dumps(value)[:100]
