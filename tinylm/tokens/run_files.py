"""The token files of a run: one for each source, made if it does not exist,
and what is known about them.

    DataSource ─▶ the token file that the user gave, or its training or validation part  } `token_file_of`
               ─▶ a file in data.cache_dir, encoded from text once                        }
    data.dataset or data.mix ─▶ `token_files` of a split

Which rows of the files a run takes, and in which order, is in mixture.py and packing.py.
"""

import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tinylm.common.console import OnProgress
from tinylm.common.errors import UserError
from tinylm.common.files import locked, require_regular
from tinylm.config.schema import DataConfig
from tinylm.text.data_source import DataSource, data_sources
from tinylm.text.sources import BIN, NAMES, Which, how_to_write
from tinylm.tokenizer.base import Tokenizer
from tinylm.tokens.encode import EncodeSpec, encode_file
from tinylm.tokens.id_arrays import open_tokens
from tinylm.tokens.token_file import TokenFile


def token_files(
    sources: Iterable[DataSource],
    tokenizer: Tokenizer,
    cache_dir: str,
    *,
    needed: int = 0,
    on_progress: OnProgress | None = None,
) -> tuple[TokenFile, ...]:
    """The tokens of each source of a split.

    Raises:
        UserError: as `token_file_of`, or a source has fewer than `needed` tokens.
    """
    files = []
    for source in sources:
        file = token_file_of(source, tokenizer, cache_dir, on_progress)
        if len(file) < needed:
            problem = (
                f"{source.name} gives {len(file)} training tokens, and one row of "
                f"training.seq_len needs {needed}"
            )
            raise UserError(source.setting, problem, "Give more text or lower training.seq_len")
        files.append(file)
    return tuple(files)


def cached_token_file(
    data: DataConfig,
    which: Which,
    tokenizer: Tokenizer,
    seed: int,
    *,
    on_progress: OnProgress | None = None,
) -> TokenFile:
    """The tokens of a split that has one source; see `token_file_of`."""
    (source,) = data_sources(data, which, seed)
    return token_file_of(source, tokenizer, data.cache_dir, on_progress)


def token_file_of(
    source: DataSource, tokenizer: Tokenizer, cache_dir: str, on_progress: OnProgress | None = None
) -> TokenFile:
    """The token file that the user gave, or one in the cache that is made from the text.

    The cached file is named by everything its content depends on, made if it does not exist,
    and verified.

    Raises:
        UserError: the data cannot be read or encoded, or the tokens are another tokenizer's.
    """
    if source.split is None:
        return _given_token_file(source, tokenizer)
    spec = EncodeSpec(
        source.split,
        tokenizer,
        source.text_field,
        source.separator,
        source.max_doc_len,
        f"{source.name}: {NAMES[source.which]}",
    )
    path = Path(cache_dir) / f"{source.which}-{spec.fingerprint}{BIN}"
    if not os.path.exists(path):  # unlike Path.exists, False for a name that is too long
        with locked(path, "data.cache_dir"):
            if not os.path.exists(path):  # else another process made it while this one waited
                encode_file(path, spec, processes=os.cpu_count() or 1, on_progress=on_progress)
    file = TokenFile.open(path, "Delete it: it is made again from the text")
    file.verify()
    file.require_tokenizer(tokenizer)
    return file


def _given_token_file(source: DataSource, tokenizer: Tokenizer) -> TokenFile:
    """The token file that a setting names, or the part of it that is for this split.

    Without data.val_dataset, the last data.val_fraction of it, from the start of a document on, is
    for validation. A document that is in the file twice can then be in both splits, which
    `split_overlap` counts.
    """
    require_regular(source.name)
    found = os.stat(source.name)
    stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
    file = _verified(source.name, tokenizer, source.token_dtype, stamp)
    if source.val_fraction is None:
        return file
    border = file.document_border(len(file) - round(len(file) * source.val_fraction))
    if source.which == "train":
        return file.between(0, border)
    return file.between(border, len(file))


@lru_cache(maxsize=1024)
def _verified(
    path: str, tokenizer: Tokenizer, dtype: str | None, stamp: tuple[int, ...]
) -> TokenFile:
    """A token file that the user gave, read whole: once for both splits;
    again if `stamp` has changed.
    """
    file = open_tokens(path, tokenizer=tokenizer, dtype=dtype)
    file.require_tokenizer(tokenizer)
    file.verify()
    return file


# --- what is known about the data of a run --------------------------------------------------------


def name_of(data: DataConfig) -> str:
    """The name of the data of a run in a message."""
    if data.mix is None:
        return data.dataset
    total = sum(part.weight for part in data.mix)
    parts = [f"{part.dataset} ({part.weight / total:.1%})" for part in data.mix]
    return f"mix of {', '.join(parts)}"


def notes_on_text(
    name: str, file: TokenFile, tokenizer: Tokenizer, separator: str | None, setting: str
) -> list[str]:
    """What the user should know about the text that became `file`, a line each.

    Args:
        name: the name of the text.
        file: the file that `encode_file` wrote.
        tokenizer: the tokenizer it was encoded with.
        separator: what divides documents in a .txt file.
        setting: the setting or flag of the separator.
    """
    header = file.header
    notes = []
    if header.spelled_eos:
        eos = tokenizer.special_names[tokenizer.eos_id]
        notes.append(
            f"warning: {name}: {header.spelled_eos:,} of {header.documents:,} documents contain "
            f"{eos} in their text, where it is only characters and ends nothing. If it separates "
            f"documents of a .txt file, set {setting} to '{eos}'"
        )
    for mark, n_marked in header.end_marks.items():
        notes.append(
            f"warning: {name}: {n_marked:,} of {header.documents:,} documents contain {mark} at "
            "the border of a line. It is not the end-of-text token of this tokenizer, so it is "
            f"only characters. If it separates documents of a .txt file, set {setting} to '{mark}'"
        )
    if header.unseparated:
        notes.append(
            f"warning: {name}: {setting} '{separator}' does not occur in it, so each .txt file is "
            f"one document{how_to_write(separator or '', setting)}"
        )
    return notes
