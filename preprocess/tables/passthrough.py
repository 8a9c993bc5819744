"""How JSON, CSV and spreadsheets hold values that are only copied and for which they have no type."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

EXACT = 2.0**53  # a spreadsheet's numbers represent every whole number up to here


def plain(value: Any) -> Any:
    """Return a value for JSON: dates and decimals become text, bytes UTF-8 or base64, and NaN null.

    Only the type is lost.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None if value != value else str(value)
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)


def cell(value: Any) -> Any:
    """Return a value for a cell of CSV or of a spreadsheet: as `plain`, with lists and objects as JSON."""
    value = plain(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value


def encodable(text: str) -> str:
    """Return a text that UTF-8 can encode: lone surrogates become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
