"""An exported folder on the Hugging Face hub, or on another server of its API (HF_ENDPOINT).

The token is that of the hub's own library (`hf auth login`, or HF_TOKEN); this program reads none.
"""

from __future__ import annotations

import re
from pathlib import Path

from tinylm.common.errors import UserError
from tinylm.common.hub import find_hub_problem, hub_errors, hub_problem

FLAG = "--push"
FIX = "Remove --push; `hf upload OWNER/NAME FOLDER` uploads the folder later"


def require_push(name: str) -> None:
    """Raise a UserError before any work if a folder cannot be uploaded as `name`."""
    from huggingface_hub import constants

    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII) is None:
        raise UserError(FLAG, f"must be OWNER/NAME, got {name}")
    if constants.HF_HUB_OFFLINE:
        raise UserError((FLAG, name), "HF_HUB_OFFLINE=1 is set", "Unset it, or remove --push")
    problem = find_hub_problem()
    if problem is not None:
        raise UserError((FLAG, name), problem, FIX)


def push_folder(folder: Path, name: str, *, private: bool) -> str:
    """Upload all files of `folder` in one commit to the repository `name`, which is created if it
    does not exist; returns its address.

    Raises:
        UserError: the server refuses it; `folder` stays.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    try:
        address = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export from Tiny Transformer"
        )
    except (*hub_errors(), ValueError) as error:
        problem = f"not uploaded, {folder} is complete: {hub_problem(error)}"
        fix = f"Log in with `hf auth login`, then `hf upload {name} {folder}`"
        raise UserError((FLAG, name), problem, fix) from error
    return str(address)
