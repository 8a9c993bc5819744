"""Ends a Triton that runs and answers nobody, so that it is started again: a step that hangs never ends of itself."""

from __future__ import annotations

import secrets
import threading

from aisle.console import say
from aisle.deploy.triton import Triton
from aisle.deploy.view import ENSEMBLE
from aisle.errors import ServerError

SECONDS = 5.0  # between two looks; a probe may take as long
PROBES = 2  # in a row that must fail


def watch_over(triton: Triton) -> None:
    """Look after Triton from a thread until it ends.

    Calls that fail while others succeed are the callers' own. Where all have failed, a text of the watchdog's own tells
    bad texts from a step that hangs.
    """
    threading.Thread(target=_watch, args=(triton,), daemon=True).start()


def _watch(triton: Triton) -> None:
    admin = triton.admin.another(SECONDS)
    pause = threading.Event()
    before, silent = (0, 0), 0
    while triton.process.poll() is None:
        pause.wait(SECONDS)
        try:
            now = admin.counts(ENSEMBLE)
            if now[0] > before[0] or (now[1] <= before[1] and not silent):
                before, silent = now, 0
                continue
            before = now
            admin.classify(ENSEMBLE, [f"probe {secrets.token_hex(4)}"])  # no text twice: the cache would answer it
            silent = 0
        except ServerError as error:
            silent += 1
            if silent >= PROBES and triton.process.poll() is None:
                say(f"Triton answers nobody, so it is started again: {error}")
                triton.process.kill()
    admin.close()
