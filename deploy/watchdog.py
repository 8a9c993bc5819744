"""Ends a Triton that runs and answers nobody, so that it is started again: a step that hangs never ends of itself."""

from __future__ import annotations

import secrets
import threading
import time

from aisle.console import say
from aisle.deploy.triton import Triton
from aisle.deploy.view import ENSEMBLE
from aisle.errors import ServerError

SECONDS = 5.0  # between two looks; what is asked may take as long
SILENCE = 20.0  # seconds without any answer: longer than any batch takes, and than a request waits in a queue


def watch_over(triton: Triton) -> None:
    """Look after Triton from a thread until it ends.

    Calls that fail while others succeed are the callers' own. Where all have failed, a text of the watchdog's own tells
    bad texts from a step that hangs.
    """
    threading.Thread(target=_watch, args=(triton,), daemon=True).start()


def _watch(triton: Triton) -> None:
    admin = triton.admin.another(SECONDS)
    answered, failed, doubt = 0, 0, False
    alive = time.monotonic()
    while triton.process.poll() is None:
        time.sleep(SECONDS)
        before = answered, failed
        try:
            answered, failed = admin.counts(ENSEMBLE)
            if answered <= before[0] and (failed > before[1] or doubt):
                admin.classify(ENSEMBLE, [f"probe {secrets.token_hex(4)}"])  # never the same: the cache would answer it
            alive, doubt = time.monotonic(), False
        except ServerError as error:
            doubt = True
            if time.monotonic() - alive > SILENCE and triton.process.poll() is None:
                say(f"Triton has answered nobody for {SILENCE:.0f} s, so it is started again: {error}")
                triton.process.kill()
        admin.close()  # until the next look: Triton, told to stop, would wait for it and then break off
