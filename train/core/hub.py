"""The Hugging Face hub: check within seconds whether a model can be loaded."""

from __future__ import annotations

import os
import threading
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from aisle.console import say
from aisle.errors import InputError

PATIENCE = 6.0  # seconds; transformers itself retries six times, for half a minute
MISSING = (401, 403, 404)  # no such model, or this user may not read it; the hub does not say which


@cache
def is_local(name: str) -> bool:
    """Return whether a model is loaded from this machine: it is a folder, or the hub does not answer.

    Raises:
        InputError: it is a file; or there is no such folder, and the hub has no such model, or the hub does not answer
            and the model is not in the local cache.
    """
    if Path(name).is_dir():
        return True
    if Path(name).is_file():
        raise InputError(f"cannot load {name}: it is a file; give the folder of a model, or its name on the hub")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(f"cannot load {name}: there is no such folder") from None
    error = _query_hub(name)
    if error is None:
        return False
    if isinstance(error, HfHubHTTPError):
        if error.response.status_code in MISSING:
            raise InputError(f"cannot load {name}: there is no such folder and no such model on the hub")
        return False  # the hub may still have the files
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        say(f"the Hugging Face hub does not answer: {name} is loaded from the local cache")
        return True
    hub = os.environ.get("HF_ENDPOINT", "the Hugging Face hub")
    raise InputError(
        f"cannot load {name}: {hub} does not answer and the model is not in the local cache; give --model a local "
        "folder, or download it elsewhere, copy the cache (HF_HOME) and set HF_HUB_OFFLINE=1"
    )


def _query_hub(name: str) -> Exception | None:
    """Look a model up on the hub; return the error, which may be a timeout, or None."""
    found: list[Exception | None] = [TimeoutError()]

    def query() -> None:
        try:
            HfApi().model_info(name, timeout=PATIENCE)
            found.append(None)
        except Exception as error:  # of the hub, of HTTP, of the network
            found.append(error)

    # A thread, because the client's timeout does not cover the DNS lookup.
    thread = threading.Thread(target=query, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[-1]
