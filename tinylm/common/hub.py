"""The Hugging Face hub: its names, downloads, a quick answer if it cannot be reached,
and the JSON files that its models and tokenizers consist of.
"""

import json
import os
import re
import socket
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tinylm.common.errors import UserError, first_line
from tinylm.common.files import read_regular, require_regular

HUB_TIMEOUT_SECONDS = 5.0
# training.init_from: hf:NAME is a Hugging Face model, any other value the path of a checkpoint.
HF_PREFIX = "hf:"


def is_hub_name(text: str) -> bool:
    """Whether `text` can be a name on the hub (gpt2, owner/name)
    and is not a path into an existing folder.

    >>> is_hub_name("gpt2"), is_hub_name("../gpt2"), is_hub_name("a/b/c")
    (True, False, False)
    """
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text, re.ASCII) is None:
        return False
    owner, slash, _ = text.partition("/")
    # os.path: Path.is_dir raises for a name that is too long
    return not (slash and os.path.isdir(owner))


def require_hub(where: object, fix: str) -> None:
    """Raise a UserError within seconds if the hub cannot be reached;
    its own library retries for half a minute.

    Not checked with HF_HUB_OFFLINE=1, when the library reads only its cache, and behind a proxy,
    which only the library knows how to use.

    Args:
        where: the setting or file, and the name that would be downloaded,
            as `UserError` takes them.
        fix: what to give in place of the name.
    """
    problem = find_hub_problem()
    if problem is not None:
        raise UserError(
            where,
            f"not found on this machine, and {problem}",
            f"{fix.removesuffix('.')}. If it was downloaded before, set HF_HUB_OFFLINE=1",
        )


def find_hub_problem() -> str | None:
    """Why the hub cannot be reached; None if it can, or if it is not checked
    (see `require_hub`).
    """
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return None
    host = endpoint.hostname or ""
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), HUB_TIMEOUT_SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({error.strerror or error})"
    return None


def download(name: str, patterns: Sequence[str], where: object, fix: str) -> Path:
    """The folder in the hub library's cache with the files of `name` that match `patterns`.

    Args:
        name: of a model or tokenizer on the hub.
        patterns: names of files, * stands for any text.
        where: as `require_hub` takes it.
        fix: what to give in place of the name.

    Raises:
        UserError: the hub cannot be reached, or has nothing of this name.
    """
    from huggingface_hub import snapshot_download

    require_hub(where, fix)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (*hub_errors(), ValueError) as error:
        problem = f"not a folder, and cannot be downloaded: {hub_problem(error)}"
        raise UserError(where, problem, fix) from error


def hub_problem(error: Exception) -> str:
    """Why the hub did not give what was asked for, in our words if it is one of the usual reasons;
    the libraries' own messages have several sentences with advice for other programs.
    """
    from huggingface_hub import constants, errors

    offline = "it is not in the cache of the hub library, and HF_HUB_OFFLINE=1 is set"
    no_connection = "it is not in the cache of the hub library, and the hub did not answer"
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.OfflineModeIsEnabled, offline),
        (errors.GatedRepoError, "its owner must give you access first (then: hf auth login)"),
        (errors.RepositoryNotFoundError, "the hub has nothing of this name, or it is private"),
        (errors.RevisionNotFoundError, "the hub has no such revision of it"),
        (errors.LocalEntryNotFoundError, offline if constants.HF_HUB_OFFLINE else no_connection),
        (errors.HFValidationError, "the hub has no such names"),
    )
    for kind, words in reasons:
        if isinstance(error, kind):
            return words
    sentence, _, _ = first_line(error).partition(". ")
    return sentence


def read_utf8(file: Path, fix: str) -> str:
    """The text of a file that may not be ours.

    Raises:
        UserError: it cannot be read, is no regular file (a pipe would never end), or is not UTF-8.
    """
    try:
        return read_regular(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(file, f"not UTF-8 text (byte {error.start})", fix) from None


def read_json(file: Path, fix: str, max_bytes: int | None = None) -> dict[str, Any]:
    """The JSON object in a file that may not be ours.

    Raises:
        UserError: see `read_utf8`; or it is something else, or larger than `max_bytes`.
    """
    require_regular(file)
    size = file.stat().st_size
    if max_bytes is not None and size > max_bytes:
        raise UserError(file, f"must have at most {max_bytes} bytes, got {size}", fix)
    try:
        values = json.loads(read_utf8(file, fix))
    except (ValueError, RecursionError) as error:
        raise UserError(file, f"not valid JSON: {first_line(error)}", fix) from None
    if not isinstance(values, dict):
        raise UserError(file, f"must be a JSON object, got {type(values).__name__}", fix)
    return values


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of the Hugging Face libraries when the network fails: OSError,
    and that of their HTTP library.
    """
    from huggingface_hub.errors import HTTPError  # httpx's or httpx2's, depending on the version

    return OSError, HTTPError
