"""Several columns as one text, such as a product's title, brand and description.

    红富士苹果 5斤 | 品牌: 佳沃 | 产地: 山东

The first field is written without its name, so a plain text is a product of which only that field is known. Missing
fields are left out. Training joins columns with the same function as serving.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aisle.errors import InputError
from aisle.preprocess.clean import clean
from aisle.preprocess.values import TextError, as_text

PARAMETER = "fields"  # of a request: texts that start with "{" are JSON objects of fields
FILE = "fields.json"  # in a version: the fields that its model reads
PLUS = "+"  # between columns in one --text-column
LONGEST = 100  # characters of a field's name in a message
BAR = "|"  # between fields; in a field's own text it becomes a slash


def columns_of(text_column: str) -> list[str]:
    """Return the columns that a --text-column names: one, or several as in "title+brand".

    Raises:
        InputError: a name is missing, or is given twice.
    """
    names = [name.strip() for name in text_column.split(PLUS)] if PLUS in text_column.strip(PLUS) else [text_column]
    if len(names) > 1 and not all(names):
        raise InputError(f"--text-column {text_column}: a name is missing beside a {PLUS!r}")
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise InputError(f"--text-column {text_column}: {twice} is given twice; give it once")
    return names


def join(fields: Mapping[str, object]) -> str | None:
    """Return the fields as one text, in their order; None if all are missing.

    Raises:
        TextError: a field is not a text, or not UTF-8.
    """
    first, *others = ((name, _cleaned(name, value)) for name, value in fields.items())
    parts = [f"{BAR} {name}: {text}" for name, text in others if text]
    return " ".join([first[1], *parts] if first[1] else parts) or None


def _cleaned(name: str, value: object) -> str:
    try:
        text = as_text(value)
        text = text.decode() if isinstance(text, bytes) else text
    except UnicodeError:
        raise TextError(
            "not UTF-8", f"text has the field {name[:LONGEST]!r}, which is not UTF-8; encode it as UTF-8"
        ) from None
    except TextError as error:
        raise TextError(
            error.reason, str(error).replace("text is", f"text has the field {name[:LONGEST]!r}, which is", 1)
        ) from None
    return clean(text).replace(BAR, "/").strip() if text else ""


def to_json(fields: Mapping[str, object]) -> bytes:
    """Return fields as the JSON object that a server reads; missing fields are left out.

    Raises:
        TextError: a field is not a text.
    """
    known = {str(name): _cleaned(str(name), value) for name, value in fields.items()}
    return json.dumps({name: text for name, text in known.items() if text}, ensure_ascii=False).encode()


def from_json(raw: bytes, known: Sequence[str]) -> str | None:
    """Return the text of a JSON object of fields, in the order that the model knows.

    Args:
        known: the fields of the model.

    Raises:
        TextError: it is no JSON object, or has a field that the model does not know, or the model knows none.
    """
    if not known:
        raise TextError("not text", "text is an object of fields, but the model reads one text; send a string")
    try:
        fields: Any = json.loads(raw)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise TextError("not fields", 'text is not a JSON object of fields, such as {"title": "…"}')
    unknown = next((name for name in fields if name not in known), None)
    if unknown is not None:
        raise TextError(
            "unknown field", f"text has the field {unknown[:LONGEST]!r}; the model reads {', '.join(known)}"
        )
    return join({name: fields.get(name) for name in known})


def read_fields(version: Path) -> list[str]:
    """Return the fields of a version of the tokenizer; none if its model reads one text."""
    file = version / FILE
    return list(json.loads(file.read_text("utf-8"))) if file.is_file() else []
