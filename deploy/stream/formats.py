"""From a message's value to what is classified. A reader returns a text, a `Failure`, or None: pass the message on.

A format is an encoding of values, and where in a value the product is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from aisle.client import Failure
from aisle.deploy.stream.paths import TextPath, find_text
from aisle.deploy.stream.settings import Properties

Reader = Callable[[Sequence[TextPath], bytes | None], Any]
Decoder = Callable[[bytes], Any]  # from bytes to a value, or a `Failure`
Finder = Callable[[Sequence[TextPath], Any], Any]  # from a value to what a reader returns


class Format(NamedTuple):
    """A format of messages."""

    avro: bool
    find: Finder


def reader_of(name: str, registry: Properties, topic: str) -> Reader:
    """Return the reader of a format.

    Args:
        name: one of `FORMATS`.
        registry: the properties of the schema registry, for Avro.

    Raises:
        InputError: such a property is missing or wrong.
    """
    wanted = FORMATS[name]
    if not wanted.avro:
        return partial(read, parse_json, wanted.find)
    from aisle.deploy.stream.avro import AvroDecoder

    return partial(read, AvroDecoder(registry, topic), wanted.find)


def read(decode: Decoder, find: Finder, paths: Sequence[TextPath], raw: bytes | None) -> Any:
    """Read a message. A tombstone, which has no value, is passed on."""
    if raw is None:
        return None
    value = decode(raw)
    return value if isinstance(value, Failure) else find(paths, value)


def parse_json(raw: bytes) -> Any:
    """Return the value of a JSON message, or a `Failure`."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):  # a UnicodeDecodeError is a ValueError
        return Failure("the message is not JSON")


def find_after(paths: Sequence[TextPath], event: Any) -> Any:
    """Find the text in a change event of Debezium: in the row after the change. Events without one are passed on.

    Source: https://debezium.io/documentation/reference/stable/connectors/postgresql.html#postgresql-events
    """
    if isinstance(event, dict) and isinstance(event.get("payload"), dict):  # the converter's schemas are on
        event = event["payload"]
    if not isinstance(event, dict) or "op" not in event:
        return Failure("the message is not a change event of Debezium; is another --format meant?")
    after = event.get("after")
    return None if after is None else find_text(paths, after)


FORMATS = {
    "json": Format(False, find_text),
    "avro": Format(True, find_text),
    "debezium": Format(False, find_after),
    "debezium-avro": Format(True, find_after),
}
