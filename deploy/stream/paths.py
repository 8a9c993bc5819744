"""Where the text is in a message: a path such as `$.product.title`, `$['product name']` or `title=$.titles[0]`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aisle.client import Failure
from aisle.errors import InputError

_PATH = re.compile(r"(?:(?P<name>[^=$]+)=)?\$(?P<steps>.*)", re.DOTALL)
_STEP = re.compile(r"\.([\w-]+)|\[(\d+)\]|\['([^']+)'\]|\[\"([^\"]+)\"\]")


@dataclass(frozen=True)
class TextPath:
    """One path."""

    written: str
    name: str  # of the model's field that it leads to
    steps: tuple[str | int, ...]

    def find(self, value: Any) -> Any:
        """Return what is at the path.

        Raises:
            LookupError: nothing is there.
        """
        for step in self.steps:
            if not isinstance(value, list if isinstance(step, int) else dict):
                raise LookupError
            value = value[step]  # type: ignore[index]
        return value


def parse(written: str) -> TextPath:
    """Return a path from its written form, a part of JSONPath (RFC 9535): names and positions.

    Raises:
        InputError: it has another form.
    """
    match = _PATH.fullmatch(written)
    steps, place = [], 0
    text = match["steps"] if match else ""
    while match and (found := _STEP.match(text, place)):
        steps.append(int(found[2]) if found[2] else found[1] or found[3] or found[4])
        place = found.end()
    if not match or place < len(text):
        raise InputError(f"--text {written}: give the text's path in a message, such as $.product.title or $.titles[0]")
    name = match["name"] or next((step for step in reversed(steps) if isinstance(step, str)), "")
    return TextPath(written, name, tuple(steps))


def parse_all(written: Sequence[str]) -> list[TextPath]:
    """Return the paths of a stream.

    Raises:
        InputError: one has another form, or two lead to the same field.
    """
    paths = [parse(each) for each in written]
    names = [path.name for path in paths]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"--text: two paths lead to the field {twice!r}; name them, as in title=$.product.title")
    return paths


def check_fields(paths: Sequence[TextPath], fields: Sequence[str] | None) -> None:
    """Check that several paths lead to the fields that the server's model reads. One path leads to a plain text.

    Args:
        fields: of the model; None if the versions that answer differ, so that only the server can check.

    Raises:
        InputError: they do not.
    """
    if len(paths) == 1 or fields is None or {path.name for path in paths} == {*fields}:
        return
    if not fields:
        raise InputError("--text: the server's model reads one text; give one path")
    named = " ".join(f"--text {name}=$.…" for name in fields)
    raise InputError(f"--text: the server's model reads {', '.join(fields)}; give {named}")


def find_text(paths: Sequence[TextPath], value: Any) -> Any:
    """Return what to classify: the text at the only path, or the fields at several; a `Failure` if there is none."""
    found = {}
    for path in paths:
        try:
            found[path.name] = path.find(value)
        except LookupError:
            continue
    if all(each is None for each in found.values()):
        return Failure(f"the message has no text at {', '.join(path.written for path in paths)}")
    return found if len(paths) > 1 else found[paths[0].name]
