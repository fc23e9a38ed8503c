"""Names on the Hugging Face hub, and a quick answer if it cannot be reached."""

import os
import re
import socket
import urllib.request
from urllib.parse import urlsplit

from tinylm.common.errors import UserError

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


def hub_errors() -> tuple[type[Exception], ...]:
    """The errors of the Hugging Face libraries when the network fails: OSError,
    and that of their HTTP library.
    """
    from huggingface_hub.errors import HTTPError  # httpx's or httpx2's, depending on the version

    return OSError, HTTPError
