"""Watch: check the data contract of a table, the drift of traffic, and the accuracy on fresh labels, in one run.

A check that cannot be made, because a file is missing or the server is away, is a failed check: the others are made.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from aisle.errors import InputError, ServerError
from aisle.failures import failure
from aisle.preprocess.contract import check, now, read_contract

WEBHOOK_SECONDS = 10.0


def check_contract(table: Path, contract: Path) -> dict[str, Any]:
    """Return what a table breaks of its contract."""
    return {"of": str(table), "reasons": check(read_contract(contract), table, now())}


def check_drift(checkpoint: Path, log: Path, text_column: str) -> dict[str, Any]:
    """Return why traffic suggests to retrain."""
    from aisle.train.adapt.drift import drift

    found = drift(checkpoint, log, text_column=text_column)
    reasons = [each["reason"] for each in found["reasons"]] if found["retrain"] else []
    return {"of": str(log), "rows": found["rows"], "reasons": reasons}


def check_accuracy(labels: Path, text_column: str, label_column: str, url: str, least: float) -> dict[str, Any]:
    """Return whether a server is less accurate than `least` on fresh labels, by more than chance explains."""
    from aisle.preprocess.binomial import interval
    from aisle.train.evaluation.evaluate import evaluate

    found = evaluate(labels, text_column, label_column, url=url, held_out=False)
    if "accuracy" not in found:
        raise InputError(f"{url} serves a multi-label model; watch its micro-F1 with aisle evaluate --url")
    accuracy, rows = found["accuracy"], found["rows"]
    _, highest = interval(round(accuracy * rows), rows)
    reason = f"accuracy {accuracy:.4f} on {rows} rows is below {least} by more than chance explains"
    return {"of": str(labels), "rows": rows, "accuracy": accuracy, "reasons": [reason] if highest < least else []}


def run_checks(checks: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, Any]:
    """Make all checks; return `ok`, and for each its name, whether it is `ok`, and the `reasons` if it is not."""
    results = []
    for name, make in checks.items():
        try:
            found = make()
        except (InputError, ServerError, OSError) as error:
            found = {"reasons": [f"not checked: {failure(error)[1]}"]}
        results.append({"check": name, "ok": not found["reasons"], **found})
    return {"ok": all(each["ok"] for each in results), "time": now().isoformat(timespec="seconds"), "checks": results}


def check_webhook(url: str) -> None:
    """Check before the work that a webhook can be called.

    Raises:
        InputError: the address is not one of http or https.
    """
    if not url.startswith(("https://", "http://")):
        raise InputError("--webhook takes an address that starts with https:// or http://")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: after one, the message would be lost, because a GET without it follows."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def notify(url: str, result: dict[str, Any]) -> None:
    """Send a result as JSON by HTTP POST, with a `text` of all reasons, which chat services show.

    Raises:
        ServerError: it does not accept the message. The message does not show the address, which may be a secret.
    """
    lines = [f"{each['check']}: {reason}" for each in result["checks"] for reason in each["reasons"]]
    body = json.dumps({"text": "\n".join(["aisle watch", *lines]), **result}, ensure_ascii=False).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=WEBHOOK_SECONDS):
            pass
    except HTTPError as error:
        raise ServerError(f"the webhook answered {error.code} {error.reason}") from None
    except (OSError, ValueError) as error:
        raise ServerError(f"the webhook cannot be reached: {getattr(error, 'reason', error)}") from None
