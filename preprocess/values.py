"""The one rule for values that are not strings, in files, in the client and in JSON requests.

| value | is taken as |
|---|---|
| a string | itself |
| bytes | the UTF-8 text that they hold |
| None, NaN, pandas' NA and NaT | missing |
| a number | its digits; a whole number without `.0`, which pandas adds to integers if a value is missing |
| a date or a time | written as `2026-11-26 08:00:00` |
| true and false, infinity, a list, an object, anything else | not a text: refused |
"""

from __future__ import annotations

import datetime
import math
import numbers
from decimal import Decimal
from typing import Any

from aisle.errors import InputError

EXACT = 1e15  # floats below it represent every whole number exactly
NAMES = {bool: "true or false", dict: "an object", list: "a list", tuple: "a list", set: "a set"}


class TextError(InputError):
    """A text that cannot be classified. `reason` is a short name of the fault; the message says what to change."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def as_text(value: object) -> str | bytes | None:
    """Return a value as text, a string or UTF-8 bytes, or None if it is missing.

    Raises:
        TextError: the value is not a text.
    """
    if value is None or isinstance(value, str | bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if type(value).__name__ in ("NAType", "NaTType"):  # of pandas, which is not imported for this
        return None
    if isinstance(value, datetime.date | datetime.time):
        return str(value)
    if isinstance(value, numbers.Real | Decimal) and not isinstance(value, bool):
        return _digits(value)
    raise TextError("not text", f"text is {NAMES.get(type(value), f'of type {type(value).__name__}')}; send a string")


def _digits(value: Any) -> str | None:
    if not isinstance(value, numbers.Integral):
        if value.is_nan() if isinstance(value, Decimal) else math.isnan(value):  # a Decimal's NaN may be signalling
            return None
        if math.isinf(value):
            raise TextError("not text", f"text is {value}; send a string")
        if abs(value) >= EXACT or value != int(value):
            return str(value)
    try:
        return str(int(value))
    except ValueError:  # it has thousands of digits
        raise TextError("not text", "text is a number too long to write out; send a string") from None
