"""Read JSON objects one at a time: one per line, or the elements of an array."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from aisle.errors import InputError
from aisle.preprocess.tables.delimited import LONGEST

Row = dict[str, Any]
DEPTH = 100  # levels of nested lists and objects
BLANK = " \t\r\n\ufeff"
STEP = 64 * 1024  # characters of a read
_BETWEEN = re.compile(r"[\s,]*")


class Repeated(NamedTuple):
    """An object in which, at any depth, a key occurs twice."""

    row: Row
    key: str


class _Pairs:
    """A JSON object, and a key that occurs twice in it or in an object inside it."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        self.plain = {key: _unwrapped(value) for key, value in pairs}
        self.twice = next((twice for _, value in pairs if (twice := _twice(value)) is not None), None)
        if len(self.plain) < len(pairs):
            keys = [key for key, _ in pairs]
            self.twice = next(key for i, key in enumerate(keys) if key in keys[:i])


_DECODER = json.JSONDecoder(object_pairs_hook=_Pairs)


def _unwrapped(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return value.plain
    return [_unwrapped(each) for each in value] if isinstance(value, list) else value


def _twice(value: Any) -> str | None:
    """Return a key that occurs twice in an object inside a value."""
    if isinstance(value, _Pairs):
        return value.twice
    if isinstance(value, list):
        return next((twice for each in value if (twice := _twice(each)) is not None), None)
    return None


def line_rows(path: Path, file: IO[str]) -> Iterator[Row | Repeated]:
    """Yield the object of each line that is not blank.

    Raises:
        InputError: a line is not a JSON object; the message names the line.
    """
    for number, line in enumerate(iter(lambda: file.readline(LONGEST), ""), start=1):
        text = line.strip(BLANK)
        if not text:
            continue
        try:
            value = _only(text)
        except ValueError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from None
        yield _object(value, f"{path}, line {number}")


def one_value(text: str) -> Any:
    """Return the JSON value that a text holds.

    Raises:
        ValueError: it holds none or several, the value is nested too deeply, or a key of an object occurs twice.
    """
    value = _only(text.strip(BLANK))
    if (twice := _twice(value)) is not None:
        raise ValueError(f"the key {twice!r} occurs twice")
    return _unwrapped(value)


def array_rows(path: Path, file: IO[str]) -> Iterator[Row | Repeated]:
    """Yield the objects of an array, or of several one after another, without reading them all at once.

    Raises:
        InputError: an element is not an object, the file is not JSON, or something follows the array; the message
            names the element.
    """
    text, at, array = "", 0, False
    for number in itertools.count(1):
        where, step = f"{path}, element {number}", STEP
        while True:
            at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
            if number == 1 and not array and text.startswith("[", at):
                at, array = at + 1, True
                continue
            if array and text.startswith("]", at):
                _refuse_rest(path, file, text[at + 1 :])
                return
            try:
                value, at = _decode(text, at)
                break
            except ValueError as error:
                more = file.read(step) if len(text) - at <= LONGEST else ""
                if not more and not array and not text[at:].strip():
                    return
                if not more:
                    raise InputError(f"{where}: not JSON: {error}") from None
                text, at, step = text[at:] + more, 0, 2 * step
        yield _object(value, where)


def _only(text: str) -> Any:
    value, end = _decode(text, 0)
    if end < len(text):
        raise ValueError("more than one value")
    return value


def _refuse_rest(path: Path, file: IO[str], rest: str) -> None:
    """Raise InputError if something follows an array, such as another array."""
    for part in itertools.chain([rest], iter(lambda: file.read(STEP), "")):
        if part.strip():
            raise InputError(f"{path}: more data follows the array; write one array, or one object per line as .jsonl")


def _decode(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value at the offset `at`, and its end.

    Raises:
        ValueError: there is none, or it is nested too deeply to be written again.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if text.count("[", at, end) + text.count("{", at, end) > DEPTH and _depth(value) > DEPTH:
        raise ValueError("nested too deeply")
    return value, end


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [inner for each in level for inner in _inside(each)]
    return depth


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, _Pairs):
        return value.plain.values()
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _object(value: Any, where: str) -> Row | Repeated:
    if not isinstance(value, _Pairs):
        raise InputError(f"{where}: not a JSON object")
    return value.plain if value.twice is None else Repeated(value.plain, value.twice)
