"""End Triton if it runs but answers no requests, so that it is restarted: a step that hangs never ends by itself."""

from __future__ import annotations

import secrets
import threading
import time

from aisle.console import say
from aisle.deploy.server.admin import Admin
from aisle.deploy.server.served_repository import ENSEMBLE, ENSEMBLES
from aisle.deploy.server.triton import Triton
from aisle.errors import ServerError

QUEUE_FULL = "Exceeds maximum queue size"  # the encoder's refusal
CHECK_SECONDS = 5.0  # between two checks, and the time limit of a call
MAX_SILENCE = 20.0  # seconds without an answer; longer than any batch takes and any request waits in the queue


def watch_over(triton: Triton) -> None:
    """Check Triton from a thread until it ends.

    If requests fail, the watchdog sends its own text, to distinguish bad texts from a step that hangs. The answers to
    other requests prove nothing, because they may come from the cache.
    """
    threading.Thread(target=_watch, args=(triton,), daemon=True).start()


def _probe(admin: Admin, others_answered: bool) -> None:
    """Send a new text.

    Raises:
        ServerError: it is not answered. A refusal because of a full queue is no error if other requests are answered.
    """
    try:
        admin.classify(ENSEMBLE, [f"probe {secrets.token_hex(4)}"])  # a new text, which is not in the cache
    except ServerError as error:
        if not (others_answered and QUEUE_FULL in str(error)):
            raise


def _watch(triton: Triton) -> None:
    admin = triton.admin.new_connection(CHECK_SECONDS)
    answered, failed, last_failed = 0, 0, False
    alive = time.monotonic()
    while triton.process.poll() is None:
        time.sleep(CHECK_SECONDS)
        before = answered, failed
        try:
            counts = [admin.counts(ensemble) for ensemble in ENSEMBLES]
            answered, failed = (sum(each) for each in zip(*counts, strict=True))
            if failed > before[1] or last_failed:
                _probe(admin, answered > before[0])
            alive, last_failed = time.monotonic(), False
        except ServerError as error:
            twice, last_failed = last_failed, True  # a single failure proves nothing: this process may have been paused
            if twice and time.monotonic() - alive > MAX_SILENCE and triton.process.poll() is None:
                say(f"Triton has answered no request for {MAX_SILENCE:.0f} s, so it is restarted: {error}")
                triton.process.kill()
        admin.close()  # when Triton stops, it waits for open connections until its exit timeout
