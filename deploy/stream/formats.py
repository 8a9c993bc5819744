"""From a message's value to what is classified. A reader returns a text, a `Failure`, or None: pass the message on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from aisle.client import Failure
from aisle.deploy.stream.paths import TextPath, find_text

Reader = Callable[[Sequence[TextPath], bytes | None], Any]


def read_json(paths: Sequence[TextPath], raw: bytes | None) -> Any:
    """Read a JSON message. A tombstone, which has no value, is passed on."""
    if raw is None:
        return None
    value = _parse(raw)
    return value if isinstance(value, Failure) else find_text(paths, value)


def read_debezium(paths: Sequence[TextPath], raw: bytes | None) -> Any:
    """Read a change event of Debezium: the row after the change. Events without one, such as deletes, are passed on.

    Source: https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-events
    """
    if raw is None:
        return None
    event = _parse(raw)
    if isinstance(event, dict) and isinstance(event.get("payload"), dict):  # the converter's schemas are on
        event = event["payload"]
    if isinstance(event, Failure):
        return event
    if not isinstance(event, dict) or "op" not in event:
        return Failure("the message is not a change event of Debezium; is --format json meant?")
    after = event.get("after")
    return None if after is None else find_text(paths, after)


def _parse(raw: bytes) -> Any:
    """Return the value of a JSON message, or a `Failure`."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return Failure("the message is not JSON")


FORMATS: dict[str, Reader] = {"json": read_json, "debezium": read_debezium}
