import os
import re
import socket
import urllib.request
from urllib.parse import urlsplit

from tinylm.common.errors import UserError, printable

HUB_TIMEOUT_SECONDS = 5.0
# training.init_from: hf:NAME is a Hugging Face model, any other value the path of a checkpoint.
HF_PREFIX = "hf:"


def is_hub_name(text: str) -> bool:
    """Whether `text` can be a name on the Hugging Face hub (gpt2, owner/name) and is not a path into a folder that exists.

    >>> is_hub_name("gpt2"), is_hub_name("../gpt2"), is_hub_name("a/b/c")
    (True, False, False)
    """
    owner, slash, _ = text.partition("/")
    # os.path, because Path.is_dir raises for a name that is too long.
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text, re.ASCII) is not None and not (
        slash and os.path.isdir(owner)
    )


def require_hub(what: str, mend: str) -> None:
    """Raise a UserError at once where the Hugging Face hub cannot be reached; its library would try for half a minute.

    With HF_HUB_OFFLINE=1 the library reads its cache alone, and with a proxy only the library knows the way: then
    nothing is checked here.
    """
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.create_connection(
            (endpoint.hostname or "", endpoint.port or (443 if endpoint.scheme == "https" else 80)),
            HUB_TIMEOUT_SECONDS,
        ).close()
    except OSError as error:
        found = f"nothing here has that name, and {endpoint.hostname} cannot be reached ({error.strerror or error})"
        raise UserError(
            f"{what}: {found}. {mend} What was downloaded before is used with HF_HUB_OFFLINE=1."
        ) from None


def hub_errors() -> tuple[type[Exception], ...]:
    """What the Hugging Face libraries raise where the network fails: an OSError, or one of their HTTP library that is none."""
    from huggingface_hub.errors import (
        HTTPError,
    )  # of httpx or httpx2, whichever this version of it uses

    return OSError, HTTPError


def first_line(error: Exception) -> str:
    """The first line of a library's message, to stand in one of ours."""
    return printable(str(error).strip().partition("\n")[0]).rstrip(".") or type(error).__name__
